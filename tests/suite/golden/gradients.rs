//! Recorded gradients of layers: every tensor of a forward and a backward pass.
use super::kinds::{Outcome, Report, dense, lists};
use testkit::compare::{close, same};
use testkit::golden::{ATOL, File, Forward, Gradient, RTOL};
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

pub(super) fn gradient(file: &File, _gpu: Option<&Gpu>, _: &mut Report) -> Outcome {
    let case = Gradient::read(file)?.ok_or("no gradients")?;
    let forward = case.forward();
    compare_forward("twins", file, &case, &forward)?;
    let want = case.recorded(file)?;
    compare_gradients("twins", &case.backward(&forward), &want)
}
