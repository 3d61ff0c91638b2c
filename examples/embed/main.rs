//! How an engine takes the layers in: plain wgpu, a device with no feature that kernels use and the default limits, one
//! buffer that all activations lie in, one encoder. Each of its blocks is a kernel of the engine's (`engine.wgsl`), a layer
//! of ours, and another kernel of the engine's; all are one submission, and each is compared with the CPU (`check.rs`).
//! With `embed FILE` the engine keeps compiled pipelines in a file (`cache.rs`).
use std::{cell::Cell, time::Instant};
use wgmoe::layer::{Batch, MoeLayer, Router, Scratch, Tensor};
use wgmoe::weights::{ExpertWeights, HostWeights, Projection, WeightType};
use wgmoe::wgpu::{self, BufferUsages as Usage, ComputePass, ComputePipeline};
use wgmoe::{Slice, models};

mod cache;
mod check;

const BLOCKS: u64 = 20;
const TOKENS: u32 = 48;
const HIDDEN: u32 = 64;
const BYTES: u64 = TOKENS as u64 * HIDDEN as u64 * 4;

/// The engine's allocator: one buffer, cut where a binding may start (at multiples of 256, by the default limits).
struct Arena(wgpu::Buffer, Cell<u64>);

impl Arena {
    fn tensor(&self) -> Slice<'_> {
        Slice::new(&self.0, self.1.replace(self.1.get() + BYTES.next_multiple_of(256)), BYTES)
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The engine's own device, buffers and kernels.
    let from_env = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
    let instance = wgpu::Instance::new(from_env);
    let adapter = pollster::block_on(instance.request_adapter(&Default::default()))?;
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
        required_features: cache::Pipelines::features(&adapter),
        ..Default::default()
    }))?;
    let size = (BLOCKS + 3) * BYTES;
    let of = |usage| wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
    let usage = Usage::STORAGE | Usage::COPY_DST | Usage::COPY_SRC;
    let arena = Arena(device.create_buffer(&of(usage)), Cell::new(0));
    let x: Vec<Slice> = (0..=BLOCKS).map(|_| arena.tensor()).collect();
    let [hidden, out] = [arena.tensor(), arena.tensor()];
    queue.write_buffer(&arena.0, x[0].offset, bytemuck::cast_slice(&check::input()));
    let module = device.create_shader_module(wgpu::include_wgsl!("engine.wgsl"));
    let [norm, add] = ["norm", "add"].map(|name| {
        device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(name),
            layout: None,
            module: &module,
            entry_point: Some(name),
            compilation_options: Default::default(),
            cache: None,
        })
    });
    let run = |pass: &mut ComputePass, kernel: &ComputePipeline, slices: &[Slice], lanes: u32| {
        let (label, layout) = (None, &kernel.get_bind_group_layout(0));
        let entries = &(0..)
            .zip(slices)
            .map(|(binding, s)| wgpu::BindGroupEntry { binding, resource: s.binding() })
            .collect::<Vec<_>>();
        pass.set_pipeline(kernel);
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor { label, layout, entries });
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(lanes.div_ceil(64), 1, 1);
    };

    // Our layers: one context, one scratch, and for each block a layer, bound once.
    let config = models::find("llada2-mini").ok_or("no such model")?.config;
    let config = {
        let mut config = config;
        config.hidden = HIDDEN;
        config.intermediate = 32;
        config.experts = 64;
        config
    };
    let pipelines = cache::Pipelines::open(&device);
    let ctx = pipelines.context(&device)?;
    let (scratch, mut steps) = (Scratch::new(&ctx), vec![]);
    for block in 0..BLOCKS {
        let weights = ExpertWeights::new(&ctx, config.expert_shape(WeightType::Bf16))?;
        for expert in 0..weights.shape().experts {
            for p in Projection::ALL {
                let values = check::matrix(&config, block, expert, p);
                weights.write(&queue, expert, p, HostWeights::F32(&values))?;
            }
        }
        let weight = Tensor::new(&ctx, "router", &check::router(&config, block))?;
        let router = Router::new(weight);
        let start = Instant::now();
        let layer = MoeLayer::new(&ctx, config, router, weights)?;
        let batch = Batch::new(hidden, TOKENS).into_out(out).with_scratch(&scratch);
        steps.push(layer.bind(&batch)?);
        println!("layer {block}: {:.1?}, {} pipelines so far", start.elapsed(), ctx.pipelines());
    }
    println!("scratch: {} bytes, shared by all layers", scratch.bytes());

    // One submission: x[i + 1] = x[i] + layer(norm(x[i])).
    let mut encoder = device.create_command_encoder(&Default::default());
    let mut pass = encoder.begin_compute_pass(&Default::default());
    for (step, x) in steps.iter().zip(x.windows(2)) {
        run(&mut pass, &norm, &[x[0], hidden], TOKENS);
        step.record(&mut pass);
        run(&mut pass, &add, &[x[0], out, x[1]], TOKENS * HIDDEN);
    }
    drop(pass);
    let read = device.create_buffer(&of(Usage::COPY_DST | Usage::MAP_READ));
    encoder.copy_buffer_to_buffer(&arena.0, 0, &read, 0, size);
    encoder.map_buffer_on_submit(&read, wgpu::MapMode::Read, .., |done| done.expect("a mapping"));
    let start = Instant::now();
    queue.submit([encoder.finish()]);
    device.poll(wgpu::PollType::wait_indefinitely())?;
    println!("all blocks for the first time: {:.1?}", start.elapsed());
    pipelines.save()?;
    check::blocks(&config, bytemuck::cast_slice(&read.get_mapped_range(..)?))
}
