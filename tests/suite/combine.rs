use testkit::{cases, prelude::*};
use wgmoe::ops::combine::{Args, Combine, cpu};
use wgmoe::plan::HostPlan;
use wgmoe::plan::bits;
use wgmoe::{Context, Gpu, PlanShape};

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
    shape: &PlanShape,
    plan: &HostPlan,
    [hidden, start, end]: [usize; 3],
    add: bool,
) {
    let (slots, tokens, columns) =
        (shape.slots().unwrap() as usize, shape.tokens as usize, end - start);
    let what = format!("{} T {tokens} D {hidden} {start}..{end} add {add}", variant_name(ctx));
    let y = cases::values("random", 4, slots * columns);
    let before = if add {
        cases::values("random", 5, tokens * hidden)
    } else {
        vec![f32::NAN; tokens * hidden]
    };
    let out = Output::holding(gpu, &before);
    let (y_buffer, plan_buffer) = (gpu.upload(&y), gpu.upload(&words(shape, plan)));
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
    let want = cpu(plan, &y, columns, residual.as_deref());
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
                [24, 8, 20],
                [24, 9, 10],
                [7, 3, 7],
            ] {
                for add in [false, true] {
                    check(&gpu, &ctx, &shape, &plan, columns, add);
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
            check(&gpu, &ctx, &shape, &plan, [8, 0, 8], false);
        }
    }
}

#[test]
fn many_rows() {
    let Some(gpu) = gpu() else { return };
    // The op has one layout for all variants.
    let ctx = &contexts(&gpu)[0];
    let (shape, plan) = plan_of(600_000, 3, 0, 0);
    check(&gpu, ctx, &shape, &plan, [16, 0, 16], false);
    check(&gpu, ctx, &shape, &plan, [16, 0, 16], true);
}
