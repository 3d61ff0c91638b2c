//! Recorded gradients of layers: every tensor of a forward and a backward pass.
use super::kinds::{Outcome, Report, dense, lists};
use testkit::compare::{close, same, worst};
use testkit::golden::{ATOL, File, Forward, Gradient, How, OnGpu, RTOL};
use testkit::prelude::{contexts, exact, variant_name};
use wgmoe::Gpu;
use wgmoe::layer::HostGradients;
use wgmoe::plan::bits;

/// What the forward pass made, beside what was recorded of it.
fn compare_forward(what: &str, file: &File, case: &Gradient, got: &Forward) -> Outcome {
    let (t, e) = (case.tokens as usize, case.host.config.experts as usize);
    let near = |name: &str, got: &[f32]| {
        close(got, &file.f32s(name)?, ATOL, RTOL, &format!("{what}: `{name}`"))
    };
    near("logits", &got.logits)?;
    let selected = dense(&got.routing.assigned, t, e);
    same(&selected, &file.flags("selected")?, &format!("{what}: `selected`"))?;
    near("gates", &got.routing.gates)?;
    near("y", &got.out)?;
    if file.has("experts") {
        let (ids, weights) = lists(file, [t, e, file.size("experts_per_token")?])?;
        same(&selected, &ids, &format!("{what}: `experts`"))?;
        close(&got.routing.gates, &weights, ATOL, RTOL, &format!("{what}: `weights`"))?;
    }
    if file.has("coreset") {
        let members = got.routing.coreset.as_deref().ok_or("no coreset")?;
        let words = e.div_ceil(32);
        let of_block = |row: &[u32]| -> Vec<bool> {
            (0..e).map(|e| row[e / 32] >> (e % 32) & 1 == 1).collect()
        };
        let coreset: Vec<bool> = members.chunks(words).flat_map(of_block).collect();
        same(&coreset, &file.flags("coreset")?, &format!("{what}: `coreset`"))?;
    }
    if file.has("tokens_per_expert_before_drop") {
        let counts: Vec<u32> =
            (0..e).map(|e| bits::tokens_of(&got.routing.chosen, t, e).len() as u32).collect();
        let want = file.u32s("tokens_per_expert_before_drop")?;
        same(&counts, &want, &format!("{what}: tokens of experts before the drop"))?;
    }
    Ok(())
}

/// Every gradient.
fn compare_gradients(what: &str, got: &HostGradients, want: &HostGradients) -> Outcome {
    let near = |name: &str, got: &[f32], want: &[f32]| {
        close(got, want, ATOL, RTOL, &format!("{what}: {name}"))
    };
    near("d_gates", &got.gates, &want.gates)?;
    near("d_logits", &got.logits, &want.logits)?;
    near("d_router_weight", &got.router, &want.router)?;
    same(&[got.experts.len()], &[want.experts.len()], what)?;
    for (e, (got, want)) in got.experts.iter().zip(&want.experts).enumerate() {
        for (name, (got, want)) in ["gate", "up", "down"].iter().zip(got.iter().zip(want)) {
            near(&format!("d_{name}_proj of expert {e}"), got, want)?;
        }
    }
    near("dx", &got.hidden, &want.hidden)
}

/// Every gradient and the output, bit for bit.
fn bits_of(got: &OnGpu) -> Vec<u32> {
    let HostGradients { hidden, router, experts, logits, .. } = &got.gradients;
    let experts = experts.iter().flatten();
    [&got.out, hidden, router, logits].into_iter().chain(experts).flat_map(|v| exact(v)).collect()
}

pub(super) fn gradient(file: &File, gpu: Option<&Gpu>, report: &mut Report) -> Outcome {
    let case = Gradient::read(file)?.ok_or("no gradients")?;
    let forward = case.forward();
    compare_forward("twins", file, &case, &forward)?;
    let want = case.recorded(file)?;
    compare_gradients("twins", &case.backward(&forward), &want)?;
    let Some(gpu) = gpu else { return Ok(()) };
    let want_out = file.f32s("y")?;
    // Two experts a page, and pieces of one expert.
    let [d, f] = [case.host.config.hidden, case.host.config.intermediate].map(u64::from);
    let (panel, expert) = (4 * 32 * d.max(f).next_multiple_of(4), 4 * d * f);
    let some = (2 * expert).max(panel);
    for ctx in contexts(gpu) {
        for (page_limit, recompute_z) in [(None, false), (Some(some), true), (Some(panel), false)] {
            let what = format!("{}, pages of {page_limit:?}, {recompute_z}", variant_name(&ctx));
            let how = How { page_limit, recompute_z };
            let both = case.on_gpu(gpu, &ctx, how).map_err(|e| format!("{what}: {e}"))?;
            let [got, again] = both;
            if page_limit.is_some() && got.pages.contains(&1) {
                return Err(format!("{what}: one page"));
            }
            close(&got.out, &want_out, ATOL, RTOL, &format!("{what}: `y`"))?;
            let gates = want.gates.clone();
            let got_all = HostGradients { gates, ..got.gradients.clone() };
            compare_gradients(&what, &got_all, &want)?;
            report.worst_gradient =
                report.worst_gradient.max(worst(&got.gradients.hidden, &want.hidden));
            same(&bits_of(&again), &bits_of(&got), &format!("{what}: twice"))?;
        }
    }
    Ok(())
}
