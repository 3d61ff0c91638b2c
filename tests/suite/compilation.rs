//! How long the driver compiles: each kernel has a limit, in some of its variants. A compiler that unrolls and inlines
//! without end (SwiftShader's has) is one that users wait for, and a process that runs out of memory.
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use testkit::prelude::gpu;
use wgmoe::device::Prelude;
use wgmoe::{SPECS, wgpu};

/// For one kernel.
const LIMIT: Duration = Duration::from_secs(60);
/// Variants of a kernel, spread over all there are.
const VARIANTS: usize = 4;

type Work = (String, Box<dyn FnOnce() + Send>);

/// Does all works in order, and returns the one that took longest; the name of the first that takes longer than the
/// limit is an error, at once.
fn longest(works: Vec<Work>, limit: Duration) -> Result<(String, Duration), String> {
    let names: Vec<String> = works.iter().map(|work| work.0.clone()).collect();
    let (send, done) = channel();
    // Not joined where it hangs: it goes with the process.
    std::thread::spawn(move || {
        for (_, work) in works {
            let start = Instant::now();
            work();
            if send.send(start.elapsed()).is_err() {
                return; // nobody waits any more
            }
        }
    });
    let mut worst = (String::new(), Duration::ZERO);
    for name in names {
        let time = done.recv_timeout(limit).map_err(|e| format!("{name}: {e}"))?;
        if time >= worst.1 {
            worst = (name, time);
        }
    }
    Ok(worst)
}

fn compile(device: &wgpu::Device, name: &'static str, source: String) {
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some(name),
        source: wgpu::ShaderSource::Wgsl(source.into()),
    });
    let compilation_options = wgpu::PipelineCompilationOptions {
        zero_initialize_workgroup_memory: false,
        ..Default::default()
    };
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(name),
        layout: None,
        module: &module,
        entry_point: Some(name),
        compilation_options,
        cache: None,
    });
    drop(pipeline);
}

#[test]
fn no_kernel_compiles_for_a_minute() {
    let Some(gpu) = gpu() else { return };
    // Matrix units have tests of their own, and drivers that die of some shapes.
    let features = gpu.device.features() - wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
    let software = gpu.info.device_type == wgpu::DeviceType::Cpu;
    let mut works: Vec<Work> = vec![];
    for spec in SPECS {
        // Software drivers run no small items, because they compile their kernels for long.
        let runs = |p: &Prelude| !software || !p.label.contains("loops by rows");
        let is_there = |p: &Prelude| features.contains(p.features) && runs(p);
        let all: Vec<_> = (spec.variants)().into_iter().filter(is_there).collect();
        let count = all.len().min(VARIANTS);
        for i in 0..count {
            let prelude = &all[i * all.len() / count];
            let source = spec.source(prelude);
            let device = gpu.device.clone();
            let name = format!("{} ({})", spec.name, prelude.label);
            works.push((name, Box::new(move || compile(&device, spec.name, source))));
        }
    }
    assert!(works.len() > SPECS.len(), "{} variants", works.len());
    let count = works.len();
    match longest(works, LIMIT) {
        Ok((name, time)) => println!("{count} variants, the longest {time:.2?}: {name}"),
        Err(name) => panic!("after {LIMIT:?} the driver still compiles {name}"),
    }
}

#[test]
fn what_takes_too_long_is_named() {
    let sleep = |ms| move || std::thread::sleep(Duration::from_millis(ms));
    let works = |middle| -> Vec<Work> {
        vec![
            ("a".into(), Box::new(sleep(1))),
            ("b".into(), Box::new(sleep(middle))),
            ("c".into(), Box::new(sleep(1))),
        ]
    };
    let limit = Duration::from_secs(2);
    assert_eq!(longest(works(40), limit).map(|(name, _)| name), Ok("b".into()));
    let late = longest(works(60_000), limit);
    assert!(late.as_ref().is_err_and(|e| e.starts_with("b:")), "{late:?}");
}
