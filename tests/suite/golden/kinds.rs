//! A function a kind of golden file: what is compared, and how closely.
use super::gradients::gradient;
use super::losses;
use super::quantized::quantized;
use super::routing::{Routed, Routing, Rule};
use testkit::compare::{close, same, worst};
use testkit::golden::{ATOL, File, Layer, RTOL, blocks, schedules};
use testkit::prelude::{contexts, variant_name};
use wgmoe::plan::bits;
use wgmoe::routing::{BlockRule, GateRule, Groups};
use wgmoe::{Gpu, Score};

pub(super) type Outcome = Result<(), String>;

/// Reads a file and compares everything in it, on the twins and, where there is one, on the GPU in
/// every variant.
type Check = fn(&File, Option<&Gpu>, &mut Report) -> Outcome;

pub(super) const KINDS: &[(&str, Check)] = &[
    ("expert_choice", expert_choice),
    ("token_choice", token_choice),
    ("group_limited", group_limited),
    ("block_coreset", block_rule),
    ("block_capacity", block_rule),
    ("saliency_vote", block_rule),
    ("sequence_union", block_rule),
    ("opportunistic", block_rule),
    ("sequence_top", sequence_top),
    ("capacity_schedule", capacity_schedule),
    ("quantized", quantized),
    ("gradient_expert_choice", gradient),
    ("gradient_token_choice", gradient),
    ("gradient_group_limited", gradient),
    ("gradient_block_coreset", gradient),
    ("loss_router_z", losses::router_z),
    ("loss_switch", losses::switch),
    ("loss_expert_choice_balance", losses::balance),
    ("loss_masked_diffusion", losses::masked_diffusion),
    ("bias_update", losses::bias_update),
];

/// Tokens of the blocks whose distinct experts were counted where a file names no blocks of its
/// own.
const BLOCK: usize = 32;

/// What was compared.
#[derive(Default)]
pub(super) struct Report {
    /// Choices that hang on values within a few ulp of each other and fell the other way.
    pub(super) close_calls: usize,
    /// Largest difference of a gate, and of a layer's output.
    pub(super) worst_gate: f32,
    pub(super) worst_output: f32,
    /// Largest difference of a hidden state's gradient.
    pub(super) worst_gradient: f32,
    /// Tokens of recorded layers, and those whose output the reference defines.
    pub(super) tokens: usize,
    pub(super) defined: usize,
    /// Subnormal values that the device took for zero.
    pub(super) flushed: usize,
}

/// Compares a choice, `[tokens, experts]`. `value(t, e)` is what was chosen by; where a pair
/// differs, the same list (a token's or an expert's, by `list`) must hold a pair that differs the
/// other way within `ulps` of it.
pub(super) fn compare_choice(
    what: &str,
    (got, want): (&[bool], &[bool]),
    list: impl Fn(usize) -> usize,
    value: &[f32],
    ulps: f32,
    report: &mut Report,
) -> Outcome {
    same(&[got.len()], &[want.len()], what)?;
    let differ: Vec<usize> = (0..got.len()).filter(|&i| got[i] != want[i]).collect();
    for &i in &differ {
        let close = |&j: &usize| {
            let (a, b) = (value[i], value[j]);
            list(j) == list(i)
                && got[j] != got[i]
                && (a - b).abs() <= ulps * f32::EPSILON * a.abs().max(b.abs())
        };
        if !differ.iter().any(close) {
            let (got, want) = (got[i], want[i]);
            return Err(format!("{what}: pair {i} ({}): got {got}, want {want}", value[i]));
        }
    }
    report.close_calls += differ.len() / 2;
    Ok(())
}

/// The bit set as `[tokens, experts]`.
pub(super) fn dense(assigned: &[u32], tokens: usize, experts: usize) -> Vec<bool> {
    (0..tokens * experts).map(|i| bits::get(assigned, tokens, i % experts, i / experts)).collect()
}

/// Gates, 0 where a pair was not chosen.
fn chosen_gates(got: &Routed, mask: &[bool]) -> Vec<f32> {
    (0..mask.len()).map(|i| if mask[i] { got.gates[i] } else { 0.0 }).collect()
}

/// Compares gates `[tokens, experts]` where both chose alike.
fn compare_gates(
    what: &str,
    got: &[f32],
    want: &[f32],
    alike: impl Fn(usize) -> bool,
    report: &mut Report,
) -> Outcome {
    same(&[got.len()], &[want.len()], what)?;
    let both: Vec<usize> = (0..got.len()).filter(|&i| alike(i)).collect();
    let of = |values: &[f32]| both.iter().map(|&i| values[i]).collect::<Vec<_>>();
    let (got, want) = (of(got), of(want));
    report.worst_gate = report.worst_gate.max(worst(&got, &want));
    close(&got, &want, ATOL, RTOL, &format!("{what}: gates"))
}

/// How many distinct experts each block's tokens use.
fn distinct(mask: &[bool], experts: usize, offsets: &[u32]) -> Vec<u32> {
    let used = |b: &[u32], e: usize| (b[0]..b[1]).any(|t| mask[t as usize * experts + e]);
    let count = |b: &[u32]| (0..experts).filter(|&e| used(b, e)).count() as u32;
    offsets.windows(2).map(count).collect()
}

/// Offsets as a kernel takes them: from 0, never back, to the last token.
fn offsets(file: &File, tokens: usize) -> Result<Vec<u32>, String> {
    let offsets = file.u32s("block_offsets")?;
    let ends = (offsets.first(), offsets.last()) == (Some(&0), Some(&(tokens as u32)));
    if ends && offsets.is_sorted() {
        Ok(offsets)
    } else {
        Err(format!("`block_offsets`: {offsets:?} of {tokens} tokens"))
    }
}

/// Compares masks and gates given densely. A drop is by gates, the choice before it by `r`.
fn compare_dense(
    routing: &Routing,
    file: &File,
    gpu: Option<&Gpu>,
    report: &mut Report,
) -> Outcome {
    let (tokens, experts) = (routing.tokens, routing.experts);
    let (want, want_gates) = (file.flags("selected")?, file.f32s("gates")?);
    let before_drop = match file.has("tokens_per_expert_before_drop") {
        true => Some(file.u32s("tokens_per_expert_before_drop")?),
        false => None,
    };
    let sequence = |t: usize| match &routing.rule {
        Rule::Experts { offsets, .. } => offsets.iter().filter(|&&o| o as usize <= t).count(),
        _ => 0,
    };
    routing.everywhere(file, gpu, &mut |what, got| {
        let mask = dense(&got.assigned, tokens, experts);
        // An expert's list in a sequence; a drop is a list of an expert over the batch, compared by
        // gates.
        let scale_by_expert = |i: usize| (i % experts) * (tokens + 1) + sequence(i / experts);
        let masks = (&mask[..], &want[..]);
        match routing.rule {
            Rule::Experts { .. } => {
                compare_choice(what, masks, scale_by_expert, &got.r, 8.0, report)?
            }
            _ if routing.drop.is_some() => {
                compare_choice(what, masks, scale_by_expert, &got.gates, 16.0, report)?;
            }
            _ => compare_choice(what, masks, |i| i / experts, &got.r, 8.0, report)?,
        }
        let gates = chosen_gates(got, &mask);
        compare_gates(what, &gates, &want_gates, |i| mask[i] == want[i], report)?;
        // Where this side chose otherwise, the recorded gate is still 0 exactly where nothing was
        // selected.
        let zero: Vec<bool> = want_gates.iter().map(|&g| g != 0.0).collect();
        same(&zero, &want, &format!("{what}: `gates` beside `selected`"))?;
        let Some(counts) = &before_drop else { return Ok(()) };
        let first: Vec<u32> =
            (0..experts).map(|e| bits::tokens_of(&got.first, tokens, e).len() as u32).collect();
        same(&first, counts, &format!("{what}: tokens of experts before the drop"))
    })
}

fn gate_rule(file: &File) -> Result<(GateRule, bool), String> {
    match (file.text("normalise")?, file.score()?) {
        ("before_selection", _) => Ok((GateRule::Unnormalised, false)),
        ("after_selection", Score::Softmax) => Ok((GateRule::Softmax, true)),
        ("after_selection", Score::Sigmoid) => Ok((GateRule::Normalised, true)),
        (other, _) => Err(format!("normalise `{other}`")),
    }
}

fn expert_choice(file: &File, gpu: Option<&Gpu>, report: &mut Report) -> Outcome {
    let (sequences, length) = (file.size("sequences")?, file.size("tokens")?);
    let experts = file.size("experts")?;
    let tokens = sequences * length;
    let k = file.number("average_experts_per_token")?;
    let (offsets, capacity): (Vec<u32>, Vec<u32>) = match file.text("scope")? {
        "batch" => {
            let capacity = (tokens * k as usize / experts).max(1) as u32;
            (vec![0, tokens as u32], vec![capacity])
        }
        "sequence" => {
            let ks = match file.has("experts_per_token") {
                true => file.u32s("experts_per_token")?,
                false => vec![k; sequences],
            };
            let capacity = |&k: &u32| (length * k as usize / experts).clamp(1, length) as u32;
            let starts = (0..=sequences).map(|b| (b * length) as u32);
            (starts.collect(), ks.iter().map(capacity).collect())
        }
        other => return Err(format!("scope `{other}`")),
    };
    let (gates, from_logits) = gate_rule(file)?;
    let scale_by_count = match file.has("scaling_factors") {
        true => Some(file.f32s("scaling_factors")?),
        false => None,
    };
    let routing = Routing {
        tokens,
        experts,
        logits: file.f32s("logits")?,
        bias: None,
        score: file.score()?,
        from_logits,
        rule: Rule::Experts { offsets, capacity },
        gates,
        scale: 1.0,
        scale_by_count,
        drop: None,
    };
    compare_dense(&routing, file, gpu, report)
}

fn token_choice(file: &File, gpu: Option<&Gpu>, report: &mut Report) -> Outcome {
    let (tokens, experts) = (file.size("tokens")?, file.size("experts")?);
    let top = file.size("experts_per_token")?;
    let (gates, after) = gate_rule(file)?;
    let score = file.score()?;
    let drop = match file.real("capacity_factor") {
        Some(factor) if file.text("drop")? == "lowest_probability" => {
            Some(((tokens * top) as f64 / experts as f64 * factor).ceil() as u32)
        }
        Some(_) => return Err(format!("drop `{}`", file.text("drop")?)),
        None => None,
    };
    let routing = Routing {
        tokens,
        experts,
        logits: file.f32s("logits")?,
        bias: None,
        score,
        from_logits: after && score == Score::Softmax,
        rule: Rule::Tokens { top, groups: None, coreset: None },
        gates,
        scale: 1.0,
        scale_by_count: None,
        drop,
    };
    compare_dense(&routing, file, gpu, report)
}

/// The reference's lists of a token's experts, in an order of its own, as `[tokens, experts]`:
/// which, and their gates. An empty place is -1 and has no gate.
pub(super) fn lists(
    file: &File,
    [tokens, experts, top]: [usize; 3],
) -> Result<(Vec<bool>, Vec<f32>), String> {
    let (ids, weights) = (file.i32s("experts")?, file.f32s("weights")?);
    same(&[ids.len(), weights.len()], &[tokens * top; 2], "`experts`, `weights`")?;
    let (mut mask, mut gates) = (vec![false; tokens * experts], vec![0.0; tokens * experts]);
    for (i, (&id, &weight)) in ids.iter().zip(&weights).enumerate() {
        match usize::try_from(id) {
            Ok(id) if id < experts => {
                let at = i / top * experts + id;
                if mask[at] {
                    return Err(format!("`experts`: token {}: {id} twice", i / top));
                }
                (mask[at], gates[at]) = (true, weight);
            }
            Err(_) if id == -1 && weight == 0.0 => {}
            _ => return Err(format!("place {i}: expert {id}, weight {weight}")),
        }
    }
    Ok((mask, gates))
}

fn group_limited(file: &File, gpu: Option<&Gpu>, report: &mut Report) -> Outcome {
    let (sequences, length) = (file.size("sequences")?, file.size("tokens")?);
    let (tokens, experts) = (sequences * length, file.size("experts")?);
    let routing = by_token(file, tokens, None)?;
    let Rule::Tokens { top, .. } = routing.rule else { return Err("no token choice".into()) };
    let (want, want_gates) = lists(file, [tokens, experts, top])?;
    let offsets = blocks(sequences, length, BLOCK);
    let unique = file.u32s("unique_experts_per_block")?;
    same(&distinct(&want, experts, &offsets), &unique, "`experts` beside their number a block")?;
    routing.everywhere(file, gpu, &mut |what, got| {
        let mask = dense(&got.assigned, tokens, experts);
        compare_choice(what, (&mask, &want), |i| i / experts, &got.r, 8.0, report)?;
        let alike = |i: usize| {
            let row = i / experts * experts..(i / experts + 1) * experts;
            mask[row.clone()] == want[row]
        };
        compare_gates(what, &chosen_gates(got, &mask), &want_gates, alike, report)?;
        if mask == want {
            same(
                &distinct(&mask, experts, &offsets),
                &unique,
                &format!("{what}: experts a block"),
            )?;
        }
        Ok(())
    })?;
    whole_layer(file, gpu, report)
}

/// Token choice with a bias, by the settings of a file.
fn by_token(
    file: &File,
    tokens: usize,
    coreset: Option<(BlockRule, Vec<u32>)>,
) -> Result<Routing, String> {
    let groups = match file.number("groups") {
        Ok(count) => Some(Groups::new(count, file.number("groups_per_token")?)),
        Err(_) => None,
    };
    let normalised = file.flag("normalise_weights") != Some(false);
    Ok(Routing {
        tokens,
        experts: file.size("experts")?,
        logits: file.f32s("logits")?,
        bias: Some(file.f32s("expert_bias")?),
        score: file.score()?,
        from_logits: false,
        rule: Rule::Tokens { top: file.size("experts_per_token")?, groups, coreset },
        gates: if normalised { GateRule::Normalised } else { GateRule::Unnormalised },
        scale: file.real("routed_scaling_factor").ok_or("no `routed_scaling_factor`")? as f32,
        scale_by_count: None,
        drop: None,
    })
}

/// Rules that elect a coreset: everything exactly but the gates.
fn block_rule(file: &File, gpu: Option<&Gpu>, report: &mut Report) -> Outcome {
    let experts = file.size("experts")?;
    let tokens = file.len("logits") / experts;
    let recorded = file.kind() == "block_coreset";
    let offsets = match recorded {
        true => blocks(file.size("sequences")?, file.size("tokens")?, file.size("block")?),
        false => offsets(file, tokens)?,
    };
    let rule = match file.kind() {
        "block_coreset" => BlockRule::Mass {
            p: file.real("top_p").ok_or("no `top_p`")? as f32,
            floor: file.number("min_coreset")?,
        },
        "block_capacity" => BlockRule::Capacity(file.number("capacity")?),
        "saliency_vote" => BlockRule::Vote(file.number("core")?),
        "sequence_union" => BlockRule::Union(file.number("keep")?),
        _ => BlockRule::Union(file.number("base")?),
    };
    let routing = by_token(file, tokens, Some((rule, offsets.clone())))?;
    let Rule::Tokens { top, .. } = routing.rule else { return Err("no token choice".into()) };
    let want_coreset = file.flags("coreset")?;
    let (want, want_gates) = lists(file, [tokens, experts, top])?;
    let unique = file.u32s("unique_experts_per_block")?;
    // The reference fills up a token that finds too few experts at random; those count among its
    // block's.
    same(&distinct(&want, experts, &offsets), &unique, "`experts` beside their number a block")?;
    let defined = if recorded { file.flags("token_is_defined")? } else { vec![true; tokens] };
    routing.everywhere(file, gpu, &mut |what, got| {
        same(&got.coreset, &want_coreset, &format!("{what}: coreset"))?;
        let mask = dense(&got.assigned, tokens, experts);
        let gates = chosen_gates(got, &mask);
        for (t, &defined) in defined.iter().enumerate() {
            let row = t * experts..(t + 1) * experts;
            let full = mask[row.clone()].iter().filter(|&&m| m).count() == top;
            if recorded && full != defined {
                return Err(format!("{what}: token {t}: `token_is_defined` is {defined}"));
            }
            if defined {
                let what = format!("{what}: token {t}");
                same(&mask[row.clone()], &want[row.clone()], &what)?;
                close(&gates[row.clone()], &want_gates[row], ATOL, RTOL, &what)?;
            }
        }
        let used = distinct(&mask, experts, &offsets);
        for (b, range) in offsets.windows(2).enumerate() {
            if defined[range[0] as usize..range[1] as usize].iter().all(|&d| d) {
                same(&[used[b]], &[unique[b]], &format!("{what}: experts of block {b}"))?;
            }
        }
        Ok(())
    })?;
    if recorded { whole_layer(file, gpu, report) } else { Ok(()) }
}

fn sequence_top(file: &File, gpu: Option<&Gpu>, _: &mut Report) -> Outcome {
    let experts = file.size("experts")?;
    let tokens = file.len("logits") / experts;
    let offsets = offsets(file, tokens)?;
    let rule = Rule::Pairs { top: file.size("experts_per_token")?, offsets: offsets.clone() };
    let routing = Routing { rule, ..by_token(file, tokens, None)? };
    let (want, want_gates) = (file.flags("selected")?, file.f32s("gates")?);
    let unique = file.u32s("unique_experts_per_block")?;
    routing.everywhere(file, gpu, &mut |what, got| {
        let mask = dense(&got.assigned, tokens, experts);
        same(&mask, &want, &format!("{what}: pairs"))?;
        close(&chosen_gates(got, &mask), &want_gates, ATOL, RTOL, what)?;
        same(&distinct(&mask, experts, &offsets), &unique, &format!("{what}: experts a block"))
    })
}

/// A schedule's own rule, and the steps that the device looks it up in.
fn capacity_schedule(file: &File, _: Option<&Gpu>, _: &mut Report) -> Outcome {
    let (ratios, rows) = schedules(file)?;
    for (schedule, row) in rows {
        let k: Vec<u32> = ratios.iter().map(|&r| schedule.k(r)).collect();
        same(&k, &row, &format!("{schedule:?}"))?;
        let words = schedule.staircase().map_err(|e| e.to_string())?.words();
        let k: Vec<u32> = ratios.iter().map(|&r| crate::schedule::k_of_words(&words, r)).collect();
        same(&k, &row, &format!("steps of {schedule:?}"))?;
    }
    Ok(())
}

/// From hidden states to output: the router's logits, and the outputs of tokens that the reference
/// defines; of the others the device's must be the twins'.
fn whole_layer(file: &File, gpu: Option<&Gpu>, report: &mut Report) -> Outcome {
    let Some(layer) = Layer::read(file)? else { return Ok(()) };
    let name = &file.name;
    close(&layer.logits(), &file.f32s("logits")?, ATOL, RTOL, &format!("{name}: logits"))?;
    let twin = layer.on_cpu();
    let mut compare = |what: &str, got: &[f32]| -> Outcome {
        let (error, ok) = layer.compare(got);
        if !ok {
            return Err(format!("{name}, {what}: `y` differs by {error:e}"));
        }
        report.worst_output = report.worst_output.max(error);
        close(got, &twin, ATOL, RTOL, &format!("{name}, {what}: all tokens"))
    };
    compare("CPU twins", &twin)?;
    let Some(gpu) = gpu else { return Ok(()) };
    for ctx in contexts(gpu) {
        let what = variant_name(&ctx);
        compare(
            &what,
            &testkit::block_on(layer.on_gpu(gpu, &ctx))
                .map_err(|e| format!("{name}, {what}: {e}"))?,
        )?;
    }
    report.tokens += layer.defined.len();
    report.defined += layer.defined.iter().filter(|&&d| d).count();
    Ok(())
}
