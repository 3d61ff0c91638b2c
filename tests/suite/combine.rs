use testkit::{cases, prelude::*};
use wgmoe::ops::combine::{Args, Combine, cpu, cpu_sum};
use wgmoe::plan::HostPlan;
use wgmoe::plan::bits;
use wgmoe::{Context, FloatType, Floats, Gpu, PlanShape, Slice};

/// The words of a plan: the sections that the kernel reads, the rest poison.
pub(crate) fn words(shape: &PlanShape, plan: &HostPlan) -> Vec<u32> {
    let at = shape.sections().unwrap();
    let mut words = vec![u32::MAX; at.words as usize];
    let mut put =
        |first: u32, what: &[u32]| words[first as usize..][..what.len()].copy_from_slice(what);
    put(at.token_offsets, &plan.token_offsets);
    put(at.slot_of, &plan.slot_of);
    put(at.gate_of, &plan.gate_of.iter().map(|g| g.to_bits()).collect::<Vec<_>>());
    words
}

/// A plan in which each token has one to three experts.
fn plan_of(
    tokens: usize,
    experts: usize,
    shared_experts: u32,
    short: u32,
) -> (PlanShape, HostPlan) {
    let mut assigned = bits::empty(tokens, experts);
    let mut routed = 0;
    for t in 0..tokens {
        for i in 0..t % 4 {
            let e = (t * 31 + i * 7) % experts;
            routed += u32::from(!bits::get(&assigned, tokens, e, t));
            bits::set(&mut assigned, tokens, e, t);
        }
    }
    let shape = PlanShape::on_host(tokens as u32, experts as u32, routed.saturating_sub(short))
        .with_item_rows(16, 0)
        .with_shared_experts(shared_experts);
    let gates = cases::values("random", 3, tokens * experts);
    let plan = HostPlan::cpu(&shape, &assigned, &gates);
    (shape, plan)
}

fn check(
    gpu: &Gpu,
    ctx: &Context,
    (shape, plan): (&PlanShape, &HostPlan),
    columns: [usize; 3],
    add: bool,
) {
    let [_, start, end] = columns;
    let y = cases::values("random", 4, shape.slots().unwrap() as usize * (end - start));
    check_of(gpu, ctx, (shape, plan), columns, add, &y);
}

/// The columns `start..end` of rows of `hidden`, which `y` has for all slots.
fn check_of(
    gpu: &Gpu,
    ctx: &Context,
    (shape, plan): (&PlanShape, &HostPlan),
    [hidden, start, end]: [usize; 3],
    add: bool,
    y: &[f32],
) {
    let (tokens, columns) = (shape.tokens as usize, end - start);
    let what = format!("{} T {tokens} D {hidden} {start}..{end} add {add}", variant_name(ctx));
    let before = if add {
        cases::values("random", 5, tokens * hidden)
    } else {
        vec![f32::NAN; tokens * hidden]
    };
    let out = Output::holding(gpu, &before);
    let (y_buffer, plan_buffer) = (gpu.upload(y), gpu.upload(&words(shape, plan)));
    let args = Args {
        y: (&y_buffer).into(),
        plan: (&plan_buffer).into(),
        out: out.slice().into(),
        columns: start as u32..end as u32,
        hidden: hidden as u32,
        add,
    };
    run(gpu, &Combine::new(ctx).unwrap().bind(shape, args).unwrap());
    let got: Vec<f32> = out.get(gpu);
    let part = |of: &[f32]| -> Vec<f32> {
        of.chunks_exact(hidden).flat_map(|row| row[start..end].to_vec()).collect()
    };
    let residual = add.then(|| part(&before));
    let want = cpu(plan, y, columns, residual.as_deref());
    // A few f32 additions of terms up to 36.
    assert_close(&part(&got), &want, 2e-5, 1e-5, &what);
    let others = |of: &[f32]| -> Vec<f32> {
        of.chunks_exact(hidden).flat_map(|row| [&row[..start], &row[end..]].concat()).collect()
    };
    assert_same(&exact(&others(&got)), &exact(&others(&before)), &format!("{what}: other columns"));
}

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for (tokens, experts, shared_experts) in [(2, 1, 0), (33, 5, 1), (100, 40, 2), (257, 96, 0)]
        {
            let (shape, plan) = plan_of(tokens, experts, shared_experts, 0);
            for columns in [
                [1, 0, 1],
                [5, 0, 5],
                [64, 0, 64],
                [1030, 0, 1030],
                // On GPUs several groups a row, the last one with few lanes at work.
                [260, 0, 260],
                [520, 4, 516],
                [24, 8, 20],
                [24, 9, 10],
                [7, 3, 7],
            ] {
                for add in [false, true] {
                    check(&gpu, &ctx, (&shape, &plan), columns, add);
                }
            }
        }
    }
}

#[test]
fn slots_cut_off_add_nothing() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for short in [1, 20, 10_000] {
            let (shape, plan) = plan_of(70, 12, 1, short);
            check(&gpu, &ctx, (&shape, &plan), [8, 0, 8], false);
        }
    }
}

/// Rows of more vectors than a workgroup takes, the last one with few lanes at work; windows of columns that 64-bit vectors
/// fit, and do not.
#[test]
fn wide_rows() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        let (shape, plan) = plan_of(5, 4, 1, 0);
        for columns in [[4120, 0, 4120], [4144, 8, 4128], [4144, 4, 4140], [8208, 0, 8200]] {
            for add in [false, true] {
                check(&gpu, &ctx, (&shape, &plan), columns, add);
            }
        }
    }
}

/// A token of very many experts: 64 vectors of a row, one after the other, would be too long a loop for software drivers.
/// With 1,056 experts a lane's loops are as long as they may be.
#[test]
fn tokens_of_all_experts() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (2, 1024);
    let mut assigned = bits::empty(tokens, experts);
    (0..experts).for_each(|e| bits::set(&mut assigned, tokens, e, 1));
    for shared_experts in [32, 1024] {
        let shape = PlanShape::on_host(tokens as u32, experts as u32, experts as u32)
            .with_item_rows(16, 0)
            .with_shared_experts(shared_experts);
        let plan = HostPlan::cpu(&shape, &assigned, &vec![1.0; tokens * experts]);
        // Sums of so many terms are the same in any order where all are small integers.
        let y = shape.slots().unwrap() as usize * 4096;
        let y: Vec<f32> = (0..y).map(|i| (i * 7 % 31) as f32).collect();
        for ctx in contexts(&gpu) {
            check_of(&gpu, &ctx, (&shape, &plan), [4096, 0, 4096], false, &y);
        }
    }
}

#[test]
fn many_rows() {
    let Some(gpu) = gpu() else { return };
    let (shape, plan) = plan_of(600_000, 3, 0, 0);
    // Subgroups are not used.
    for ctx in contexts(&gpu).iter().filter(|ctx| !ctx.variant().subgroups) {
        check(&gpu, ctx, (&shape, &plan), [16, 0, 16], false);
        check(&gpu, ctx, (&shape, &plan), [16, 0, 16], true);
    }
}

/// Sums without gates, and the residual beside them.
#[test]
fn sums_equal_twin() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for (tokens, hidden) in [(2, 1), (33, 18), (33, 20), (100, 64), (3, 4120)] {
            let (shape, plan) = plan_of(tokens, 12, 1, 3);
            let y = cases::values("random", 4, shape.slots().unwrap() as usize * hidden);
            let [rest, before] = [6, 7].map(|seed| cases::values("random", seed, tokens * hidden));
            let [y_in, rest_in] = [&y, &rest].map(|v| gpu.upload(v));
            let plan_in = gpu.upload(&words(&shape, &plan));
            for (residual, add) in [(false, false), (true, false), (true, true)] {
                let start = if add { before.clone() } else { vec![f32::NAN; before.len()] };
                let out = Output::holding(&gpu, &start);
                let args = Args {
                    y: (&y_in).into(),
                    plan: (&plan_in).into(),
                    out: out.slice().into(),
                    columns: 0..hidden as u32,
                    hidden: hidden as u32,
                    add,
                };
                let op = Combine::new(&ctx).unwrap();
                let of = residual.then_some((&rest_in).into());
                run(&gpu, &op.bind_sum(&shape, args, of).unwrap());
                let mut want = cpu_sum(&plan, &y, hidden, residual.then_some(&rest[..]));
                if add {
                    want.iter_mut().zip(&before).for_each(|(sum, before)| *sum += before);
                }
                let what = format!("{} D {hidden} {residual} {add}", variant_name(&ctx));
                assert_close(&out.get::<f32>(&gpu), &want, 2e-5, 1e-5, &what);
            }
        }
    }
}

#[test]
fn residuals_that_do_not_fit_are_named() {
    let Some(gpu) = gpu() else { return };
    let (shape, plan) = plan_of(10, 3, 0, 0);
    let plan_in = gpu.upload(&words(&shape, &plan));
    let y = gpu.upload(&vec![0f32; 4 * shape.slots().unwrap() as usize]);
    let [out, rest] = [40, 39].map(|n| gpu.upload(&vec![0f32; n]));
    let op = Combine::new(&contexts(&gpu)[0]).unwrap();
    let args = |out| Args {
        y: (&y).into(),
        plan: (&plan_in).into(),
        out,
        columns: 0..4,
        hidden: 4,
        add: false,
    };
    let error = op.bind_sum(&shape, args((&out).into()), Some((&rest).into())).unwrap_err();
    assert_eq!(error.to_string(), "`residual`: expected 160 bytes, [10, 4] f32, got 156");
    let half = Floats::new(Slice::new(&out, 0, 80), FloatType::F16);
    let error = op.bind_sum(&shape, args(half), Some((&out).into())).unwrap_err();
    assert_eq!(error.to_string(), "`residual`: beside an output of f16");
}
