//! Tokens that are not active: under every rule they are as if they were not there, and their rows of the output
//! stay as they are.
mod long;
mod others;

use testkit::compare::largest;
use testkit::layer::{HostLayer, selection};
use testkit::prelude::*;
use testkit::rules::every_rule;
use wgmoe::layer::{
    Batch, Blocks, BoundLayer, HostBatch, HostBlocks, HostSequences, LayerConfig, MoeLayer,
    MoeRouting, Sequences,
};
use wgmoe::plan::{HostPlan, Stats, bits};
use wgmoe::routing::{ExpertChoice, Routing, Score, TokenChoice};
use wgmoe::{Context, Gpu, Slice};

const D: usize = 64;
const E: usize = 40;
const K: u32 = 3;

/// The table's rules, with a capacity factor that drops.
fn rules() -> Vec<(String, Routing)> {
    let plain = TokenChoice::new(K).with_score(Score::Sigmoid).with_scale(2.5);
    let mut all = every_rule(plain.into(), E as u32);
    all.push(("grouped".into(), plain.with_groups(8, 3).into()));
    all.push(("dropping".into(), plain.with_capacity_factor(0.6).into()));
    let before = wgmoe::routing::Normalise::BeforeSelection;
    all.push(("before".into(), ExpertChoice::new(K).with_normalise(before).into()));
    all
}

fn elects(routing: Routing) -> bool {
    matches!(routing, Routing::TokenChoice(TokenChoice { coreset: Some(_), .. }))
}

/// About half of the tokens, and every bit past the last one.
fn some_bits(tokens: usize, seed: u64) -> Vec<u32> {
    let mut words = vec![0u32; tokens.div_ceil(32)];
    let lots = random(seed, tokens.next_multiple_of(32));
    for (t, lot) in lots.iter().enumerate() {
        words[t / 32] |= u32::from(t >= tokens || *lot > 0.0) << (t % 32);
    }
    words
}

fn is_set(words: &[u32], t: usize) -> bool {
    words[t / 32] >> (t % 32) & 1 == 1
}

/// A batch: hidden states whose first values are the logits, what divides its tokens, and which are active.
#[derive(Clone)]
struct Case {
    x: Vec<f32>,
    active: Option<Vec<u32>>,
    /// Offsets, and lengths.
    sequences: Option<(Vec<u32>, Option<Vec<u32>>)>,
    blocks: Option<Vec<u32>>,
}

impl Case {
    /// Inactive rows are louder than the others, and one is NaN: whatever listens to them goes wrong.
    fn new(tokens: usize, seed: u64) -> Self {
        let mut x = random(tokens as u64, tokens * D);
        let active = some_bits(tokens, seed);
        let left_out: Vec<usize> = (0..tokens).filter(|&t| !is_set(&active, t)).collect();
        for &t in &left_out {
            x[t * D..][..D].iter_mut().for_each(|v| *v *= 8.0);
        }
        if let Some(t) = left_out.last() {
            x[t * D..][..D].fill(f32::NAN);
        }
        Self { x, active: Some(active), sequences: None, blocks: None }
    }

    fn tokens(&self) -> usize {
        self.x.len() / D
    }

    fn with_sequences(&self, offsets: &[u32], lengths: Option<&[u32]>) -> Self {
        let sequences = Some((offsets.to_vec(), lengths.map(<[u32]>::to_vec)));
        Self { sequences, ..self.clone() }
    }

    fn with_blocks(&self, offsets: &[u32]) -> Self {
        Self { blocks: Some(offsets.to_vec()), ..self.clone() }
    }

    fn with_active(&self, active: Option<Vec<u32>>) -> Self {
        Self { active, ..self.clone() }
    }

    /// The tokens that are active and not padding, and the same batch of these alone.
    fn alone(&self, routing: Routing) -> (Vec<usize>, Self) {
        let tokens = self.tokens();
        let active = self.active.clone().unwrap();
        let (offsets, lengths) = self.sequences.clone().unwrap_or((vec![0, tokens as u32], None));
        let mut kept = vec![];
        let mut ends = vec![0];
        for (b, range) in offsets.windows(2).enumerate() {
            let length = lengths.as_ref().map_or(u32::MAX, |lengths| lengths[b]);
            let there = (range[0]..range[1]).take(length as usize);
            kept.extend(there.map(|t| t as usize).filter(|&t| is_set(&active, t)));
            ends.push(kept.len() as u32);
        }
        let count = |end: u32| kept.partition_point(|&t| t < end as usize) as u32;
        let stretches = (0..=tokens.div_ceil(32)).map(|i| (32 * i).min(tokens) as u32).collect();
        let blocks = self.blocks.clone().unwrap_or(stretches);
        let alone = Self {
            x: kept.iter().flat_map(|&t| self.x[t * D..][..D].to_vec()).collect(),
            active: None,
            sequences: self.sequences.as_ref().map(|_| (ends, None)),
            blocks: elects(routing).then(|| blocks.into_iter().map(count).collect()),
        };
        (kept, alone)
    }

    /// Hands the case, uploaded, to `f`.
    fn with_batch<T>(&self, gpu: &Gpu, routing: Routing, f: impl FnOnce(Batch<'_>) -> T) -> T {
        let hidden = gpu.upload(&self.x);
        let upload = |words: &Option<Vec<u32>>| words.as_ref().map(|words| gpu.upload(words));
        let (active, blocks) = (upload(&self.active), upload(&self.blocks));
        let offsets = self.sequences.as_ref().map(|(offsets, _)| gpu.upload(offsets));
        let lengths = self.sequences.as_ref().and_then(|(_, lengths)| upload(lengths));
        let mut batch = Batch::new(&hidden, self.tokens() as u32);
        if let Some(active) = &active {
            batch = batch.with_active(active);
        }
        if let (Some(offsets), true) =
            (&offsets, lengths.is_some() || !matches!(routing, Routing::TokenChoice(_)))
        {
            let count = self.sequences.as_ref().unwrap().0.len() as u32 - 1;
            let mut sequences = Sequences::new(count, offsets);
            if let Some(lengths) = &lengths {
                sequences = sequences.with_lengths(lengths);
            }
            batch = batch.with_sequences(sequences);
        }
        if let (Some(offsets), true) = (&blocks, elects(routing)) {
            let count = self.blocks.as_ref().unwrap().len() as u32 - 1;
            batch = batch.with_blocks(Blocks::new(count, offsets));
        }
        f(batch)
    }

    fn host_batch(&self) -> HostBatch<'_> {
        HostBatch {
            sequences: self.sequences.as_ref().map(|(offsets, lengths)| HostSequences {
                offsets,
                lengths: lengths.as_deref(),
                capacity: None,
            }),
            blocks: self.blocks.as_ref().map(|offsets| HostBlocks::new(offsets)),
            active: self.active.as_deref(),
            ..HostBatch::default()
        }
    }
}

/// What a routing made, from the device.
struct Routed {
    assigned: Vec<u32>,
    gates: Vec<f32>,
    coreset: Option<Vec<u32>>,
    plan: HostPlan,
    stats: Stats,
    /// Logits, scores, selection values.
    selection: Option<[Vec<f32>; 3]>,
}

fn get<T: bytemuck::Pod>(gpu: &Gpu, slice: Slice<'_>) -> Vec<T> {
    let items = slice.size as usize / size_of::<T>();
    gpu.download::<T>(slice).unwrap()[..items].to_vec()
}

fn routed(gpu: &Gpu, bound: &BoundLayer) -> Routed {
    let (shape, plan) = bound.plan().unwrap();
    Routed {
        assigned: get(gpu, bound.assigned().unwrap()),
        gates: get(gpu, bound.gates().unwrap()),
        coreset: bound.coreset().map(|slice| get(gpu, slice)),
        plan: HostPlan::from_words(&shape, &get(gpu, plan)).unwrap(),
        stats: Stats::from_words(&get::<u32>(gpu, bound.stats())).unwrap(),
        selection: selection(bound).map(|of| of.map(|slice| get(gpu, slice))),
    }
}

/// The gates of assigned pairs, 0 elsewhere.
fn masked(gates: &[f32], assigned: &[u32], tokens: usize) -> Vec<f32> {
    let pairs = (0..tokens).flat_map(|t| (0..E).map(move |e| (t, e)));
    let gate = |(t, e)| if bits::get(assigned, tokens, e, t) { gates[t * E + e] } else { 0.0 };
    pairs.map(gate).collect()
}

fn host(routing: Routing, shared: u32) -> HostLayer {
    HostLayer::scripted(
        LayerConfig::new(D as u32, 16, E as u32, routing).with_shared_experts(shared),
    )
}

/// The layer's contexts: both targets.
fn targets(gpu: &Gpu) -> Vec<Context> {
    contexts(gpu).into_iter().filter(|ctx| !ctx.variant().subgroups).collect()
}

/// Runs a layer into (or onto) an output that holds `before`.
fn run_layer(
    gpu: &Gpu,
    layer: &MoeLayer,
    case: &Case,
    before: &[f32],
    add: bool,
) -> (Vec<f32>, Routed) {
    let out = Output::holding(gpu, before);
    let routed = case.with_batch(gpu, layer.config().routing, |batch| {
        let batch = if add { batch.added_to(out.slice()) } else { batch.into_out(out.slice()) };
        let bound = layer.bind(&batch).expect("bind");
        gpu.run_layer(&bound).unwrap();
        routed(gpu, &bound)
    });
    (out.get(gpu), routed)
}

/// One column, several, with padding, with blocks of their own, of one of which no token is active.
fn cases() -> Vec<Case> {
    let [few, more] = [Case::new(20, 1), Case::new(70, 2)];
    let mut quiet = Case::new(70, 3).with_blocks(&[0, 20, 41, 64, 70]);
    let words = quiet.active.as_mut().unwrap();
    words[0] &= !(u32::MAX << 20);
    words[1] &= !(u32::MAX >> 23);
    let nobody = Case::new(40, 4).with_active(Some(vec![0, u32::MAX << 8]));
    vec![
        few.with_blocks(&[0, 9, 20]),
        few.with_sequences(&[0, 9, 20], Some(&[5, 20])).with_blocks(&[0, 9, 20]),
        few,
        more.with_sequences(&[0, 30, 66], Some(&[21, 30])),
        more.with_sequences(&[0, 30, 30, 70], None),
        more,
        quiet,
        nobody,
        Case::new(300, 5).with_sequences(&[0, 128, 300], None),
    ]
}

#[test]
fn all_active_is_the_same_bits() {
    let Some(gpu) = gpu() else { return };
    for ctx in targets(&gpu) {
        for (name, routing) in rules() {
            let layer = host(routing, 1).layer(&ctx, &gpu.queue).unwrap();
            for mut case in cases() {
                case.x.iter_mut().filter(|v| v.is_nan()).for_each(|v| *v = 0.5);
                let tokens = case.tokens();
                let what = format!("{name}, {}, {tokens} tokens", variant_name(&ctx));
                let before = random(8, tokens * D);
                let whole = case.with_active(None);
                let all = case.with_active(Some(vec![u32::MAX; tokens.div_ceil(32)]));
                let (want, want_routed) = run_layer(&gpu, &layer, &whole, &before, true);
                let (got, got_routed) = run_layer(&gpu, &layer, &all, &before, true);
                assert_same(&exact(&got), &exact(&want), &what);
                assert_same(&got_routed.assigned, &want_routed.assigned, &what);
                assert_eq!(got_routed.plan, want_routed.plan, "{what}");
                assert_eq!(got_routed.stats, want_routed.stats, "{what}");
            }
        }
    }
}

/// Choice, gates, plan and output are the twins'; rows that are not active stay as they are.
fn check(gpu: &Gpu, host: &HostLayer, layer: &MoeLayer, case: &Case, add: bool, what: &str) {
    let tokens = case.tokens();
    let active = case.active.clone().unwrap();
    let poison: Vec<u32> = (0..(tokens * D) as u32).map(|i| 0x7fc0_0001 + i % 977).collect();
    let mut before: Vec<f32> = random(9, tokens * D);
    for (i, value) in before.iter_mut().enumerate() {
        if !add || !is_set(&active, i / D) {
            *value = f32::from_bits(poison[i]);
        }
    }
    let (out, got) = run_layer(gpu, layer, case, &before, add);
    let of = got.selection.as_ref().unwrap();
    let want = host.routing(case.host_batch(), of.each_ref().map(Vec::as_slice));
    assert_eq!(got.coreset, want.coreset, "{what}: coreset");
    assert_same(&got.assigned, &want.assigned, what);
    let gates = masked(&got.gates, &got.assigned, tokens);
    assert_close(&gates, &want.gates, 1e-6, 1e-5, what);
    let shape = wgmoe::PlanShape::new(layer.context(), tokens as u32, E as u32, u32::MAX / 64)
        .with_shared_experts(host.config.shared_experts);
    let plan = HostPlan::cpu_active(&shape, &got.assigned, &gates, &active);
    assert_eq!(got.plan, plan, "{what}: plan");
    let dropped: u32 = want.dropped.iter().sum();
    assert_eq!((got.stats.dropped, got.stats.cut), (dropped, 0), "{what}");
    let untouched = (0..tokens)
        .filter(|&t| is_set(&active, t) && bits::experts_of(&got.assigned, tokens, t).is_empty());
    assert_eq!(got.stats.untouched, untouched.count() as u32, "{what}");
    let made = host.outputs(&case.x, &got.assigned, &gates);
    for t in 0..tokens {
        let (row, had) = (&out[t * D..][..D], &before[t * D..][..D]);
        if !is_set(&active, t) {
            assert_eq!(exact(row), exact(had), "{what}: token {t} is not active");
            assert!(bits::experts_of(&got.assigned, tokens, t).is_empty(), "{what}: token {t}");
            assert!(!got.plan.token_of.contains(&(t as u32)), "{what}: token {t} has a slot");
            continue;
        }
        let base = |i: usize| if add { had[i] } else { 0.0 };
        let want: Vec<f32> = (0..D).map(|i| made[t * D + i] + base(i)).collect();
        let atol = 1e-4 * largest(&want) + 1e-5;
        assert_close(row, &want, atol, 1e-4, &format!("{what}: token {t}"));
    }
}

#[test]
fn others_are_as_if_they_were_not_there() {
    let Some(gpu) = gpu() else { return };
    for ctx in targets(&gpu) {
        for (name, routing) in rules() {
            for shared in [0, 2] {
                let host = host(routing, shared);
                let layer = host.layer(&ctx, &gpu.queue).unwrap();
                for case in cases() {
                    let what = format!(
                        "{name}, {}, {shared} shared, {} tokens, {:?}, {:?}",
                        variant_name(&ctx),
                        case.tokens(),
                        case.sequences,
                        case.blocks
                    );
                    check(&gpu, &host, &layer, &case, shared > 0, &what);
                }
            }
        }
    }
}

/// The routing of the batch without them, on the device: the same experts, with the same gates.
#[test]
fn a_batch_without_them_routes_the_same() {
    let Some(gpu) = gpu() else { return };
    for ctx in targets(&gpu) {
        for (name, routing) in rules() {
            let host = host(routing, 1);
            let op = MoeRouting::new(&ctx, host.config, host.router(&ctx).unwrap()).unwrap();
            for case in cases() {
                let tokens = case.tokens();
                let what = format!("{name}, {}, {tokens} tokens", variant_name(&ctx));
                let route = |case: &Case| {
                    case.with_batch(&gpu, routing, |batch| {
                        let bound = op.bind(&batch.as_part_of(tokens as u32)).expect("bind");
                        gpu.run_layer(&bound).unwrap();
                        routed(&gpu, &bound)
                    })
                };
                let (kept, alone) = case.alone(routing);
                let got = route(&case);
                if kept.is_empty() {
                    assert_eq!(got.stats.slots, 0, "{what}");
                    continue;
                }
                let want = route(&alone);
                let gates = masked(&got.gates, &got.assigned, tokens);
                let want_gates = masked(&want.gates, &want.assigned, kept.len());
                for (i, &t) in kept.iter().enumerate() {
                    let experts = bits::experts_of(&got.assigned, tokens, t);
                    let alone = bits::experts_of(&want.assigned, kept.len(), i);
                    assert_eq!(experts, alone, "{what}: token {t}");
                    let [a, b] = [&gates[t * E..][..E], &want_gates[i * E..][..E]].map(exact);
                    assert_eq!(a, b, "{what}: token {t}, gates");
                }
                assert_eq!(got.stats.slots, want.stats.slots, "{what}");
                assert_eq!(got.stats.dropped, want.stats.dropped, "{what}");
                if let (Some(got), Some(want)) = (&got.coreset, &want.coreset) {
                    assert_same(got, want, &what);
                }
            }
        }
    }
}
