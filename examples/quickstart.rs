//! The shortest way to a layer's output: a small mixture of experts with token choice, on any device.
//!
//! `scripts/with-vulkan cargo run --release --example quickstart`
use wgmoe::layer::{Batch, LayerConfig, MoeLayer, Router, Tensor};
use wgmoe::routing::TokenChoice;
use wgmoe::weights::{ExpertWeights, HostWeights, Projection, WeightType};
use wgmoe::{Context, Gpu};

const TOKENS: u32 = 32;

fn main() -> wgmoe::Result<()> {
    // An engine brings its own device and queue.
    let gpu = Gpu::new()?;
    let ctx = Context::new(&gpu.device)?;

    // Hidden size 64, experts of size 128, 8 experts, of which each token takes 2.
    let config = LayerConfig::new(64, 128, 8, TokenChoice::new(2));
    let weights = ExpertWeights::new(&ctx, config.expert_shape(WeightType::Bf16))?;
    for expert in 0..config.experts {
        for projection in Projection::ALL {
            let matrix = numbers(expert * 3 + projection as u32, 64 * 128);
            weights.write(&gpu.queue, expert, projection, HostWeights::F32(&matrix))?;
        }
    }
    let router = Router::new(Tensor::new(&ctx, "router", &numbers(99, 8 * 64))?);
    let layer = MoeLayer::new(&ctx, config, router, weights)?;

    // Bound once to buffers, recorded as often as it is to run.
    let hidden = gpu.upload(&numbers(100, TOKENS * 64));
    let out = gpu.upload(&vec![0f32; TOKENS as usize * 64]);
    let bound = layer.bind(&Batch::new(&hidden, TOKENS).into_out(&out))?;
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    bound.encode(&mut encoder);
    gpu.queue.submit([encoder.finish()]);

    let out: Vec<f32> = gpu.download(&out)?;
    println!("{} on {}: {:.4?} ...", gpu.info.name, gpu.info.backend, &out[..4]);
    let stats = wgmoe::plan::Stats::from_words(&gpu.download(bound.stats())?)?;
    println!("{} slots, tokens of each expert: {:?}", stats.slots, stats.tokens_per_expert);
    Ok(())
}

/// Some numbers between -0.2 and 0.2.
fn numbers(seed: u32, count: u32) -> Vec<f32> {
    let mix = |i: u32| i.wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503));
    (0..count).map(|i| (mix(mix(i)) >> 8) as f32 / (1 << 24) as f32 * 0.4 - 0.2).collect()
}
