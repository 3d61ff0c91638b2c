//! Token choice where each token has its own number of experts.
use testkit::compare::largest;
use testkit::layer::{HostLayer, selection};
use testkit::prelude::*;
use testkit::rules::every_block_rule;
use wgmoe::layer::{
    Batch, BoundLayer, HostBatch, HostSequences, LayerConfig, MoeRouting, Sequences,
};
use wgmoe::plan::{Stats, bits};
use wgmoe::routing::{BlockRule, ExpertChoice, Routing, Score, SequenceTop, TokenChoice};
use wgmoe::{Context, Gpu};

const D: u32 = 32;
const E: u32 = 40;
const K: u32 = 4;
const MANY: u32 = 20;

fn rules() -> Vec<Routing> {
    let of = |k| TokenChoice::new(k).with_score(Score::Sigmoid).with_scale(2.5);
    let plain = of(K);
    let mut rules = vec![plain, plain.with_groups(8, 4), plain.with_capacity_factor(1.0)];
    rules.extend(every_block_rule(E, K).map(|rule| plain.with_coreset(rule)));
    // More than kernels choose at a time.
    rules.extend([of(MANY), of(MANY).with_coreset(BlockRule::vote(30))]);
    rules.into_iter().map(Routing::TokenChoice).collect()
}

/// From none to more than a rule of `most` takes.
fn numbers(tokens: usize, most: u32) -> Vec<u32> {
    random(5, tokens).iter().map(|v| (v.to_bits() >> 7) % (most + 3)).collect()
}

/// What a routing made: the bit set, and what was chosen by.
fn route(gpu: &Gpu, bound: &BoundLayer, tokens: usize) -> (Vec<u32>, [Vec<f32>; 3]) {
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    bound.encode(&mut encoder);
    gpu.queue.submit([encoder.finish()]);
    let words = E as usize * bits::columns(tokens);
    let assigned: Vec<u32> = gpu.download(bound.assigned().unwrap()).unwrap();
    let of = selection(bound).unwrap().map(|slice| gpu.download::<f32>(slice).unwrap());
    (assigned[..words].to_vec(), of.map(|all| all[..tokens * E as usize].to_vec()))
}

/// The first `k` of a token's experts, by value and then by number.
fn first(mut experts: Vec<usize>, values: &[f32], k: u32) -> Vec<usize> {
    experts.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    experts.truncate(k as usize);
    experts.sort_unstable();
    experts
}

fn check(gpu: &Gpu, ctx: &Context, routing: Routing, tokens: usize, padded: bool) {
    let host = HostLayer::new(LayerConfig::new(D, 16, E, routing)).with_bias();
    let op = MoeRouting::new(ctx, host.config, host.router(ctx).unwrap()).unwrap();
    let what = format!("{} {routing:?} T {tokens}, padded: {padded}", variant_name(ctx));
    let hidden = gpu.upload(&random(3, tokens * D as usize));
    let most = routing.experts_per_token();
    let tops = numbers(tokens, most);
    let (offsets, lengths) = ([0, 7, tokens as u32], [5, tokens as u32 - 10]);
    let buffers = [&tops[..], &vec![most; tokens], &offsets, &lengths].map(|all| gpu.upload(all));
    let [own, equal, offsets_of, lengths_of] = &buffers;
    let batch = Batch::new(&hidden, tokens as u32);
    let batch = if padded {
        batch.with_sequences(Sequences::new(2, offsets_of).with_lengths(lengths_of))
    } else {
        batch
    };
    let run = |batch| route(gpu, &op.bind(&batch).unwrap(), tokens);
    let (all, _) = run(batch);
    assert_same(&run(batch.with_experts_per_token(equal)).0, &all, &format!("{what}: K for all"));

    let (got, [logits, s, r]) = run(batch.with_experts_per_token(own));
    let sequences = HostSequences { offsets: &offsets, lengths: Some(&lengths), capacity: None };
    let host_batch = HostBatch {
        sequences: padded.then_some(sequences),
        experts_per_token: Some(&tops),
        ..HostBatch::default()
    };
    let twin = host.routing(host_batch, [&logits, &s, &r]);
    assert_same(&got, &twin.assigned, &what);
    // Dropped are others where fewer take part.
    let Routing::TokenChoice(TokenChoice { capacity_factor: None, .. }) = routing else { return };
    for (t, &k) in tops.iter().enumerate() {
        let row = &r[t * E as usize..][..E as usize];
        let want = first(bits::experts_of(&all, tokens, t), row, k);
        assert_same(&bits::experts_of(&got, tokens, t), &want, &format!("{what}: token {t}"));
    }
}

/// One block at once, more in three kernels, with padding and without.
#[test]
fn each_token_takes_its_first() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu).into_iter().filter(|ctx| !ctx.variant().subgroups) {
        for routing in rules() {
            for (tokens, padded) in [(32, false), (70, false), (70, true)] {
                check(&gpu, &ctx, routing, tokens, padded);
            }
        }
    }
}

/// Numbers above K are K, and counted where the token is active.
#[test]
fn more_than_there_may_be_is_counted() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu).into_iter().filter(|ctx| !ctx.variant().subgroups) {
        for routing in rules().into_iter().take(4) {
            for tokens in [20, 70] {
                let host = HostLayer::new(LayerConfig::new(D, 16, E, routing));
                let op = MoeRouting::new(&ctx, host.config, host.router(&ctx).unwrap()).unwrap();
                let hidden = gpu.upload(&random(3, tokens * D as usize));
                let mut tops = numbers(tokens, K);
                tops[tokens - 1] = u32::MAX;
                let active: Vec<u32> = vec![0x00ff_ffff; tokens.div_ceil(32)];
                let [own, bits_of] = [&tops, &active].map(|words| gpu.upload(words));
                let batch = Batch::new(&hidden, tokens as u32).with_experts_per_token(&own);
                let clamped = |batch: Batch<'_>| {
                    let bound = op.bind(&batch).unwrap();
                    gpu.run_layer(&bound).unwrap();
                    let words: Vec<u32> = gpu.download(bound.stats()).unwrap();
                    Stats::from_words(&words).unwrap().clamped
                };
                let above = |t: &usize| tops[*t] > K;
                let all = (0..tokens).filter(above).count() as u32;
                let what = format!("{} {routing:?} T {tokens}", variant_name(&ctx));
                assert!(all > 1, "{what}");
                assert_eq!(clamped(batch), all, "{what}");
                let some = (0..tokens).filter(|t| t % 32 < 24).filter(above).count() as u32;
                assert_eq!(clamped(batch.with_active(&bits_of)), some, "{what}, active");
            }
        }
    }
}

#[test]
fn a_layer_of_few_experts() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let config = LayerConfig::new(D, 16, E, rules()[0]).with_shared_experts(1);
    let host = HostLayer::new(config);
    let layer = host.layer(&ctx, &gpu.queue).unwrap();
    let tokens = 33;
    let x = random(3, tokens * D as usize);
    let tops: Vec<u32> = numbers(tokens, K).into_iter().map(|k| k.min(K)).collect();
    let (hidden, own) = (gpu.upload(&x), gpu.upload(&tops));
    let out = Output::f32s(&gpu, x.len());
    let batch = Batch::new(&hidden, tokens as u32).with_experts_per_token(&own);
    let bound = layer.bind(&batch.into_out(out.slice())).unwrap();
    let (_, [logits, s, r]) = route(&gpu, &bound, tokens);
    let host_batch = HostBatch { experts_per_token: Some(&tops), ..HostBatch::default() };
    let want = host.routing(host_batch, [&logits, &s, &r]);
    let want = host.outputs(&x, &want.assigned, &want.gates);
    let got: Vec<f32> = out.get(&gpu);
    for (t, (got, want)) in got.chunks(D as usize).zip(want.chunks(D as usize)).enumerate() {
        assert_close(got, want, 2e-5 * largest(want) + 1e-6, 2e-5, &format!("token {t}"));
    }
    let stats = Stats::from_words(&gpu.download::<u32>(bound.stats()).unwrap()[..8 + E as usize]);
    assert_eq!(stats.unwrap().slots, tops.iter().sum::<u32>());
}

#[test]
fn what_cannot_be() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let hidden = gpu.upload(&random(3, 12 * D as usize));
    let [short, fits] = [11, 12].map(|n| gpu.upload(&vec![1u32; n]));
    let message = |routing: Routing, tops| {
        let host = HostLayer::new(LayerConfig::new(D, 16, E, routing));
        let op = MoeRouting::new(&ctx, host.config, host.router(&ctx).unwrap()).unwrap();
        op.bind(&Batch::new(&hidden, 12).with_experts_per_token(tops)).unwrap_err().to_string()
    };
    let want = "`experts_per_token`: expected 48 bytes, [12] u32, got 44";
    for routing in rules() {
        assert_eq!(message(routing, &short), want, "{routing:?}");
    }
    let want = "`experts_per_token`: only token choice reads it";
    for routing in [ExpertChoice::new(2).into(), SequenceTop::new(2).into()] {
        assert_eq!(message(routing, &fits), want, "{routing:?}");
    }
}
