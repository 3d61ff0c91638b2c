//! Padding: under every rule, tokens past the lengths of their sequences get no expert and have no
//! say in any choice.
//!
//! Long: every rule is compared in one table of batches.
use testkit::layer::HostLayer;
use testkit::prelude::{Output, assert_close, assert_same, contexts, gpu, random, run};
use testkit::rules::{assert_every_kind, every_block_rule};
use wgmoe::layer::{
    Batch, Blocks, BoundLayer, HostBatch, HostBlocks, HostRouting, HostSequences, LayerConfig,
    MoeRouting, Scratch, Sequences,
};
use wgmoe::ops::active_rows::{self, ActiveRows, Args, Capacities, Dims};
use wgmoe::plan::{Stats, bits};
use wgmoe::routing::{
    BlockRule, ExpertChoice, GateRule, Normalise, Routing, Score, SequenceTop, TokenChoice,
};
use wgmoe::{Context, Gpu, Slice, wgpu};

const D: usize = 64;
const E: usize = 48;
const K: u32 = 3;

/// Every rule: each kind of token choice with each coreset, the highest pairs, expert choice.
fn every_rule() -> Vec<(String, Routing)> {
    let plain = TokenChoice::new(K).with_gate(GateRule::Softmax);
    let grouped = TokenChoice::new(K).with_score(Score::Sigmoid).with_groups(8, 3).with_scale(2.5);
    let dropping = plain.with_capacity_factor(0.8);
    let all = BlockRule::mass(1.0).with_floor(4);
    let coresets = || every_block_rule(E as u32, K).into_iter().chain([all]);
    let mut rules: Vec<(String, Routing)> = vec![];
    for (kind, rule) in [("plain", plain), ("groups", grouped), ("capacity factor", dropping)] {
        rules.push((kind.into(), rule.into()));
        let with = |coreset| (format!("{kind}, {coreset:?}"), rule.with_coreset(coreset).into());
        rules.extend(coresets().map(with));
    }
    let before = ExpertChoice::new(K).with_normalise(Normalise::BeforeSelection);
    rules.extend([
        ("sequence top".into(), SequenceTop::new(K).into()),
        ("expert choice".into(), ExpertChoice::new(K).into()),
        ("expert choice, before".into(), before.into()),
    ]);
    assert_every_kind(rules.iter().map(|(_, routing)| routing));
    rules
}

/// A batch on the host. The router is such that a token's logits are the first values of its row.
#[derive(Clone)]
struct Case {
    x: Vec<f32>,
    offsets: Vec<u32>,
    lengths: Option<Vec<u32>>,
    blocks: Option<(Vec<u32>, Option<Vec<u32>>)>,
}

impl Case {
    /// Padding is louder than the other tokens, and its last row is NaN: whatever listens to it goes
    /// wrong.
    fn new(tokens: usize, offsets: &[u32], lengths: &[u32]) -> Self {
        let mut x = random(tokens as u64, tokens * D);
        let rows = active_rows::cpu(tokens, offsets, lengths);
        let padding: Vec<usize> = (0..tokens).filter(|&t| !is_set(&rows, t)).collect();
        for &t in &padding {
            x[t * D..][..D].iter_mut().for_each(|v| *v *= 8.0);
        }
        if let Some(t) = padding.last() {
            x[t * D..][..D].fill(f32::NAN);
        }
        Self { x, offsets: offsets.to_vec(), lengths: Some(lengths.to_vec()), blocks: None }
    }

    /// With blocks, and voters where they are given.
    fn with_blocks(&self, offsets: &[u32], voters: bool) -> Self {
        let marks = |t: usize| u32::from(t % 5 == 1 && !(32..64).contains(&t));
        let voters = voters.then(|| (0..self.tokens()).map(marks).collect());
        Self { blocks: Some((offsets.to_vec(), voters)), ..self.clone() }
    }

    fn tokens(&self) -> usize {
        self.x.len() / D
    }

    /// Bits of the tokens that are not padding.
    fn rows(&self) -> Vec<u32> {
        match &self.lengths {
            Some(lengths) => active_rows::cpu(self.tokens(), &self.offsets, lengths),
            None => vec![u32::MAX; self.tokens().div_ceil(32)],
        }
    }
}

fn is_set(words: &[u32], t: usize) -> bool {
    words[t / 32] >> (t % 32) & 1 == 1
}

fn elects(routing: Routing) -> bool {
    matches!(routing, Routing::TokenChoice(TokenChoice { coreset: Some(_), .. }))
}

/// What a routing made, from the device.
struct Routed {
    assigned: Vec<u32>,
    gates: Vec<f32>,
    coreset: Option<Vec<u32>>,
    stats: Stats,
    /// Logits, scores, selection values.
    selection: [Vec<f32>; 3],
    dispatches: Vec<&'static str>,
}

fn get<T: bytemuck::Pod>(gpu: &Gpu, slice: Slice<'_>) -> Vec<T> {
    let items = slice.size as usize / size_of::<T>();
    gpu.download::<T>(slice.buffer).unwrap()[..items].to_vec()
}

fn submit(gpu: &Gpu, bound: &BoundLayer) {
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    bound.encode(&mut encoder);
    gpu.queue.submit([encoder.finish()]);
    gpu.wait().unwrap();
}

/// Hands the case, uploaded, to `f`.
fn with_batch<T>(gpu: &Gpu, case: &Case, routing: Routing, f: impl FnOnce(Batch<'_>) -> T) -> T {
    let hidden = gpu.upload(&case.x);
    let offsets = gpu.upload(&case.offsets);
    let lengths = case.lengths.as_ref().map(|l| gpu.upload(l));
    let blocks = case.blocks.as_ref().filter(|_| elects(routing));
    let block_offsets = blocks.map(|(offsets, _)| gpu.upload(offsets));
    let voters = blocks.and_then(|(_, voters)| voters.as_ref()).map(|v| gpu.upload(v));

    let mut batch = Batch::new(&hidden, case.tokens() as u32);
    let mut sequences = Sequences::new(case.offsets.len() as u32 - 1, &offsets);
    if let Some(lengths) = &lengths {
        sequences = sequences.with_lengths(lengths);
    }
    // Token choice reads sequences for their lengths alone.
    if lengths.is_some() || !matches!(routing, Routing::TokenChoice(_)) {
        batch = batch.with_sequences(sequences);
    }
    if let (Some((offsets, _)), Some(buffer)) = (blocks, &block_offsets) {
        let mut blocks = Blocks::new(offsets.len() as u32 - 1, buffer);
        if let Some(voters) = &voters {
            blocks = blocks.with_voters(voters);
        }
        batch = batch.with_blocks(blocks);
    }
    f(batch)
}

fn layer(routing: Routing) -> HostLayer {
    HostLayer::scripted(LayerConfig::new(D as u32, 16, E as u32, routing))
}

fn route(gpu: &Gpu, op: &MoeRouting, scratch: &Scratch, case: &Case) -> Routed {
    let bound = with_batch(gpu, case, op.config().routing, |batch| {
        op.bind(&batch.with_scratch(scratch)).expect("bind")
    });
    submit(gpu, &bound);
    let logits = bound.logits().unwrap();
    let selection =
        [logits, bound.scores().unwrap_or(logits), bound.selection_values().unwrap_or(logits)];
    Routed {
        assigned: get(gpu, bound.assigned().unwrap()),
        gates: get(gpu, bound.gates().unwrap()),
        coreset: bound.coreset().map(|s| get(gpu, s)),
        stats: Stats::from_words(&get::<u32>(gpu, bound.stats())).unwrap(),
        selection: selection.map(|s| get(gpu, s)),
        dispatches: bound.dispatches().map(|d| d.name()).collect(),
    }
}

fn twin(host: &HostLayer, case: &Case, selection: &[Vec<f32>; 3]) -> HostRouting {
    // What expert choice takes where the batch says nothing.
    let (offsets, lengths) = (&case.offsets, case.lengths.as_deref());
    let sequences = HostSequences { offsets, lengths, capacity: None };
    let blocks = case.blocks.as_ref().map(|(offsets, voters)| HostBlocks {
        kept: None,
        offsets,
        voters: voters.as_deref(),
    });
    let batch = HostBatch { sequences: Some(sequences), blocks, ..HostBatch::default() };
    host.routing(batch, selection.each_ref().map(Vec::as_slice))
}

/// The gates of assigned pairs, 0 elsewhere.
fn masked(gates: &[f32], assigned: &[u32], tokens: usize) -> Vec<f32> {
    let pairs = (0..tokens).flat_map(|t| (0..E).map(move |e| (t, e)));
    let gate = |(t, e)| if bits::get(assigned, tokens, e, t) { gates[t * E + e] } else { 0.0 };
    pairs.map(gate).collect()
}

/// Sequences of 20, 70 and 1,100 tokens: one, ragged ones, empty ones, lengths of 0 and past the
/// sequence, offsets that decrease, tokens outside all sequences. The largest first: what it leaves
/// in the scratch is stale for the others.
fn cases() -> Vec<Case> {
    let long = Case::new(1100, &[0, 1, 8, 520, 1033, 1053, 1100], &[1, 5, 500, 513, 0, 7]);
    let one = Case::new(70, &[0, 70], &[61]);
    let ragged = Case::new(70, &[3, 20, 20, 50, 66], &[10, 5, 0, 99]);
    vec![
        long.with_blocks(&[0, 1, 8, 200, 520, 1033, 1040, 1053, 1100], true),
        long,
        one.with_blocks(&[0, 32, 64, 70], true),
        one.with_blocks(&[2, 30, 60, 65, 69], false),
        one,
        ragged.with_blocks(&[3, 20, 50, 60, 66], true),
        ragged,
        Case::new(70, &[0, 70], &[0]),
        Case::new(70, &[0, 40, 30, 80], &[25, 9, u32::MAX]),
        Case::new(20, &[0, 20], &[13]),
        Case::new(20, &[0, 9, 20], &[4, 11]).with_blocks(&[0, 9, 20], true),
    ]
}

#[test]
fn every_rule_leaves_padding_out() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        let scratch = Scratch::new(&ctx);
        for (name, routing) in every_rule() {
            let host = layer(routing);
            let op = MoeRouting::new(&ctx, host.config, host.router(&ctx).unwrap()).unwrap();
            for case in cases() {
                let tokens = case.tokens();
                // The long ones cost the twins most, which groups do not change.
                if tokens > 1000 && name.starts_with("groups,") {
                    continue;
                }
                let what = format!(
                    "{name}, {:?}, {tokens} tokens, {:?} of {:?}, blocks {:?}",
                    ctx.variant(),
                    case.lengths,
                    case.offsets,
                    case.blocks.as_ref().map(|(offsets, voters)| (offsets, voters.is_some())),
                );
                let got = route(&gpu, &op, &scratch, &case);
                let want = twin(&host, &case, &got.selection);
                assert_eq!(got.coreset, want.coreset, "{what}: coreset");
                assert_same(&got.assigned, &want.assigned, &what);
                let gates = masked(&got.gates, &got.assigned, tokens);
                assert_close(&gates, &want.gates, 1e-6, 1e-5, &what);
                let rows = case.rows();
                for t in (0..tokens).filter(|&t| !is_set(&rows, t)) {
                    let experts = bits::experts_of(&got.assigned, tokens, t);
                    assert!(experts.is_empty(), "{what}: token {t} has {experts:?}");
                }
                let slots: u32 = got.assigned.iter().map(|word| word.count_ones()).sum();
                assert_eq!(got.stats.slots, slots, "{what}: slots");
                assert_eq!(got.stats.dropped, want.dropped.iter().sum::<u32>(), "{what}: dropped");
            }
        }
    }
}

/// A batch that is padded at its end, and the same without padding.
fn pairs() -> Vec<(Case, Case)> {
    let pair = |tokens: usize, offsets: &[u32], lengths: &[u32], voters| {
        let padded = Case::new(tokens, offsets, lengths);
        let kept: usize = lengths.iter().map(|&n| n as usize).sum();
        let mut ends = offsets.to_vec();
        *ends.last_mut().unwrap() = kept as u32;
        let x = padded.x[..kept * D].to_vec();
        let alone = Case { x, offsets: ends, lengths: None, blocks: None };
        if voters {
            let blocks = [0, 16, kept as u32 - 3, kept as u32];
            let longer = [0, 16, kept as u32 - 3, tokens as u32];
            (padded.with_blocks(&longer, true), alone.with_blocks(&blocks, true))
        } else {
            (padded, alone)
        }
    };
    vec![
        pair(330, &[0, 100, 330], &[100, 170], false),
        pair(70, &[0, 70], &[61], false),
        pair(70, &[0, 70], &[61], true),
        pair(70, &[0, 25, 70], &[25, 36], false),
        pair(20, &[0, 20], &[13], false),
    ]
}

#[test]
fn a_padded_batch_routes_as_the_unpadded_one() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        let scratch = Scratch::new(&ctx);
        for (name, routing) in every_rule() {
            let host = layer(routing);
            let op = MoeRouting::new(&ctx, host.config, host.router(&ctx).unwrap()).unwrap();
            let (mut heard, mut takes) = (false, false);
            for (padded, alone) in pairs() {
                let (tokens, kept) = (padded.tokens(), alone.tokens());
                let what = format!("{name}, {:?}, {kept} of {tokens} tokens", ctx.variant());
                let want = route(&gpu, &op, &scratch, &alone);
                let got = route(&gpu, &op, &scratch, &padded);
                let experts_of = |routed: &Routed, tokens: usize| -> Vec<Vec<usize>> {
                    (0..kept).map(|t| bits::experts_of(&routed.assigned, tokens, t)).collect()
                };
                assert_same(&experts_of(&got, tokens), &experts_of(&want, kept), &what);
                let gates: Vec<u32> = masked(&got.gates, &got.assigned, tokens)
                    .iter()
                    .map(|gate| gate.to_bits())
                    .collect();
                let want_gates = masked(&want.gates, &want.assigned, kept);
                let want_gates: Vec<u32> = want_gates.iter().map(|gate| gate.to_bits()).collect();
                assert_same(&gates[..kept * E], &want_gates, &what);
                let counts = |stats: &Stats| (stats.slots, stats.dropped, stats.unique_experts);
                assert_eq!(counts(&got.stats), counts(&want.stats), "{what}");
                assert_same(&got.stats.tokens_per_expert, &want.stats.tokens_per_expert, &what);
                if let (Some(got), Some(want)) = (&got.coreset, &want.coreset) {
                    assert_same(&got[..want.len()], want, &what);
                    assert!(got[want.len()..].iter().all(|&word| word == 0), "{what}");
                }

                // The same batch without lengths: padding is heard.
                let loud = Case { lengths: None, ..padded.clone() };
                let loud = route(&gpu, &op, &scratch, &loud);
                takes |=
                    (kept..tokens).any(|t| !bits::experts_of(&loud.assigned, tokens, t).is_empty());
                heard |= experts_of(&loud, tokens) != experts_of(&got, tokens);
            }
            // Plain token choice is each token's own: no other token has a say in any case.
            let own = matches!(
                routing,
                Routing::TokenChoice(TokenChoice { coreset: None, capacity_factor: None, .. })
            );
            assert_eq!(heard, !own, "{name}: padding without lengths is heard");
            assert!(takes, "{name}: padding without lengths takes experts");
        }
    }
}

/// Rows of padding get 0, or keep their residual, unless there are shared experts.
#[test]
fn outputs_of_padding_come_from_shared_experts_alone() {
    let Some(gpu) = gpu() else { return };
    let mut case = Case::new(70, &[0, 30, 66], &[21, 30]);
    case.x.iter_mut().filter(|v| v.is_nan()).for_each(|v| *v = 0.5);
    let (tokens, rows) = (case.tokens(), case.rows());
    let residual = random(9, tokens * D);
    let mut every = every_rule();
    every.retain(|(name, _)| !name.starts_with("groups") && !name.starts_with("capacity factor,"));
    for ctx in contexts(&gpu) {
        for (name, routing) in &every {
            for shared in [0, 1] {
                let config = layer(*routing).config.with_shared_experts(shared);
                let host = HostLayer::scripted(config);
                let layer = host.layer(&ctx, &gpu.queue).unwrap();
                for add in [false, true] {
                    let what = format!("{name}, {:?}, {shared} shared, add {add}", ctx.variant());
                    let out = Output::holding(&gpu, &residual);
                    let (bound, assigned, gates) = with_batch(&gpu, &case, *routing, |batch| {
                        let batch = match add {
                            true => batch.added_to(out.slice()),
                            false => batch.into_out(out.slice()),
                        };
                        let bound = layer.bind(&batch).expect("bind");
                        submit(&gpu, &bound);
                        let assigned: Vec<u32> = get(&gpu, bound.assigned().unwrap());
                        let gates: Vec<f32> = get(&gpu, bound.gates().unwrap());
                        (bound, assigned, gates)
                    });
                    assert!(bound.assigned().is_some());
                    let before: &[f32] = &residual;
                    let base = |i: usize| if add { before[i] } else { 0.0 };
                    let want: Vec<f32> = host
                        .outputs(&case.x, &assigned, &gates)
                        .into_iter()
                        .enumerate()
                        .map(|(i, v)| v + base(i))
                        .collect();
                    let got: Vec<f32> = out.get(&gpu);
                    assert_close(&got, &want, 1e-4, 1e-4, &what);
                    for t in (0..tokens).filter(|&t| !is_set(&rows, t)) {
                        let alone = (t * D..t * D + D).all(|i| got[i] == base(i));
                        assert_eq!(alone, shared == 0, "{what}: token {t}");
                    }
                }
            }
        }
    }
}

#[test]
fn batches_without_lengths_have_no_dispatch_more() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let scratch = Scratch::new(ctx);
    let padded = Case::new(70, &[0, 70], &[61]);
    let whole = Case { lengths: None, ..padded.clone() };
    for (name, routing) in every_rule() {
        let host = layer(routing);
        let op = MoeRouting::new(ctx, host.config, host.router(ctx).unwrap()).unwrap();
        let with = route(&gpu, &op, &scratch, &padded).dispatches;
        let without = route(&gpu, &op, &scratch, &whole).dispatches;
        let others: Vec<_> = with.iter().copied().filter(|&n| n != "active_rows").collect();
        assert_same(&others, &without, &name);
        let more = usize::from(matches!(routing, Routing::TokenChoice(_)));
        assert_eq!(with.len(), without.len() + more, "{name}");
    }
}

#[test]
fn errors_name_the_sequences() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let (_, routing) = every_rule().remove(0);
    let host = layer(routing);
    let op = MoeRouting::new(ctx, host.config, host.router(ctx).unwrap()).unwrap();
    let hidden = gpu.upload(&random(1, 70 * D));
    let words = gpu.upload(&[0u32, 70, 61]);
    let part = |from: u64, items: u64| Slice::new(&words, from * 4, items * 4);
    let error = |sequences: Sequences<'_>| {
        op.bind(&Batch::new(&hidden, 70).with_sequences(sequences)).unwrap_err().to_string()
    };
    let without = error(Sequences::new(1, part(0, 2)));
    assert!(without.contains("`sequences`"), "{without}");
    let short = error(Sequences::new(1, part(0, 2)).with_lengths(part(0, 2)));
    assert!(short.contains("`lengths`"), "{short}");
    let offsets = error(Sequences::new(2, part(0, 2)).with_lengths(part(0, 2)));
    assert!(offsets.contains("`offsets`"), "{offsets}");
    let none = error(Sequences::new(0, part(0, 1)).with_lengths(part(0, 1)));
    assert!(none.contains("`sequences`"), "{none}");
    // Only software drivers limit their number; others come to the offsets.
    let many = error(Sequences::new(30_000, part(0, 2)).with_lengths(part(0, 1)));
    let software = gpu.info.device_type == wgpu::DeviceType::Cpu;
    let argument = if software { "`sequences`: 30000" } else { "`offsets`" };
    assert!(many.contains(argument), "{many}");
}

fn rows_on(gpu: &Gpu, ctx: &Context, tokens: usize, offsets: &[u32], lengths: &[u32]) -> Vec<u32> {
    let op = ActiveRows::new(ctx).expect("a kernel");
    let (os, ls) = (gpu.upload(offsets), gpu.upload(lengths));
    let of: Vec<u32> = (0..=tokens as u32).map(|n| 3 * n + 7).collect();
    let of = gpu.upload(&of);
    let dims = Dims { tokens: tokens as u32, sequences: lengths.len() as u32 };
    let run_with = |capacity: Option<&Output>| {
        let rows = Output::u32s(gpu, tokens.div_ceil(32));
        let capacities =
            capacity.map(|c| Capacities { capacity_of: (&of).into(), capacity: c.slice() });
        let (offsets, lengths) = ((&os).into(), (&ls).into());
        let args = Args { offsets, lengths, rows: rows.slice(), capacities };
        run(gpu, &op.bind(&dims, args).expect("bind"));
        rows.get::<u32>(gpu)
    };
    let capacity = Output::u32s(gpu, 1);
    let rows = run_with(Some(&capacity));
    let count: u32 = rows.iter().map(|word| word.count_ones()).sum();
    assert_eq!(capacity.get::<u32>(gpu), [3 * count + 7], "{tokens} tokens");
    assert_eq!(run_with(None), rows, "{tokens} tokens, without a capacity");
    rows
}

#[test]
fn active_rows_match_the_twin() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for tokens in [1usize, 31, 32, 33, 70, 1000, 5000] {
            let t = tokens as u32;
            for (offsets, lengths) in [
                (vec![0, t], vec![t]),
                (vec![0, t], vec![0]),
                (vec![0, t], vec![t / 2]),
                (vec![0, t], vec![u32::MAX]),
                (vec![t / 5, t / 2, t / 4, t * 3 / 4], vec![t / 9, 1, 2]),
                (vec![t / 3, t / 3, t / 3, t], vec![4, 5, t / 2]),
                (vec![t, t], vec![5]),
                (vec![u32::MAX, 0], vec![5]),
                (vec![0, t / 2, 4_000_000_000, 3], vec![u32::MAX - 1, t / 4, 9]),
                ((0..=t).collect(), (0..t).map(|i| i % 3).collect()),
            ] {
                let got = rows_on(&gpu, &ctx, tokens, &offsets, &lengths);
                let want = active_rows::cpu(tokens, &offsets, &lengths);
                assert_same(&got, &want, &format!("{tokens} tokens, {offsets:?}, {lengths:?}"));
            }
        }
    }
}

/// Nearly as many sequences as `bind` takes: within what a software driver lets one invocation's
/// loops do.
#[test]
fn many_sequences() {
    let Some(gpu) = gpu() else { return };
    let n = 21_000u32;
    for each in [1, 3, 40] {
        let tokens = n * each;
        let offsets: Vec<u32> = (0..=n).map(|b| b * each).collect();
        let lengths: Vec<u32> = (0..n).map(|b| (b * 7) % (each + 2)).collect();
        let want = active_rows::cpu(tokens as usize, &offsets, &lengths);
        let got = rows_on(&gpu, &contexts(&gpu)[0], tokens as usize, &offsets, &lengths);
        assert_same(&got, &want, &format!("{each} tokens a sequence"));
    }
    // All of them empty but the last one.
    let mut offsets = vec![0; n as usize + 1];
    offsets[n as usize] = 70;
    let lengths = vec![50; n as usize];
    let want = active_rows::cpu(70, &offsets, &lengths);
    assert_same(&rows_on(&gpu, &contexts(&gpu)[0], 70, &offsets, &lengths), &want, "empty ones");
}
