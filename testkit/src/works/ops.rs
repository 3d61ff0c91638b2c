//! Single operations that other implementations are timed on as well: OP1, a choice; OP2, a grouped
//! matmul. OP3 is a gather.
use super::numbers::{GATE, SCORES, X, fill};
use super::plan::plan;
use crate::compare::{close, same};
use crate::layer::stored;
use wgmoe::ops::expert_choice::{self, ExpertChoice};
use wgmoe::ops::grouped_matmul::{Args, GroupedMatmul, Rows, SlotRows, Stage, cpu_row};
use wgmoe::plan::bits;
use wgmoe::weights::{ExpertShape, HostWeights, Projection};
use wgmoe::{BoundOp, Context, ExpertWeights, Gpu, WeightType};

/// The choice of `capacity` tokens for each expert among `[tokens, experts]` scores, run once and
/// compared whole.
pub fn choice(
    gpu: &Gpu,
    ctx: &Context,
    [tokens, experts, capacity]: [u32; 3],
) -> Result<BoundOp, String> {
    let say = |e: wgmoe::Error| e.to_string();
    let r = fill(SCORES, tokens * experts, 1.0);
    let (r_in, offsets, take) = (gpu.upload(&r), gpu.upload(&[0, tokens]), gpu.upload(&[capacity]));
    let assigned = gpu.upload(&vec![u32::MAX; (experts * tokens.div_ceil(32)) as usize]);
    let args = expert_choice::Args {
        values: (&r_in).into(),
        offsets: (&offsets).into(),
        lengths: None,
        capacity: (&take).into(),
        assigned: (&assigned).into(),
    };
    let dims = expert_choice::Dims { tokens, experts, sequences: 1 };
    let step = ExpertChoice::new(ctx).and_then(|op| op.bind(&dims, args)).map_err(say)?;
    gpu.run(&step).map_err(say)?;
    let got: Vec<u32> = gpu.download(&assigned).map_err(say)?;
    let want = expert_choice::cpu(&r, experts as usize, &[0, tokens], None, &[capacity]);
    same(&got, &want, "assigned").map(|()| step)
}

/// OP2: experts, rows of each, depth, columns.
pub const OP2: [u32; 4] = [32, 64, 2048, 512];

/// A grouped matmul of `[experts, rows of each, depth, columns]`, such as [`OP2`], through a plan in which
/// each token has one expert, run once and compared in some rows.
pub fn grouped_matmul(
    gpu: &Gpu,
    ctx: &Context,
    weight_type: WeightType,
    sizes: [u32; 4],
) -> Result<BoundOp, String> {
    let say = |e: wgmoe::Error| e.to_string();
    let [experts, rows, depth, columns] = sizes;
    let tokens = experts * rows;
    let mut assigned = bits::empty(tokens as usize, experts as usize);
    for t in 0..tokens as usize {
        bits::set(&mut assigned, tokens as usize, t / rows as usize, t);
    }
    let planned =
        plan(gpu, ctx, [tokens, experts], &fill(SCORES, tokens * experts, 1.0), &assigned)?;
    let (x, w) = (fill(X, tokens * depth, 1.0), fill(GATE, experts * columns * depth, 1.0));
    let shape = ExpertShape::new(experts, columns, depth, weight_type);
    let weights = ExpertWeights::new(ctx, shape).map_err(say)?;
    for (e, w) in (0..).zip(w.chunks_exact((columns * depth) as usize)) {
        weights.write(&gpu.queue, e, Projection::Down, HostWeights::F32(w)).map_err(say)?;
    }
    let x_in = gpu.upload(&x);
    let out = gpu.upload(&vec![f32::NAN; (tokens * columns) as usize]);
    let op = GroupedMatmul::new(ctx, &shape, Stage::Down).map_err(say)?;
    let args = Args {
        x: Rows::Slots(SlotRows::from(&x_in)),
        plan: (&planned.plan).into(),
        weights: &weights,
        places: None,
        out: (&out).into(),
        slots: 0..tokens,
        columns: 0..columns,
    };
    let step = op.bind(&planned.shape, args).map_err(say)?;
    gpu.run(&step).map_err(say)?;
    let got: Vec<f32> = gpu.download(&out).map_err(say)?;
    for slot in (0..tokens as usize).step_by(131) {
        let first = slot / rows as usize * (columns * depth) as usize;
        let row = &x[slot * depth as usize..][..depth as usize];
        let w = stored(&w[first..][..(columns * depth) as usize], depth, weight_type);
        let weight = |i: usize| w[i];
        let want: Vec<f32> =
            cpu_row(row, &weight, columns as usize).into_iter().map(|v| v as f32).collect();
        let got = &got[slot * columns as usize..][..columns as usize];
        close(got, &want, 1e-4, 1e-5, &format!("slot {slot}"))?;
    }
    match got.iter().position(|v| !v.is_finite()) {
        Some(i) => Err(format!("slot {}: not finite", i / columns as usize)),
        None => Ok(step),
    }
}
