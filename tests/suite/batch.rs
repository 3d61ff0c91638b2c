//! What a batch brings and nobody reads, statistics in the caller's own buffer, and scratch that grows.
use testkit::layer::{HostLayer, router};
use testkit::prelude::{Output, contexts, gpu, random};
use wgmoe::layer::{
    Assignments, Batch, Blocks, LayerConfig, MoeExperts, MoeLayer, Scratch, Sequences,
};
use wgmoe::plan::Stats;
use wgmoe::routing::{BlockRule, ExpertChoice, Routing, SequenceTop, TokenChoice};
use wgmoe::{Activation, Context, ExpertWeights, Gpu, Slice, WeightType, wgpu};

const D: u32 = 32;
const E: u32 = 8;
const T: u32 = 12;

fn config(routing: impl Into<Routing>) -> LayerConfig {
    LayerConfig::new(D, 16, E, routing)
}

fn message<T>(result: wgmoe::Result<T>) -> String {
    result.map(|_| "no error").map_or_else(|e| e.to_string(), str::to_string)
}

/// Hidden states, and room for an output.
fn slices(gpu: &Gpu) -> [wgmoe::wgpu::Buffer; 2] {
    [gpu.upload(&random(3, (T * D) as usize)), gpu.upload(&vec![0f32; (T * D) as usize])]
}

#[test]
fn what_nobody_reads_is_an_error() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let [hidden, out] = slices(&gpu);
    let offsets = gpu.upload(&[0u32, T]);
    let one = gpu.upload(&[T]);
    let sequences = Sequences::new(1, &offsets);
    let batch = Batch::new(&hidden, T).into_out(&out);
    let layer =
        |routing: Routing| HostLayer::new(config(routing)).layer(ctx, &gpu.queue).expect("a layer");
    let tokens = layer(TokenChoice::new(2).into());
    let experts = layer(ExpertChoice::new(2).into());
    let pairs = layer(SequenceTop::new(2).into());
    let blocks = layer(TokenChoice::new(2).with_coreset(BlockRule::vote(4)).into());
    let given = [
        (
            &tokens,
            batch.with_sequences(sequences),
            "`sequences`: token choice reads them for `lengths` alone",
        ),
        (
            &blocks,
            batch.with_sequences(sequences),
            "`sequences`: token choice reads them for `lengths` alone",
        ),
        (
            &pairs,
            batch.with_sequences(sequences.with_capacity(&one)),
            "`capacity`: only expert choice has capacities",
        ),
        (
            &tokens,
            batch.with_sequences(sequences.with_lengths(&one).with_capacity(&one)),
            "`capacity`: only expert choice has capacities",
        ),
        (
            &tokens,
            batch.with_blocks(Blocks::new(1, &offsets)),
            "`blocks`: this rule elects no coreset",
        ),
        (
            &experts,
            batch.with_blocks(Blocks::new(1, &offsets)),
            "`blocks`: this rule elects no coreset",
        ),
        (&tokens, Batch::new(&hidden, T), "`out`: missing: `Batch::into_out`"),
    ];
    for (layer, batch, want) in given {
        assert_eq!(message(layer.bind(&batch)), want);
    }
    for (layer, batch) in [
        (&tokens, batch.with_sequences(sequences.with_lengths(&one))),
        (&experts, batch.with_sequences(sequences)),
        (&experts, batch.with_sequences(sequences.with_capacity(&one))),
        (&pairs, batch.with_sequences(sequences.with_lengths(&one))),
        (&blocks, batch.with_blocks(Blocks::new(1, &offsets))),
    ] {
        assert_eq!(message(layer.bind(&batch)), "no error");
    }
}

#[test]
fn another_routers_experts_want_its_choice() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let [hidden, out] = slices(&gpu);
    let host = HostLayer::new(config(TokenChoice::new(2)));
    let layer = host.layer(ctx, &gpu.queue).expect("a layer");
    let (ids, gates) =
        (gpu.upload(&vec![0u32; 2 * T as usize]), gpu.upload(&vec![0f32; 2 * T as usize]));
    let choice =
        Assignments::OfTokens { experts_per_token: 2, ids: (&ids).into(), gates: (&gates).into() };
    let batch = Batch::new(&hidden, T).into_out(&out);
    assert_eq!(
        message(layer.bind(&batch.with_assignments(choice))),
        "`assignments`: this router makes its own choice"
    );
    let experts =
        MoeExperts::new(ctx, Activation::Silu, 0, layer.weights().clone()).expect("experts");
    assert_eq!(message(experts.bind(&batch)), "`assignments`: missing: `Batch::with_assignments`");
    assert_eq!(message(experts.bind(&batch.with_assignments(choice))), "no error");
    assert_eq!(
        message(MoeExperts::new(ctx, Activation::Silu, 8, layer.weights().clone()))
            .split(':')
            .next(),
        Some("`shared_experts`")
    );
}

fn stats_of(gpu: &Gpu, slice: Slice<'_>) -> Stats {
    Stats::from_words(&gpu.download(slice).expect("words")).expect("statistics")
}

#[test]
fn statistics_in_the_callers_buffer() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        let [hidden, out] = slices(&gpu);
        let host = HostLayer::new(config(TokenChoice::new(2)));
        let layer = host.layer(&ctx, &gpu.queue).expect("a layer");
        let batch = Batch::new(&hidden, T).into_out(&out);
        let own = layer.bind(&batch).expect("bind");
        gpu.run_layer(&own).expect("run");
        let once = stats_of(&gpu, own.stats());
        assert_eq!((once.slots, once.tokens_per_expert.iter().sum()), (2 * T, 2 * T));

        let mine = Output::u32s(&gpu, (8 + E) as usize);
        let bound = layer.bind(&batch.with_stats(mine.slice())).expect("bind");
        gpu.run_layer(&bound).expect("run");
        assert_eq!(Stats::from_words(&mine.get::<u32>(&gpu)).expect("statistics"), once);

        let sums = gpu.upload(&vec![0u32; (8 + E) as usize]);
        let bound = layer.bind(&batch.with_stats_added_to(&sums)).expect("bind");
        for _ in 0..3 {
            gpu.run_layer(&bound).expect("run");
        }
        let sum = stats_of(&gpu, (&sums).into());
        assert_eq!(sum.slots, 3 * once.slots);
        let want: Vec<u32> = once.tokens_per_expert.iter().map(|n| 3 * n).collect();
        assert_eq!(sum.tokens_per_expert, want);
        let short = gpu.upload(&[0u32; 8]);
        assert_eq!(
            message(layer.bind(&batch.with_stats(&short))),
            "`stats`: expected 64 bytes, [16] u32, got 32"
        );
    }
}

/// Not those of the step before on the same scratch.
#[test]
fn zero_tokens_have_empty_statistics() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let [hidden, out] = slices(&gpu);
    let layer =
        HostLayer::new(config(TokenChoice::new(2))).layer(ctx, &gpu.queue).expect("a layer");
    let scratch = Scratch::new(ctx);
    let some = Batch::new(&hidden, T).into_out(&out).with_scratch(&scratch);
    gpu.run_layer(&layer.bind(&some).expect("bind")).expect("run");
    let [hidden, out] = [&hidden, &out].map(|buffer| Slice::new(buffer, 0, 0));
    let none = Batch::new(hidden, 0).into_out(out).with_scratch(&scratch);
    let bound = layer.bind(&none).expect("bind");
    gpu.run_layer(&bound).expect("run");
    let want = Stats { tokens_per_expert: vec![0; E as usize], ..Stats::default() };
    assert_eq!(stats_of(&gpu, bound.stats()), want);
}

/// A size smaller than one before takes no memory of its own.
#[test]
fn scratch_grows_with_the_largest_batch() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).expect("a context");
    let hidden = gpu.upload(&random(3, 64 * D as usize));
    let out = gpu.upload(&vec![0f32; 64 * D as usize]);
    let layer =
        HostLayer::new(config(TokenChoice::new(2))).layer(&ctx, &gpu.queue).expect("a layer");
    let scratch = Scratch::new(&ctx);
    let bind = |tokens: u32| {
        let [hidden, out] =
            [&hidden, &out].map(|buffer| Slice::new(buffer, 0, u64::from(tokens * D) * 4));
        let batch = Batch::new(hidden, tokens).into_out(out).with_scratch(&scratch);
        layer.bind(&batch).expect("bind");
        scratch.bytes()
    };
    let most = bind(64);
    for tokens in [1, 7, 33, 64, 63] {
        assert_eq!(bind(tokens), most, "{tokens} tokens");
    }
}

/// Where `refresh` lies.
const FAR: u64 = 0xf000;

/// What one kernel of a layer reads, an earlier one may have written: kernels see only their own slices.
#[test]
fn what_is_written_lies_apart_from_all_else() {
    let (device, _) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    let ctx = Context::new(&device).unwrap();
    let rule = TokenChoice::new(2).with_coreset(BlockRule::vote(4));
    let weights = ExpertWeights::new(&ctx, config(rule).expert_shape(WeightType::F32)).unwrap();
    let router = router(&ctx, &[0.0; (D * E) as usize], None).unwrap();
    let layer = MoeLayer::new(&ctx, config(rule), router, weights).unwrap();
    let buffer = || {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: 1 << 16,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        })
    };
    // `refresh` shares no buffer with what the same kernel writes.
    let (buffer, of_refresh) = (buffer(), buffer());
    let names = [
        "out",
        "stats",
        "coresets",
        "coverage",
        "hidden",
        "offsets",
        "voters",
        "refresh",
        "active",
        "experts_per_token",
    ];
    let words = [T * D, 8 + E, 1, 2, T * D, 2, T, 1, 1, T];
    let bind = |at: [u64; 10]| {
        let mut parts = at.iter().zip(words).map(|(&at, n)| {
            let buffer = if at == FAR { &of_refresh } else { &buffer };
            Slice::new(buffer, at, 4 * u64::from(n))
        });
        let [out, stats, coresets, coverage, hidden, offsets, voters, refresh, active, own] =
            std::array::from_fn(|_| parts.next().unwrap());
        let blocks = Blocks::new(1, offsets).with_voters(voters);
        let blocks = blocks.with_kept(coresets, refresh).with_coverage(coverage);
        let batch = Batch::new(hidden, T).into_out(out).with_stats(stats).with_blocks(blocks);
        layer.bind(&batch.with_active(active).with_experts_per_token(own)).map(|_| ())
    };
    let mut apart: [u64; 10] = std::array::from_fn(|i| 4096 * i as u64);
    apart[7] = FAR;
    bind(apart).unwrap();
    for written in 0..4 {
        for other in written + 1..names.len() {
            let mut at = apart;
            at[other] = at[written];
            let want = format!("`{}` is written and overlaps `{}`", names[written], names[other]);
            assert_eq!(message(bind(at)), want);
        }
    }
}
