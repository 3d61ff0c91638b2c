//! The CPU twin of a layer: what each op's twin makes of the values before it.
use super::batch::BLOCK;
use super::config::LayerConfig;
use crate::error::{expect_len, expect_offsets, expect_rows};
use crate::ops::expert_choice::ranges;
use crate::ops::plan_count::{self, Scales};
use crate::ops::{
    coreset, expert_choice, grouped_matmul, logits, scores, sequence_top, token_choice,
};
use crate::plan::bits;
use crate::routing::{GateRule, Routing, TokenChoice, schedule};

/// The router on the host.
#[derive(Clone, Copy, Debug)]
pub struct HostRouter<'a> {
    /// `[E, D]`.
    pub weight: &'a [f32],
    /// `[E]`.
    pub bias: Option<&'a [f32]>,
    /// `[E + 1]`.
    pub scale_by_count: Option<&'a [f32]>,
    /// `[E]`.
    pub scale_by_expert: Option<&'a [f32]>,
}

/// Sequences on the host: offsets `[n + 1]`, lengths `[n]`, capacities `[n]`; as in
/// [`Sequences`](super::Sequences) where absent.
#[derive(Clone, Copy, Debug)]
pub struct HostSequences<'a> {
    /// Token ranges.
    pub offsets: &'a [u32],
    /// Tokens that are not padding.
    pub lengths: Option<&'a [u32]>,
    /// Tokens that each expert takes, under expert choice; by the rule's own experts per token
    /// where absent.
    pub capacity: Option<&'a [u32]>,
}

/// Blocks on the host: offsets `[n + 1]`, voters `[T]`.
#[derive(Clone, Copy, Debug)]
pub struct HostBlocks<'a> {
    /// Token ranges.
    pub offsets: &'a [u32],
    /// Tokens with 0 have no say.
    pub voters: Option<&'a [u32]>,
    /// Coresets `[n, ceil(E / 32)]` and, `[n]`, 0 where a block keeps its one.
    pub kept: Option<[&'a [u32]; 2]>,
}

impl<'a> HostBlocks<'a> {
    /// Blocks whose tokens all vote, and whose coresets are elected.
    pub fn new(offsets: &'a [u32]) -> Self {
        Self { offsets, voters: None, kept: None }
    }
}

/// What a batch brings of its own, on the host; as in [`Batch`](super::Batch) where absent.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostBatch<'a> {
    /// Sequences of expert choice and of [`SequenceTop`](Routing::SequenceTop); padding of any
    /// rule.
    pub sequences: Option<HostSequences<'a>>,
    /// Blocks of block-level rules.
    pub blocks: Option<HostBlocks<'a>>,
    /// `[ceil(T / 32)]`: tokens that take part.
    pub active: Option<&'a [u32]>,
    /// `[T]`: experts that each token takes under token choice, the rule's K at most; other rules
    /// leave it alone.
    pub experts_per_token: Option<&'a [u32]>,
}

/// A layer's routing on the CPU: what each twin makes of the values before it.
#[derive(Clone, Debug, PartialEq)]
pub struct HostRouting {
    /// The coresets `[blocks, ceil(E / 32)]` of a block-level rule.
    pub coreset: Option<Vec<u32>>,
    /// The bit set `[E, ceil(T / 32)]`.
    pub assigned: Vec<u32>,
    /// The same before any drop: the experts that gates are made over.
    pub chosen: Vec<u32>,
    /// Gates `[T, E]`, 0 elsewhere.
    pub gates: Vec<f32>,
    /// Tokens that each expert dropped.
    pub dropped: Vec<u32>,
}

/// The CPU twin of a layer's choice and gates, from logits, scores and selection values `[T, E]`
/// (the device's own, for an exact comparison, or [`logits::cpu`] and [`scores::cpu`]).
///
/// Where sequences have lengths, padding gets no expert and has no say, nor does a token that is not active:
/// the others are routed as if they were alone.
///
/// # Panics
///
/// If `logits` are not whole rows of the configuration's experts, if `scores` or `values` are not
/// as many, or as the twins of the rule's kernels do; the message names the argument.
pub fn cpu_routing(
    config: &LayerConfig,
    router: &HostRouter<'_>,
    batch: HostBatch<'_>,
    [logits, s, r]: [&[f32]; 3],
) -> HostRouting {
    let experts = config.experts as usize;
    let tokens = expect_rows("logits", logits.len(), "experts", experts) as u32;
    expect_len("scores", s.len(), logits.len());
    expect_len("values", r.len(), logits.len());
    let routing = config.routing;
    let padded = batch.sequences.is_some_and(|s| s.lengths.is_some());
    if padded || batch.active.is_some() {
        return cpu_routing_of_some(config, router, batch, [logits, s, r]);
    }
    let unlimited = vec![u32::MAX; tokens as usize];
    let own_numbers = batch.experts_per_token.unwrap_or(&unlimited);
    let mut coresets = None;
    let assigned = match routing {
        Routing::ExpertChoice(rule) => {
            let alone = HostSequences { offsets: &[0, tokens], lengths: None, capacity: None };
            let HostSequences { offsets, lengths, capacity } = batch.sequences.unwrap_or(alone);
            // Lengths are none here: padding is left out before.
            let own: Vec<u32> = ranges(offsets, tokens as usize)
                .into_iter()
                .map(|range| {
                    schedule::capacity(range.len() as u32, rule.experts_per_token, config.experts)
                })
                .collect();
            expert_choice::cpu(r, experts, offsets, lengths, capacity.unwrap_or(&own))
        }
        Routing::TokenChoice(TokenChoice {
            experts_per_token: top, groups, coreset: None, ..
        }) => token_choice::cpu_each(r, experts, top as usize, own_numbers, groups, &|_, _| true),
        Routing::TokenChoice(TokenChoice {
            experts_per_token: top,
            groups,
            coreset: Some(rule),
            ..
        }) => {
            let ends = default_blocks(tokens);
            let blocks = batch.blocks.unwrap_or(HostBlocks::new(&ends));
            let own = rule
                .own_top(top)
                .map(|top| token_choice::cpu(r, experts, top as usize, None, &|_, _| true));
            let HostBlocks { offsets, voters, kept } = blocks;
            let (mut members, block_of) =
                coreset::cpu(rule, r, experts, &own.unwrap_or_default(), offsets, voters);
            let words = experts.div_ceil(32);
            if let Some([kept, refresh]) = kept {
                expect_len("coresets", kept.len(), members.len());
                expect_len("refresh", refresh.len(), members.len() / words);
                for (b, _) in refresh.iter().enumerate().filter(|(_, refresh)| **refresh == 0) {
                    let row = b * words..(b + 1) * words;
                    members[row.clone()].copy_from_slice(&kept[row]);
                }
            }
            let inside = |t, e| coreset::is_inside((&members, &block_of), experts, t, e);
            let top = top as usize;
            let assigned = token_choice::cpu_each(r, experts, top, own_numbers, groups, &inside);
            coresets = Some(members);
            assigned
        }
        Routing::SequenceTop(rule) => {
            let whole = [0, tokens];
            let offsets = batch.sequences.map_or(&whole[..], |s| s.offsets);
            sequence_top::cpu(r, experts, rule.experts_per_token as usize, offsets)
        }
    };
    let source = if routing.gate() == GateRule::Softmax { logits } else { s };
    let scales =
        Scales { scale_by_count: router.scale_by_count, scale_by_expert: router.scale_by_expert };
    let mut gates =
        plan_count::cpu(&assigned, source, experts, routing.gate(), routing.scale(), scales);
    let capacity = match routing {
        Routing::TokenChoice(rule) => rule.capacity(tokens, config.experts),
        Routing::ExpertChoice(_) | Routing::SequenceTop(_) => None,
    };
    let Some(capacity) = capacity else {
        let dropped = vec![0; experts];
        return HostRouting {
            coreset: coresets,
            chosen: assigned.clone(),
            assigned,
            gates,
            dropped,
        };
    };
    let (kept, dropped) = expert_choice::cpu_drop(&gates, experts, &assigned, capacity);
    for t in 0..tokens as usize {
        for e in 0..experts {
            if !bits::get(&kept, tokens as usize, e, t) {
                gates[t * experts + e] = 0.0;
            }
        }
    }
    HostRouting { coreset: coresets, assigned: kept, chosen: assigned, gates, dropped }
}

/// What [`cpu_routing`] makes of the tokens that are active and not padding, as a batch of their own, put
/// back where these tokens lie.
fn cpu_routing_of_some(
    config: &LayerConfig,
    router: &HostRouter<'_>,
    HostBatch { sequences, blocks, experts_per_token, active }: HostBatch<'_>,
    selection: [&[f32]; 3],
) -> HostRouting {
    let experts = config.experts as usize;
    let tokens = selection[0].len() / experts;
    let whole = [0, tokens as u32];
    let alone = HostSequences { offsets: &whole, lengths: None, capacity: None };
    let HostSequences { offsets, lengths, capacity } = sequences.unwrap_or(alone);
    if let Some(lengths) = lengths {
        expect_len("lengths", lengths.len(), expect_offsets("offsets", offsets.len()));
    }
    if let Some(active) = active {
        expect_len("active", active.len(), bits::columns(tokens));
    }
    let is_active = |t: &usize| active.is_none_or(|words| words[t / 32] >> (t % 32) & 1 == 1);
    let mut kept: Vec<usize> = vec![];
    let mut kept_offsets = vec![0];
    for (b, range) in ranges(offsets, tokens).into_iter().enumerate() {
        let length = lengths.map_or(range.len(), |lengths| lengths[b] as usize);
        kept.extend(range.take(length).filter(is_active));
        kept_offsets.push(kept.len() as u32);
    }
    let rows_of = |values: &[f32]| -> Vec<f32> {
        kept.iter().flat_map(|&t| &values[t * experts..][..experts]).copied().collect()
    };
    let [logits, s, r] = selection.map(rows_of);

    // Blocks have the same numbers, those of padding alone as empty ones.
    let stretches = default_blocks(tokens as u32);
    let blocks = blocks.unwrap_or(HostBlocks::new(&stretches));
    let kept_before = |t: usize| kept.partition_point(|&k| k < t) as u32;
    let block_ranges = ranges(blocks.offsets, tokens);
    let first = block_ranges.first().map(|range| kept_before(range.start));
    let ends = block_ranges.iter().map(|range| kept_before(range.end));
    let block_offsets: Vec<u32> = first.into_iter().chain(ends).collect();
    let voters: Option<Vec<u32>> =
        blocks.voters.map(|voters| kept.iter().map(|&t| voters[t]).collect());

    let tops: Option<Vec<u32>> = experts_per_token.map(|tops| {
        expect_len("experts_per_token", tops.len(), tokens);
        kept.iter().map(|&t| tops[t]).collect()
    });

    let batch = HostBatch {
        sequences: Some(HostSequences { offsets: &kept_offsets, lengths: None, capacity }),
        blocks: Some(HostBlocks {
            offsets: &block_offsets,
            voters: voters.as_deref(),
            kept: blocks.kept,
        }),
        experts_per_token: tops.as_deref(),
        active: None,
    };
    let alone = cpu_routing(config, router, batch, [&logits, &s, &r]);
    let placed = |of_alone: &[u32]| {
        let mut all = bits::empty(tokens, experts);
        for (i, &t) in kept.iter().enumerate() {
            for e in bits::experts_of(of_alone, kept.len(), i) {
                bits::set(&mut all, tokens, e, t);
            }
        }
        all
    };
    let (assigned, chosen) = (placed(&alone.assigned), placed(&alone.chosen));
    let mut gates = vec![0.0; tokens * experts];
    for (i, &t) in kept.iter().enumerate() {
        gates[t * experts..][..experts].copy_from_slice(&alone.gates[i * experts..][..experts]);
    }
    HostRouting { assigned, chosen, gates, ..alone }
}

/// Offsets of stretches of [`BLOCK`] tokens.
fn default_blocks(tokens: u32) -> Vec<u32> {
    (0..=tokens.div_ceil(BLOCK)).map(|i| (i * BLOCK).min(tokens)).collect()
}

/// An expert's matrix on the host, `[out, in]`; shared experts follow the routed ones.
pub type HostExperts<'a> =
    &'a (dyn Fn(u32, crate::weights::Projection) -> crate::weights::HostWeights<'a> + Sync);

/// The CPU twin of a layer's experts: the output row `[D]` of one token, whose hidden state is `x
/// [D]`, given the experts that took it, each with its gate. The shared experts are added, each
/// with gate 1.
///
/// # Panics
///
/// If `x` is not the hidden size long, or if an expert's matrix is not hidden times intermediate
/// size; the message names the argument.
pub fn cpu_token(
    config: &LayerConfig,
    experts: HostExperts<'_>,
    x: &[f32],
    chosen: &[(u32, f32)],
) -> Vec<f32> {
    use crate::weights::Projection::{Down, Gate, Up};
    expect_len("x", x.len(), config.hidden as usize);
    let mut out = vec![0f64; x.len()];
    let shared = (config.experts..config.experts + config.shared_experts).map(|e| (e, 1.0));
    for (e, gate) in chosen.iter().copied().chain(shared) {
        let [g, u, d] = [Gate, Up, Down].map(|p| experts(e, p));
        let size = config.hidden as usize * config.intermediate as usize;
        for (name, matrix) in [("gate_proj", &g), ("up_proj", &u), ("down_proj", &d)] {
            expect_len(name, matrix.len(), size);
        }
        let weights: [&dyn Fn(usize) -> f32; 3] = [&|i| g.get(i), &|i| u.get(i), &|i| d.get(i)];
        let y =
            grouped_matmul::cpu_expert(x, config.intermediate as usize, config.activation, weights);
        for (out, y) in out.iter_mut().zip(y) {
            *out += f64::from(gate) * f64::from(y);
        }
    }
    out.into_iter().map(|v| v as f32).collect()
}

/// The CPU twin of a whole layer: the output `[T, D]` for hidden states `x [T, D]`; rows of tokens that are not
/// active, which a device leaves as they are, are 0. Where two
/// selection values lie within rounding of each other, a device may choose the other one;
/// [`cpu_routing`] takes the device's own values instead.
///
/// # Panics
///
/// If `x` is not whole rows of the hidden size, if `router weight` is not experts times hidden
/// size, or as [`cpu_routing`] and [`cpu_token`] do; the message names the argument.
pub fn cpu(
    config: &LayerConfig,
    router: &HostRouter<'_>,
    batch: HostBatch<'_>,
    experts: HostExperts<'_>,
    x: &[f32],
) -> Vec<f32> {
    let (d, e) = (config.hidden as usize, config.experts as usize);
    expect_len("router weight", router.weight.len(), d * e);
    let logits = logits::cpu(x, router.weight, d);
    let LayerConfig { routing, .. } = config;
    let (s, r) = scores::cpu(&logits, e, routing.score(), routing.by_logits(), router.bias);
    let chosen = cpu_routing(config, router, batch, [&logits, &s, &r]);
    let tokens = x.len() / d;
    let of_token = |t: usize| -> Vec<(u32, f32)> {
        let experts = bits::experts_of(&chosen.assigned, tokens, t);
        experts.into_iter().map(|i| (i as u32, chosen.gates[t * e + i])).collect()
    };
    let rows = x.chunks_exact(d).enumerate();
    let is_active = |t: usize| batch.active.is_none_or(|words| words[t / 32] >> (t % 32) & 1 == 1);
    let output = |(t, row)| match is_active(t) {
        true => cpu_token(config, experts, row, &of_token(t)),
        false => vec![0.0; d],
    };
    rows.flat_map(output).collect()
}
