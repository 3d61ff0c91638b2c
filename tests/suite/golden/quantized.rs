//! Storage types of blocks: what reference implementations make of their bytes, to the bit. On the host,
//! and on the device through matmuls with unit vectors, in every kernel.
use super::kinds::{Outcome, Report};
use testkit::compare::same;
use testkit::golden::File;
use testkit::prelude::{Output, contexts, run, variant_name};
use testkit::works::plan;
use wgmoe::ops::grouped_matmul::{
    Args, GroupedMatmul, Rows, SKINNY_ROWS, SlotRows, Stage, cpu_row,
};
use wgmoe::plan::bits;
use wgmoe::weights::{ExpertShape, HostWeights, MatrixView, Projection, TileScales};
use wgmoe::{Context, ExpertWeights, Gpu, Target, WeightType};

pub(super) fn quantized(file: &File, gpu: Option<&Gpu>, report: &mut Report) -> Outcome {
    let format = file.text("format")?;
    let weight_type: WeightType = format.parse().map_err(|e| format!("{e}"))?;
    let [rows, depth] = [file.number("out")?, file.number("in")?];
    let shape = [rows, depth];
    let want = file.f32s("dequantized")?;
    same(&[want.len()], &[rows as usize * depth as usize], "values")?;
    let (bytes, scales);
    let view = if weight_type == WeightType::Fp8 {
        bytes = file.bytes("weight")?;
        scales = file.f32s("weight_scale_inv")?;
        let tiles = TileScales::new(bytemuck::cast_slice(&scales), [128, 128]);
        MatrixView::with_tile_scales(&bytes, shape, [depth.into(), 1], tiles)
    } else {
        bytes = file.bytes("data")?;
        MatrixView::new(&bytes, weight_type, shape, [depth.into(), 1])
    };
    let view = view.map_err(|e| e.to_string())?;
    for (i, want) in want.iter().enumerate() {
        let got = view.get(i / depth as usize, i % depth as usize);
        if got.to_bits() != want.to_bits() && !(got.is_nan() && want.is_nan()) {
            return Err(format!("value {i}: got {got:e}, want {want:e}"));
        }
    }
    let Some(gpu) = gpu else { return Ok(()) };
    for target in [Target::Serial, Target::Wide] {
        let ctx = contexts(gpu).into_iter().find(|ctx| ctx.variant().target == target);
        let ctx = ctx.ok_or("every device runs either")?;
        on_device(gpu, &ctx, view, &want, report)
            .map_err(|e| format!("{}: {e}", variant_name(&ctx)))?;
    }
    Ok(())
}

/// Row k of the unit matrix as the hidden state of token k: the output is column k of the weights. The
/// first expert has all tokens, in tile items; the others have a few each, in skinny ones.
fn on_device(
    gpu: &Gpu,
    ctx: &Context,
    view: MatrixView<'_>,
    want: &[f32],
    report: &mut Report,
) -> Outcome {
    let say = |e: wgmoe::Error| e.to_string();
    let [columns, depth] = view.shape();
    let experts = 1 + depth.div_ceil(SKINNY_ROWS);
    let mut assigned = bits::empty(depth as usize, experts as usize);
    for t in 0..depth {
        for e in [0, 1 + t / SKINNY_ROWS] {
            bits::set(&mut assigned, depth as usize, e as usize, t as usize);
        }
    }
    let logits = vec![0.0; (depth * experts) as usize];
    let made = plan(gpu, ctx, [depth, experts], &logits, &assigned)?;
    let slots = made.host.token_of.len() as u32;
    // Down matrices are [D, F].
    let shape = ExpertShape::new(experts, columns, depth, view.weight_type());
    let weights = ExpertWeights::new(ctx, shape).map_err(say)?;
    for e in 0..experts {
        weights.write(&gpu.queue, e, Projection::Down, HostWeights::View(view)).map_err(say)?;
    }
    let mut x = vec![0f32; (slots * depth) as usize];
    for (slot, &k) in made.host.token_of.iter().enumerate() {
        x[slot * depth as usize + k as usize] = 1.0;
    }
    let x = gpu.upload(&x);
    let out = Output::f32s(gpu, (slots * columns) as usize);
    let args = Args {
        x: Rows::Slots(SlotRows::from(&x)),
        plan: (&made.plan).into(),
        weights: &weights,
        places: None,
        out: out.slice().into(),
        slots: 0..slots,
        columns: 0..columns,
    };
    let op = GroupedMatmul::new(ctx, &shape, Stage::Down).map_err(say)?;
    run(gpu, &op.bind(&made.shape, args).map_err(say)?);
    let got: Vec<f32> = out.get(gpu);
    // A sum in which one value is infinite or NaN is so for every k.
    let mut unit = vec![0.0; depth as usize];
    for k in 0..depth as usize {
        unit[k] = 1.0;
        let want = cpu_row(&unit, &|i| want[i], columns as usize);
        unit[k] = 0.0;
        let of_k = made.host.token_of.iter().enumerate().filter(|(_, t)| **t as usize == k);
        for (slot, _) in of_k {
            for (n, want) in want.iter().map(|&v| v as f32).enumerate() {
                let got = got[slot * columns as usize + n];
                if got == 0.0 && want.is_subnormal() {
                    report.flushed += 1;
                } else if got != want && !(got.is_nan() && want.is_nan()) {
                    return Err(format!("slot {slot}, [{n}, {k}]: got {got:e}, want {want:e}"));
                }
            }
        }
    }
    Ok(())
}
