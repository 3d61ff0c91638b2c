//! Values of the example, and the same blocks on the CPU.
use crate::{BLOCKS, HIDDEN, TOKENS};
use rand::{Rng, SeedableRng, rngs::StdRng};
use wgmoe::layer::{self, HostBatch, HostRouter, LayerConfig};
use wgmoe::weights::{HostWeights, Projection};

/// Values that bf16 holds exactly.
fn random(seed: u64, len: u32, most: f32) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| half::bf16::from_f32(rng.random_range(-most..most)).to_f32()).collect()
}

/// `[TOKENS, HIDDEN]`: what the first block is given.
pub(crate) fn input() -> Vec<f32> {
    random(0, TOKENS * HIDDEN, 1.0)
}

/// `[E, D]`: the router of a block.
pub(crate) fn router(config: &LayerConfig, block: u64) -> Vec<f32> {
    random(1 + block, config.experts * HIDDEN, 0.5)
}

/// An expert's matrix, `[out, in]`.
pub(crate) fn matrix(config: &LayerConfig, block: u64, e: u32, p: Projection) -> Vec<f32> {
    let seed = ((block << 16 | u64::from(e)) << 8) | (p as u64 + 1);
    random(seed << 16, HIDDEN * config.intermediate, 0.3)
}

/// Compares each block's output with what the CPU makes of its input; `x` holds the first input and all outputs.
pub(crate) fn blocks(config: &LayerConfig, x: &[f32]) -> Result<(), Box<dyn std::error::Error>> {
    let mut worst = 0f32;
    let stretches: Vec<&[f32]> = x.chunks((TOKENS * HIDDEN) as usize).collect();
    for (block, pair) in (0..BLOCKS).zip(stretches.windows(2)) {
        let norm = |row: &[f32]| -> Vec<f32> {
            let square: f32 = row.iter().map(|v| v * v).sum();
            row.iter().map(|v| v / (square / HIDDEN as f32 + 1e-6).sqrt()).collect()
        };
        let hidden: Vec<f32> = pair[0].chunks(HIDDEN as usize).flat_map(norm).collect();
        let weight = router(config, block);
        let router =
            HostRouter { weight: &weight, bias: None, scale_by_count: None, scale_by_expert: None };
        let matrices: Vec<_> = (0..config.experts + config.shared_experts)
            .map(|e| Projection::ALL.map(|p| matrix(config, block, e, p)))
            .collect();
        let experts = |e: u32, p: Projection| HostWeights::F32(&matrices[e as usize][p as usize]);
        let out = layer::cpu(config, &router, HostBatch::default(), &experts, &hidden);
        for ((x, y), got) in pair[0].iter().zip(out).zip(pair[1]) {
            let error = (got - (x + y)).abs() / (1.0 + got.abs());
            worst = if worst.is_nan() || error <= worst { worst } else { error };
        }
    }
    println!("{BLOCKS} blocks, largest error {worst:.1e} against the CPU");
    if worst <= 1e-4 { Ok(()) } else { Err(format!("the largest error is {worst}").into()) }
}
