//! The plan of an assignment, compared with the twin.
use super::numbers::{SCORES, fill};
use crate::compare::close;
use wgmoe::ops::plan_count::{self, Gates, PlanCount, Scales};
use wgmoe::ops::plan_fill::{self, PlanFill};
use wgmoe::ops::plan_scan::{self, PlanScan};
use wgmoe::ops::token_choice;
use wgmoe::plan::HostPlan;
use wgmoe::plan::Stats;
use wgmoe::routing::GateRule;
use wgmoe::{BoundOp, Context, Gpu, PlanShape, wgpu};

/// A plan on the device, its three kernels, and what it holds.
pub struct Planned {
    pub shape: PlanShape,
    pub plan: wgpu::Buffer,
    pub step: BoundOp,
    pub host: HostPlan,
}

/// Makes the plan of an assignment, gates from logits; compared whole.
pub fn plan(
    gpu: &Gpu,
    ctx: &Context,
    [tokens, experts]: [u32; 2],
    logits: &[f32],
    assigned: &[u32],
) -> Result<Planned, String> {
    let say = |e: wgmoe::Error| e.to_string();
    let slots: u32 = assigned.iter().map(|w| w.count_ones()).sum();
    let shape = PlanShape::new(ctx, tokens, experts, slots);
    let (assigned_in, logits_in) = (gpu.upload(assigned), gpu.upload(logits));
    let gates = gpu.upload(&vec![0f32; logits.len()]);
    let plan = gpu.upload(&vec![u32::MAX; (shape.bytes().map_err(say)? / 4) as usize]);
    let stats = gpu.upload(&vec![u32::MAX; 8 + experts as usize]);
    let scales = Scales { scale_by_count: None, scale_by_expert: None };
    let how = Gates {
        rule: GateRule::Softmax,
        source: (&logits_in).into(),
        scale: 1.0,
        scales: Scales { scale_by_count: None, scale_by_expert: None },
        gates: (&gates).into(),
    };
    let count = plan_count::Args {
        assigned: (&assigned_in).into(),
        gates: Some(how),
        plan: (&plan).into(),
    };
    let scan = plan_scan::Args {
        lost: None,
        offsets: None,
        plan: (&plan).into(),
        stats: (&stats).into(),
        add_stats: false,
    };
    let fill = plan_fill::Args {
        assigned: (&assigned_in).into(),
        gates: (&gates).into(),
        plan: (&plan).into(),
    };
    let step = PlanCount::new(ctx).and_then(|op| op.bind(&shape, count)).map_err(say)?;
    let step = step.then(PlanScan::new(ctx).and_then(|op| op.bind(&shape, scan)).map_err(say)?);
    let step = step.then(PlanFill::new(ctx).and_then(|op| op.bind(&shape, fill)).map_err(say)?);
    gpu.run(&step).map_err(say)?;
    let got: Vec<f32> = gpu.download(&gates).map_err(say)?;
    let want = plan_count::cpu(assigned, logits, experts as usize, GateRule::Softmax, 1.0, scales);
    close(&got, &want, 1e-30, 1e-5, "gates")?;
    let words: Vec<u32> = gpu.download(&plan).map_err(say)?;
    let host = HostPlan::from_words(&shape, &words).map_err(say)?;
    if host != HostPlan::cpu(&shape, assigned, &got) {
        return Err("the plan differs".into());
    }
    let stats: Vec<u32> = gpu.download(&stats).map_err(say)?;
    let stats = Stats::from_words(&stats).map_err(say)?;
    if (stats.slots, stats.ignored) != (slots, 0) {
        return Err(format!("statistics: {stats:?}"));
    }
    Ok(Planned { shape, plan, step, host })
}

/// Logits `[tokens, experts]`, and the bit set of each token's top `top`.
pub fn chosen(tokens: u32, experts: u32, top: u32) -> (Vec<f32>, Vec<u32>) {
    let logits = fill(SCORES, tokens * experts, 8.0);
    let assigned = token_choice::cpu(&logits, experts as usize, top as usize, None, &|_, _| true);
    (logits, assigned)
}
