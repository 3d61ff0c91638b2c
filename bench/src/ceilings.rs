//! What a device can do at best, measured before the cases: rates of memory and arithmetic, and
//! what a dispatch and a submission cost.
use crate::file::{Bound, BoundBy, Ceilings, Part, Work};
use crate::timing::{Stop, Timer, Timing};
use crate::units;
use wgmoe::{Context, Gpu, wgpu};

/// Lanes of a device that is kept busy, on GPUs and on software drivers.
const LANES: u32 = 1 << 18;
const SOFTWARE_LANES: u32 = 1 << 14;
/// Lanes of the multiply-adds, of `ROUNDS` in the WGSL.
const FLOPS_OF_A_LANE: f64 = 2.0 * 64.0 * 512.0;
/// Bytes that are read, and that are copied: more than caches hold.
const BYTES: u64 = 512 << 20;
const SOFTWARE_BYTES: u64 = 128 << 20;
const CHAIN: u32 = 200;

struct Bench<'a> {
    timer: &'a Timer<'a>,
    module: wgpu::ShaderModule,
    layout: wgpu::BindGroupLayout,
    pipeline_layout: wgpu::PipelineLayout,
    seconds: f64,
}

impl Bench<'_> {
    fn gpu(&self) -> &Gpu {
        self.timer.gpu()
    }

    fn kernel(&self, name: &str) -> wgpu::ComputePipeline {
        self.gpu().device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(name),
            layout: Some(&self.pipeline_layout),
            module: &self.module,
            entry_point: Some(name),
            compilation_options: Default::default(),
            cache: None,
        })
    }

    fn bind(
        &self,
        data: &wgpu::Buffer,
        out: &wgpu::Buffer,
        items: u32,
        lanes: u32,
    ) -> wgpu::BindGroup {
        let device = &self.gpu().device;
        let half = 0.5f32.to_bits();
        let params = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("params"),
            size: 16,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        self.gpu().queue.write_buffer(
            &params,
            0,
            bytemuck::cast_slice(&[half, half, items, lanes]),
        );
        device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &self.layout,
            entries: &[(0, &params), (1, data), (2, out)].map(|(binding, buffer)| {
                wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() }
            }),
        })
    }

    /// `count` dispatches of `groups` workgroups a turn.
    async fn time(
        &self,
        kernel: &wgpu::ComputePipeline,
        bindings: &wgpu::BindGroup,
        groups: u32,
        count: u32,
    ) -> Result<Timing, Stop> {
        let record = |_: usize, pass: &mut wgpu::ComputePass<'_>| {
            pass.set_pipeline(kernel);
            pass.set_bind_group(0, bindings, &[]);
            for _ in 0..count {
                pass.dispatch_workgroups(groups, 1, 1);
            }
        };
        self.timer.time(&record, self.seconds).await
    }
}

/// Measures the ceilings, about `seconds` each; what fails leaves a note. `Err` where the run is
/// interrupted.
pub(crate) async fn measure(
    timer: &Timer<'_>,
    ctx: &Context,
    seconds: f64,
) -> Result<Ceilings, Stop> {
    let gpu = timer.gpu();
    let device = &gpu.device;
    let module = device.create_shader_module(wgpu::include_wgsl!("ceilings.wgsl"));
    let entry = |binding, ty| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
        count: None,
    };
    let storage = |read_only| wgpu::BufferBindingType::Storage { read_only };
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: None,
        entries: &[
            entry(0, wgpu::BufferBindingType::Uniform),
            entry(1, storage(true)),
            entry(2, storage(false)),
        ],
    });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: None,
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let bench = Bench { timer, module, layout, pipeline_layout, seconds };
    let mut ceilings = Ceilings::default();
    let Ceilings {
        copy_gb_s,
        read_gb_s,
        multiply_add_gflop_s,
        matrix_gflop_s,
        dispatch_us,
        submit_us,
        notes,
    } = &mut ceilings;
    // Arithmetic first: it wakes the clocks.
    let note = &mut |what: &str, result: Result<(), Stop>| match result {
        Err(Stop::Interrupted) => Err(Stop::Interrupted),
        Err(Stop::Failed(why)) => {
            notes.push(format!("{what}: {why}"));
            Ok(())
        }
        Ok(()) => Ok(()),
    };
    note("multiply-adds", arithmetic(&bench).await.map(|rate| *multiply_add_gflop_s = Some(rate)))?;
    note("matrix units", units::measure(timer, ctx, seconds).await.map(|r| *matrix_gflop_s = r))?;
    note(
        "memory",
        memory(&bench).await.map(|(read, copy)| {
            (*read_gb_s, *copy_gb_s) = (Some(read), Some(copy));
        }),
    )?;
    note(
        "dispatch",
        overheads(&bench).await.map(|(dispatch, submit)| {
            (*dispatch_us, *submit_us) = (Some(dispatch), Some(submit));
        }),
    )?;
    Ok(ceilings)
}

fn software(gpu: &Gpu) -> bool {
    gpu.info.device_type == wgpu::DeviceType::Cpu
}

/// The higher of two ways to write it, 10^9 operations a second.
async fn arithmetic(bench: &Bench<'_>) -> Result<f64, Stop> {
    let gpu = bench.gpu();
    let lanes = if software(gpu) { SOFTWARE_LANES } else { LANES };
    let data = gpu.upload(&[0f32; 4]);
    let mut best = 0f64;
    for name in ["multiply_add", "multiply_add_fused"] {
        let kernel = bench.kernel(name);
        let out = gpu.upload(&vec![f32::NAN; 4 * lanes as usize]);
        let bindings = bench.bind(&data, &out, 1, lanes);
        let timing = bench.time(&kernel, &bindings, lanes.div_ceil(64), 1).await?;
        let got: Vec<f32> = gpu.download_async(&out).await?;
        if let Some(wrong) = got.iter().find(|v| (*v - 4.0).abs() > 1e-5 || v.is_nan()) {
            return Err(Stop::Failed(format!("{name}: got {wrong}, want 4")));
        }
        best = best.max(f64::from(lanes) * FLOPS_OF_A_LANE / timing.times().least_ms / 1e6);
    }
    Ok(best)
}

/// Bytes read, and bytes read and written in a copy, 10^9 a second.
async fn memory(bench: &Bench<'_>) -> Result<(f64, f64), Stop> {
    let gpu = bench.gpu();
    let (lanes, most) =
        if software(gpu) { (SOFTWARE_LANES, SOFTWARE_BYTES) } else { (LANES, BYTES) };
    let limits = gpu.device.limits();
    let bytes = most.min(limits.max_storage_buffer_binding_size).min(limits.max_buffer_size);
    let items = (bytes / 64 / u64::from(lanes) * u64::from(lanes) * 4) as u32;
    let size = 16 * u64::from(items);
    let buffer = || {
        gpu.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("memory"),
            size,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    };
    let (data, out) = (buffer(), buffer());
    // A pattern in whole stretches of lanes: every lane's items are equal.
    let stretch: Vec<f32> = (0..4 * lanes).map(|i| (i % 8191) as f32 / 8192.0).collect();
    let bytes_of: &[u8] = bytemuck::cast_slice(&stretch);
    for at in (0..size).step_by(bytes_of.len()) {
        gpu.queue.write_buffer(&data, at, bytes_of);
    }
    gpu.queue.submit([]);
    gpu.wait_async().await?;
    let bindings = bench.bind(&data, &out, items, lanes);
    let groups = lanes.div_ceil(64);

    let read = bench.time(&bench.kernel("read_all"), &bindings, groups, 1).await?;
    let sums = wgmoe::Slice::new(&out, 0, 16 * u64::from(lanes));
    let got: Vec<f32> = gpu.download_async(sums).await?;
    let rounds = (items / lanes) as f32;
    if let Some(i) = (0..got.len()).find(|&i| (got[i] - rounds * stretch[i]).abs() > 1e-3 * rounds)
    {
        return Err(Stop::Failed(format!("sum {i}: got {}, want {}", got[i], rounds * stretch[i])));
    }
    let rate = |bytes: u64, ms: f64| bytes as f64 / ms / 1e6;
    let read = rate(size, read.times().least_ms);
    // By a kernel, and by the driver's own copy, which on software drivers is much faster.
    let copy = bench.time(&bench.kernel("copy_all"), &bindings, groups, 1).await?;
    let check = async |what: &str| {
        for at in [0, size - bytes_of.len() as u64] {
            let part = wgmoe::Slice::new(&out, at, bytes_of.len() as u64);
            let got: Vec<f32> = gpu.download_async(part).await?;
            if got != stretch {
                return Err(Stop::Failed(format!("{what}: the copy differs")));
            }
        }
        Ok(())
    };
    check("copy_all").await?;
    // So that what the driver does not copy is seen.
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    encoder.clear_buffer(&out, 0, None);
    gpu.queue.submit([encoder.finish()]);
    let copy_in_driver = |encoder: &mut wgpu::CommandEncoder| {
        encoder.copy_buffer_to_buffer(&data, 0, &out, 0, size);
    };
    let driver = bench.timer.submit(&copy_in_driver, bench.seconds).await?;
    check("copy_buffer_to_buffer").await?;
    let best = copy.times().least_ms.min(driver.least_ms);
    Ok((read, rate(2 * size, best)))
}

/// Microseconds of one more dispatch that waits for the one before, and of one dispatch from
/// encoding to the end.
async fn overheads(bench: &Bench<'_>) -> Result<(f64, f64), Stop> {
    let gpu = bench.gpu();
    let (data, out) = (gpu.upload(&[0f32; 4]), gpu.upload(&[0f32; 4]));
    let kernel = bench.kernel("empty");
    let bindings = bench.bind(&data, &out, 1, 1);
    let chain = bench.time(&kernel, &bindings, 1, CHAIN).await?;
    let got: Vec<f32> = gpu.download_async(&out).await?;
    if got[0] < CHAIN as f32 || got[0] % CHAIN as f32 != 0.0 {
        return Err(Stop::Failed(format!("dispatches of {CHAIN} each counted to {}", got[0])));
    }
    let once = |encoder: &mut wgpu::CommandEncoder| {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&kernel);
        pass.set_bind_group(0, &bindings, &[]);
        pass.dispatch_workgroups(1, 1, 1);
    };
    let submit = bench.timer.submit(&once, bench.seconds).await?;
    Ok((chain.times().least_ms / f64::from(CHAIN) * 1e3, submit.median_ms * 1e3))
}

/// The higher of the two rates of memory, 10^9 bytes a second.
pub(crate) fn bandwidth(ceilings: &Ceilings) -> Option<f64> {
    ceilings.read_gb_s.into_iter().chain(ceilings.copy_gb_s).max_by(f64::total_cmp)
}

/// The higher of the two rates of arithmetic, and which it is.
pub(crate) fn arithmetic_of(ceilings: &Ceilings) -> Option<(BoundBy, f64)> {
    let vectors = ceilings.multiply_add_gflop_s.map(|rate| (BoundBy::Compute, rate));
    let units = ceilings.matrix_gflop_s.map(|rate| (BoundBy::Matrix, rate));
    vectors.into_iter().chain(units).max_by(|a, b| a.1.total_cmp(&b.1))
}

/// The ceiling that the work meets first, and how near `median_ms` comes to it. None where no
/// ceiling was measured. Matrix units multiply for the experts alone.
pub(crate) fn bound(ceilings: &Ceilings, part: Part, work: &Work, median_ms: f64) -> Option<Bound> {
    let experts = matches!(part, Part::Experts | Part::Layer);
    let vectors = ceilings.multiply_add_gflop_s.map(|rate| (BoundBy::Compute, rate));
    let arithmetic = if experts { arithmetic_of(ceilings) } else { vectors };
    let (arithmetic_by, arithmetic) = arithmetic.unzip();
    let over = |amount: f64, giga: Option<f64>| giga.map(|giga| amount / giga / 1e6);
    let least = [
        (BoundBy::Memory, over(work.bytes, bandwidth(ceilings))),
        (arithmetic_by.unwrap_or(BoundBy::Compute), over(work.flops, arithmetic)),
        (BoundBy::Dispatch, ceilings.dispatch_us.map(|us| work.dispatches * us / 1e3)),
    ];
    let known = least.into_iter().filter_map(|(by, ms)| Some((by, ms?)));
    let (by, least_ms) = known.max_by(|a, b| a.1.total_cmp(&b.1))?;
    (median_ms > 0.0).then(|| Bound { by, least_ms, share: least_ms / median_ms })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_bound_by_what_takes_longest() {
        let ceilings = Ceilings {
            copy_gb_s: Some(80.0),
            read_gb_s: Some(100.0),
            multiply_add_gflop_s: Some(1000.0),
            dispatch_us: Some(5.0),
            ..Ceilings::default()
        };
        let work = |bytes, flops, dispatches| Work {
            bytes,
            flops,
            dispatches,
            slots: 0.0,
            experts_touched: 0.0,
            experts_per_block: 0.0,
        };
        let by = |work: &Work| {
            bound(&ceilings, Part::Layer, work, 4.0).map(|b| (b.by, b.least_ms, b.share))
        };
        assert_eq!(by(&work(1e8, 1e8, 3.0)), Some((BoundBy::Memory, 1.0, 0.25)));
        assert_eq!(by(&work(1e8, 2e9, 3.0)), Some((BoundBy::Compute, 2.0, 0.5)));
        assert_eq!(by(&work(1e3, 1e3, 3.0)), Some((BoundBy::Dispatch, 0.015, 0.015 / 4.0)));
        assert_eq!(bound(&Ceilings::default(), Part::Layer, &work(1e8, 1e8, 3.0), 4.0), None);
        assert_eq!(bound(&ceilings, Part::Layer, &work(1e8, 1e8, 3.0), 0.0), None);
        // Matrix units serve the experts, and raise their roof where they are the faster.
        for (units, part, want) in [
            (4000.0, Part::Layer, (BoundBy::Matrix, 2.0, 0.5)),
            (4000.0, Part::Routing, (BoundBy::Compute, 8.0, 2.0)),
            (10.0, Part::Experts, (BoundBy::Compute, 8.0, 2.0)),
        ] {
            let ceilings = Ceilings { matrix_gflop_s: Some(units), ..ceilings.clone() };
            let found = bound(&ceilings, part, &work(1e8, 8e9, 3.0), 4.0);
            assert_eq!(found.map(|b| (b.by, b.least_ms, b.share)), Some(want));
        }
    }
}
