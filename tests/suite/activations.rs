//! Hidden states and outputs in f16 and bf16: every value widened and rounded as the `half` crate does,
//! and layers equal, bit for bit, to those that read and write the same values in f32.
use crate::combine::words;
use half::{bf16, f16};
use testkit::compare::largest;
use testkit::layer::HostLayer;
use testkit::prelude::*;
use wgmoe::layer::cached::{CacheOptions, CachedLayer};
use wgmoe::layer::{Batch, LayerConfig, MoeLayer};
use wgmoe::ops::combine::{self, Combine};
use wgmoe::ops::gather::{self, Gather};
use wgmoe::ops::logits::{self, Logits};
use wgmoe::plan::{HostPlan, bits};
use wgmoe::routing::{BlockRule, Routing, Score, TokenChoice};
use wgmoe::{Context, Error, FloatType, Floats, Gpu, PlanShape, Slice, Target, WeightType, wgpu};

const HALVES: [FloatType; 2] = [FloatType::F16, FloatType::Bf16];

fn bits_of(float_type: FloatType, v: f32) -> u16 {
    match float_type {
        FloatType::F16 => f16::from_f32(v).to_bits(),
        _ => bf16::from_f32(v).to_bits(),
    }
}

fn value_of(float_type: FloatType, bits: u16) -> f32 {
    match float_type {
        FloatType::F16 => f16::from_bits(bits).to_f32(),
        _ => bf16::from_bits(bits).to_f32(),
    }
}

/// Every half, the f32 halfway to the next one, and those beside it.
fn around(float_type: FloatType) -> Vec<f32> {
    let mut values = vec![];
    for half in 0..=u16::MAX {
        let bits = value_of(float_type, half).to_bits();
        let middle = match float_type {
            FloatType::F16 => {
                // After the largest comes what it would be with one more exponent.
                let next = match half {
                    0x7bff => 65_536.0,
                    0xfbff => -65_536.0,
                    _ => f64::from(value_of(float_type, half.wrapping_add(1))),
                };
                ((f64::from(f32::from_bits(bits)) + next) / 2.0) as f32
            }
            _ => f32::from_bits(bits + 0x8000),
        };
        let middle = middle.to_bits();
        values.extend([bits, middle, middle.wrapping_sub(1), middle.wrapping_add(1)]);
    }
    values.into_iter().map(f32::from_bits).collect()
}

/// A plan in which each token has one slot, with gate 1.
fn one_each(tokens: u32) -> (PlanShape, Vec<u32>) {
    let mut assigned = bits::empty(tokens as usize, 1);
    (0..tokens as usize).for_each(|t| bits::set(&mut assigned, tokens as usize, 0, t));
    let shape = PlanShape::on_host(tokens, 1, tokens).with_item_rows(16, 0);
    let plan = HostPlan::cpu(&shape, &assigned, &vec![1.0; tokens as usize]);
    let words = words(&shape, &plan);
    (shape, words)
}

fn buffer_of(gpu: &Gpu, float_type: FloatType, values: &[f32]) -> wgpu::Buffer {
    gpu.upload(&float_type.encode(values))
}

#[test]
fn every_value_is_rounded_to_nearest() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    for float_type in HALVES {
        let y = around(float_type);
        // Rows of whole vectors of four, and of words alone; of more than a workgroup takes.
        for hidden in [256, 254, 2060] {
            let tokens = y.len() / hidden;
            let y = &y[..tokens * hidden];
            let (shape, plan) = one_each(tokens as u32);
            let (y_buffer, plan) = (gpu.upload(y), gpu.upload(&plan));
            let out = Output::u32s(&gpu, y.len() / 2);
            let args = combine::Args {
                y: (&y_buffer).into(),
                plan: (&plan).into(),
                out: Floats::new(out.slice(), float_type),
                columns: 0..hidden as u32,
                hidden: hidden as u32,
                add: false,
            };
            run(&gpu, &Combine::new(&ctx).unwrap().bind(&shape, args).unwrap());
            let got: Vec<u16> = out.get(&gpu);
            for (&v, got) in y.iter().zip(got) {
                // A sum from 0 on makes -0 a 0. Devices may flush subnormal f32.
                let want = bits_of(float_type, 0.0 + v);
                let nan = v.is_nan() && value_of(float_type, got).is_nan();
                let flushed = v.abs() < f32::MIN_POSITIVE && got & 0x7fff == 0;
                assert!(got == want || nan || flushed, "{float_type:?} {v:e}: {got:x}, {want:x}");
            }
        }
    }
}

#[test]
fn every_value_is_widened_exactly() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu).into_iter().filter(|ctx| !ctx.variant().subgroups) {
        for float_type in HALVES {
            // Odd steps, so that a few rows have values of every size, and all rows every value.
            let finite: Vec<f32> = (0..=u16::MAX)
                .map(|i| value_of(float_type, i.wrapping_mul(40_503)))
                .filter(|v| v.is_finite())
                .collect();
            // Rows in words of eight, four and two values. Sums of one value and zeros are exact.
            for (hidden, rows) in [(16u32, 4080), (20, 3), (22, 64)] {
                let x: Vec<f32> = finite.iter().copied().take((hidden * rows) as usize).collect();
                let identity: Vec<f32> =
                    (0..hidden * hidden).map(|i| f32::from(i / hidden == i % hidden)).collect();
                let tokens = x.len() as u32 / hidden; // f16 has fewer finite values
                let x = &x[..(tokens * hidden) as usize];
                let (buffer, weights) = (buffer_of(&gpu, float_type, x), gpu.upload(&identity));
                let out = Output::f32s(&gpu, x.len());
                let args = logits::Args {
                    x: Floats::new(&buffer, float_type),
                    weights: (&weights).into(),
                    logits: out.slice(),
                };
                let op = Logits::new(&ctx, hidden, hidden).unwrap();
                run(&gpu, &op.bind(&logits::Dims { tokens }, args).unwrap());
                for (got, &want) in out.get::<f32>(&gpu).into_iter().zip(x) {
                    // What a device may flush: f16 subnormals, and those of f32.
                    let least = match float_type {
                        FloatType::F16 => f32::from_bits(0x3880_0000),
                        _ => f32::MIN_POSITIVE,
                    };
                    let flushed = want.abs() < least && got == 0.0;
                    let what = format!("{} {float_type:?} D {hidden}", variant_name(&ctx));
                    assert!(got == want || flushed, "{what}: {got:e}, want {want:e}");
                }
            }
        }
    }
}

/// What is no number, read as a residual, stays what it is.
#[test]
fn infinities_and_nan_are_widened() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    for float_type in HALVES {
        let odd = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1.0];
        let (shape, plan) = one_each(1);
        let (y, plan) = (gpu.upload(&[0f32; 4]), gpu.upload(&plan));
        let out = Output::holding(&gpu, &float_type.encode(&odd));
        let args = combine::Args {
            y: (&y).into(),
            plan: (&plan).into(),
            out: Floats::new(out.slice(), float_type),
            columns: 0..4,
            hidden: 4,
            add: true,
        };
        run(&gpu, &Combine::new(&ctx).unwrap().bind(&shape, args).unwrap());
        let got = float_type.decode(&out.get::<u8>(&gpu));
        assert_same(&exact(&got), &exact(&odd), float_type.name());
    }
}

fn config(hidden: u32, intermediate: u32) -> LayerConfig {
    let rule = TokenChoice::new(3).with_score(Score::Sigmoid).with_scale(2.5);
    let rule = rule.with_coreset(BlockRule::mass(0.6).with_floor(4));
    LayerConfig::new(hidden, intermediate, 12, Routing::TokenChoice(rule)).with_shared_experts(1)
}

/// Hidden states that halves hold.
fn hidden_states(float_type: FloatType, len: usize) -> Vec<f32> {
    random(3, len).into_iter().map(|v| value_of(float_type, bits_of(float_type, v))).collect()
}

/// What a layer makes, as bytes of the type of `out`; added to a residual where there is one.
fn output(
    gpu: &Gpu,
    layer: &MoeLayer,
    hidden: Floats<'_>,
    tokens: u32,
    (float_type, residual): (FloatType, Option<&[f32]>),
) -> Vec<u8> {
    let values = vec![f32::NAN; (tokens * layer.config().hidden) as usize];
    let before = float_type.encode(residual.unwrap_or(&values));
    let out = Output::holding(gpu, &before);
    let floats = Floats::new(out.slice(), float_type);
    let batch = Batch::new(hidden, tokens);
    let batch = if residual.is_some() { batch.added_to(floats) } else { batch.into_out(floats) };
    gpu.run_layer(&layer.bind(&batch).unwrap()).unwrap();
    out.get(gpu)
}

/// Halves in and out of a layer give the bits of one in f32, rounded; and what the twin gives.
fn check(
    gpu: &Gpu,
    layer: &MoeLayer,
    host: &HostLayer,
    [of_hidden, of_out]: [FloatType; 2],
    tokens: u32,
) {
    let what = variant_name(layer.context());
    let what = format!("{what} {:?} {of_hidden:?} {of_out:?} T {tokens}", host.config);
    let len = (tokens * host.config.hidden) as usize;
    let x = hidden_states(of_hidden, len);
    let (own, f32s) = (buffer_of(gpu, of_hidden, &x), gpu.upload(&x));
    let own = Floats::new(&own, of_hidden);
    let residual = hidden_states(of_out, len);
    for residual in [None, Some(&residual[..])] {
        let want = output(gpu, layer, (&f32s).into(), tokens, (FloatType::F32, residual));
        let got = output(gpu, layer, own, tokens, (of_out, residual));
        assert_same(&got, &of_out.encode(&FloatType::F32.decode(&want)), &what);
    }
    let got = of_out.decode(&output(gpu, layer, own, tokens, (of_out, None)));
    let step = match of_out {
        FloatType::F32 => 0.0,
        FloatType::F16 => 1.0 / 1024.0,
        FloatType::Bf16 => 1.0 / 128.0,
    };
    let want = of_out.decode(&of_out.encode(&host.twin(&x)));
    assert_close(&got, &want, 2e-5 * largest(&want), 2e-5 + step, &what);
    // One step of a half is allowed, few take it.
    let same = got.iter().zip(&want).filter(|(a, b)| a == b).count();
    assert!(of_out == FloatType::F32 || same * 10 >= len * 9, "{what}: {same} of {len} equal");
}

/// Rows of whole words of eight, four and two halves, on weights of floats and of blocks.
#[test]
fn layers_equal_those_of_f32() {
    let Some(gpu) = gpu() else { return };
    let [f16, bf16] = HALVES;
    let f32 = FloatType::F32;
    let cases: [(_, _, &[_], &[_]); 3] = [
        (config(64, 24), WeightType::Bf16, &[[f16, f16], [bf16, bf16], [f16, f32]], &[5, 70]),
        (config(36, 20), WeightType::F32, &[[f16, bf16]], &[70]),
        (config(34, 10), WeightType::Q8_0, &[[bf16, f16]], &[70]),
    ];
    // A software driver takes seconds to compile a matmul: each target as this device would run it.
    for target in [Target::Wide, Target::Serial] {
        let best = contexts(&gpu).into_iter().rfind(|ctx| ctx.variant().target == target);
        let ctx = best.expect("a context of every target");
        for (config, weight_type, types, tokens) in cases {
            let host = HostLayer::new(config);
            let layer = host.layer_as(&ctx, &gpu.queue, weight_type, None).unwrap();
            let host = host.stored_as(weight_type);
            for &types in types {
                tokens.iter().for_each(|&tokens| check(&gpu, &layer, &host, types, tokens));
            }
        }
    }
}

#[test]
fn a_cached_layer_equals_one_of_f32() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let (host, tokens) = (HostLayer::new(config(64, 24)), 40);
    let resident = host.layer_as(&ctx, &gpu.queue, WeightType::Bf16, None).unwrap();
    let x = hidden_states(FloatType::Bf16, tokens as usize * 64);
    let want = output(&gpu, &resident, (&gpu.upload(&x)).into(), tokens, (FloatType::F32, None));
    let options = CacheOptions::new(resident.weights().bytes() / 2);
    let router = host.router(&ctx).unwrap();
    let source = std::sync::Arc::new(host.clone());
    let mut cached =
        CachedLayer::new(&ctx, &gpu.queue, host.config, router, source, options).unwrap();
    let hidden = buffer_of(&gpu, FloatType::Bf16, &x);
    let out = Output::u32s(&gpu, x.len() / 2);
    let batch = Batch::new(Floats::bf16(&hidden), tokens).into_out(Floats::f16(out.slice()));
    let mut step = cached.bind(&batch).unwrap();
    cached.run(&gpu.queue, &mut step).unwrap();
    assert_same(
        &out.get::<u8>(&gpu),
        &FloatType::F16.encode(&FloatType::F32.decode(&want)),
        "cached",
    );
}

#[test]
fn rows_are_gathered_as_they_are() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu).into_iter().filter(|ctx| !ctx.variant().subgroups) {
        let op = Gather::new(&ctx).unwrap();
        for hidden in [2, 6, 40, 64] {
            let x = random(5, 7 * hidden);
            let token_of = [6u32, 0, 7, 2];
            let buffer = buffer_of(&gpu, FloatType::F16, &x);
            let (list, out) = (gpu.upload(&token_of), Output::u32s(&gpu, 4 * hidden / 2));
            let x_in = Floats::f16(&buffer);
            let args = gather::Args { x: x_in, token_of: (&list).into(), out: out.slice() };
            let dims = gather::Dims { tokens: 7, slots: 4, hidden: hidden as u32 };
            run(&gpu, &op.bind(&dims, args).unwrap());
            let want = FloatType::F16.encode(&gather::cpu(&x, hidden, &token_of));
            assert_same(&out.get::<u8>(&gpu), &want, &format!("{} {hidden}", variant_name(&ctx)));
        }
    }
}

#[test]
fn what_halves_cannot_be() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let layer = |config| HostLayer::new(config).layer(&ctx, &gpu.queue).unwrap();
    let (buffer, other) = (gpu.upload(&[0u32; 256]), gpu.upload(&[0u32; 256]));
    let bytes = |buffer, bytes| Slice::new(buffer, 0, bytes);

    // Rows of no whole words.
    let batch =
        Batch::new(Floats::f16(bytes(&buffer, 4 * 33 * 2)), 4).into_out(bytes(&other, 4 * 33 * 4));
    let e = layer(config(33, 8)).bind(&batch).unwrap_err();
    assert_eq!(e.to_string(), "`hidden`: rows of 33 f16 are no whole 32-bit words");

    // The size of another type.
    let layer = layer(config(32, 8));
    let batch = Batch::new(bytes(&buffer, 512), 4).into_out(Floats::bf16(bytes(&other, 512)));
    let e = layer.bind(&batch).unwrap_err();
    assert_eq!(e.to_string(), "`out`: expected 256 bytes, [4, 32] bf16, got 512");

    // Half of a word of a row.
    let (shape, plan) = one_each(4);
    let plan = gpu.upload(&plan);
    let args = combine::Args {
        y: bytes(&buffer, 4 * 3 * 4),
        plan: (&plan).into(),
        out: Floats::f16(bytes(&other, 4 * 8 * 2)),
        columns: 0..3,
        hidden: 8,
        add: false,
    };
    let e = Combine::new(&ctx).unwrap().bind(&shape, args).unwrap_err();
    assert!(matches!(e, Error::Invalid { name: "columns", .. }), "{e}");
}
