//! The pre-activation that training keeps, what is made of it, and the way back, against the twins.
use testkit::compare::{close, exact, largest, same};
use testkit::layer::stored;
use testkit::prelude::{Output, contexts, gpu, random, run, variant_name};
use testkit::works::plan;
use wgmoe::device::FloatType;
use wgmoe::ops::activation::{self, Activate};
use wgmoe::ops::activation_gradient::{self, ActivationGradient, cpu_slope};
use wgmoe::ops::grouped_matmul::{Args, GroupedMatmul, Rows, Stage, activate, cpu_row};
use wgmoe::plan::bits;
use wgmoe::weights::{ExpertShape, HostWeights, Projection};
use wgmoe::{Activation, ExpertWeights, Floats, WeightType};

const ROWS: [usize; 5] = [0, 1, 9, 19, 61];
const TOKENS: usize = 61;
const BOTH: [Activation; 2] = [Activation::Silu, Activation::Gelu];

fn assigned() -> Vec<u32> {
    let mut words = bits::empty(TOKENS, ROWS.len());
    for (e, rows) in ROWS.into_iter().enumerate() {
        for i in 0..rows {
            bits::set(&mut words, TOKENS, e, (e * 7 + i * 3) % TOKENS);
        }
    }
    words
}

/// `z` by both halves, in pages of all kinds, by rows of any type; then `h`.
#[test]
fn the_pre_activation_is_kept() {
    let Some(gpu) = gpu() else { return };
    let logits = random(5, TOKENS * ROWS.len());
    for ctx in contexts(&gpu) {
        let dims = [TOKENS as u32, ROWS.len() as u32];
        let planned = plan(&gpu, &ctx, dims, &logits, &assigned()).unwrap();
        let slots = planned.host.token_of.len();
        for ([d, f], x_type, weight_type, share) in [
            ([136, 72], FloatType::F32, WeightType::F32, 1),
            ([136, 72], FloatType::Bf16, WeightType::Bf16, 8),
            ([138, 41], FloatType::F32, WeightType::Bf16, 1),
            ([264, 96], FloatType::F32, WeightType::Q4_K, 12),
        ] {
            let shape = ExpertShape::new(ROWS.len() as u32, d, f, weight_type);
            let limit = (10 * shape.device_bytes() / share).max(32 * 1024);
            let weights = ExpertWeights::with_page_limit(&ctx, shape, limit).unwrap();
            let size = (d * f) as usize;
            let mut host = vec![];
            for e in 0..shape.experts {
                host.push([Projection::Gate, Projection::Up].map(|p| {
                    let values = random(u64::from(2 * e) + p as u64, size);
                    weights.write(&gpu.queue, e, p, HostWeights::F32(&values)).unwrap();
                    stored(&values, d, weight_type)
                }));
            }
            let x = random(1, TOKENS * d as usize);
            let bytes = x_type.encode(&x);
            let x = x_type.decode(&bytes);
            let x_in = gpu.upload(&bytes);
            let width = f as usize;
            let z = Output::f32s(&gpu, slots * 2 * width);
            for stage in [Stage::Gate, Stage::Up] {
                let args = Args {
                    x: Rows::Tokens(Floats::new(&x_in, x_type)),
                    plan: (&planned.plan).into(),
                    weights: &weights,
                    places: None,
                    out: z.slice().into(),
                    slots: 0..slots as u32,
                    columns: 0..f,
                };
                let op = GroupedMatmul::new(&ctx, &shape, stage).unwrap();
                run(&gpu, &op.bind(&planned.shape, args).unwrap());
            }
            let got: Vec<f32> = z.get(&gpu);
            let what = format!("{} {shape:?}", variant_name(&ctx));
            for e in 0..ROWS.len() {
                let offsets = &planned.host.expert_offsets;
                for s in offsets[e] as usize..offsets[e + 1] as usize {
                    let token = planned.host.token_of[s] as usize;
                    let x = &x[token * d as usize..][..d as usize];
                    let halves = host[e].iter().flat_map(|w| cpu_row(x, &|i| w[i], width));
                    let want: Vec<f32> = halves.map(|v| v as f32).collect();
                    let got = &got[s * 2 * width..][..2 * width];
                    let of = format!("{what}: slot {s}");
                    close(got, &want, 2e-5 * largest(&want), 2e-5, &of).unwrap();
                }
            }
            for by in BOTH {
                let h = Output::f32s(&gpu, slots * width);
                let (z, plan) = (z.slice(), (&planned.plan).into());
                let args = activation::Args { z, plan, h: h.slice(), intermediate: f };
                run(&gpu, &Activate::new(&ctx, by).unwrap().bind(&planned.shape, args).unwrap());
                let want = activation::cpu(&got, width, by);
                close(&h.get::<f32>(&gpu), &want, 1e-6, 2e-5, &format!("{what}: h")).unwrap();
            }
        }
    }
}

/// Values of every size; rows past those that the plan holds are left alone; equal bits twice.
#[test]
fn the_way_back_through_the_activation() {
    let Some(gpu) = gpu() else { return };
    let logits = random(5, TOKENS * ROWS.len());
    for ctx in contexts(&gpu) {
        let dims = [TOKENS as u32, ROWS.len() as u32];
        let planned = plan(&gpu, &ctx, dims, &logits, &assigned()).unwrap();
        let held = planned.host.token_of.len();
        for (f, by) in [1, 7, 8, 130, 300].into_iter().flat_map(|f| BOTH.map(|by| (f, by))) {
            let z: Vec<f32> = random(1, held * 2 * f).iter().map(|v| 8.0 * v).collect();
            let da = random(2, held * f);
            let dz: Vec<f32> = da
                .chunks_exact(f)
                .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(f32::NAN, f)))
                .collect();
            let z_in = gpu.upload(&z);
            let op = ActivationGradient::new(&ctx, by).unwrap();
            let once = || {
                let dz = Output::holding(&gpu, &dz);
                let [hg, dgate] = [held * f, held].map(|n| Output::f32s(&gpu, n));
                let args = activation_gradient::Args {
                    z: (&z_in).into(),
                    plan: (&planned.plan).into(),
                    dz: dz.slice(),
                    hg: hg.slice(),
                    dgate: dgate.slice(),
                    intermediate: f as u32,
                };
                run(&gpu, &op.bind(&planned.shape, args).unwrap());
                [dz, hg, dgate].map(|out| out.get::<f32>(&gpu))
            };
            let got = once();
            let want = activation_gradient::cpu(&z, &planned.host.gate_of, &da, by);
            let what = format!("{} F {f} {by:?}", variant_name(&ctx));
            for (got, want) in got.iter().zip([&want.dz, &want.hg, &want.dgate]) {
                close(got, want, 2e-6 * largest(want), 5e-5, &what).unwrap();
            }
            for (again, first) in once().iter().zip(&got) {
                same(&exact(again), &exact(first), &format!("{what}: again")).unwrap();
            }
        }
    }
}

/// A plan with room for more slots than it holds: what is past them is left alone. NaN goes through.
#[test]
fn slots_that_are_not_there_are_left_alone() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        let shape = wgmoe::PlanShape::on_host(3, 2, 6);
        let assigned = bits::from_lists(3, &[vec![0, 2], vec![2]]);
        let gates = [1.0, 0.0, 0.0, 0.0, 0.25, 0.75];
        let host = wgmoe::plan::HostPlan::cpu(&shape, &assigned, &gates);
        let plan = gpu.upload(&host.to_words(&shape).unwrap());
        let f = 5;
        let mut z = random(1, 6 * 2 * f);
        z[2 * f + 1] = f32::NAN;
        let z_in = gpu.upload(&z);
        let da = random(2, 6 * 2 * f);
        let dz = Output::holding(&gpu, &da);
        let [hg, h] = [0; 2].map(|_| Output::f32s(&gpu, 6 * f));
        let dgate = Output::f32s(&gpu, 6);
        let (z, plan, intermediate) = ((&z_in).into(), (&plan).into(), f as u32);
        let args = activation_gradient::Args {
            z,
            plan,
            dz: dz.slice(),
            hg: hg.slice(),
            dgate: dgate.slice(),
            intermediate,
        };
        let op = ActivationGradient::new(&ctx, Activation::Silu).unwrap();
        run(&gpu, &op.bind(&shape, args).unwrap());
        let args = activation::Args { z, plan, h: h.slice(), intermediate };
        let op = Activate::new(&ctx, Activation::Silu).unwrap();
        run(&gpu, &op.bind(&shape, args).unwrap());
        let [dz, hg, dgate, h] = [&dz, &hg, &dgate, &h].map(|out| out.get::<f32>(&gpu));
        let what = variant_name(&ctx);
        assert_eq!(dz[3 * 2 * f..], da[3 * 2 * f..], "{what}");
        for rows in [&hg[3 * f..], &dgate[3..], &h[3 * f..]] {
            assert!(rows.iter().all(|v| v.is_nan()), "{what}");
        }
        let nan = |values: &[f32]| values.iter().filter(|v| v.is_nan()).count();
        let made = [nan(&dz[..6 * f]), nan(&hg[..3 * f]), nan(&dgate[..3]), nan(&h[..3 * f])];
        assert_eq!(made, [2, 1, 1, 1], "{what}: one value of one slot, and its gate");
    }
}

/// The twin's slope is that of the twin's activation.
#[test]
fn slopes_are_those_of_the_activations() {
    for by in BOTH {
        for i in -400..=400 {
            let v = f64::from(i) / 50.0;
            let step = 1e-5;
            let rise = activate(by, v + step, 1.0) - activate(by, v - step, 1.0);
            let [value, slope] = cpu_slope(by, v);
            assert!((value - activate(by, v, 1.0)).abs() < 1e-12, "{by:?} {v}");
            assert!((slope - rise / (2.0 * step)).abs() < 1e-8, "{by:?} {v}: {slope}");
        }
    }
}
