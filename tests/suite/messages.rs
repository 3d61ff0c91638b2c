//! What the caller is told: the own argument by its own name, the numbers, the shape. Exact texts.
use testkit::layer::HostLayer;
use testkit::prelude::*;
use wgmoe::layer::{Assignments, Batch, LayerConfig};
use wgmoe::ops::capacity::{self, Capacity, Source};
use wgmoe::ops::gather::{self, Gather};
use wgmoe::ops::grouped_matmul::{self, GroupedMatmul, Rows, Stage};
use wgmoe::routing::{
    BlockRule, ExpertChoice, GateRule, Groups, Normalise, Routing, Score, SequenceTop, TokenChoice,
};
use wgmoe::weights::ExpertShape;
use wgmoe::{
    Activation, Context, Error, ExpertWeights, Gpu, MoeExperts, MoeRouting, PlanShape, Slice,
    WeightType, wgpu,
};

#[track_caller]
fn message<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => panic!("must be an error"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn rules_that_make_no_sense() {
    let of = |rule: Routing, experts| message(rule.check(experts));
    let tokens = TokenChoice::new(4);
    let grouped = |k, count, per_token| TokenChoice::new(k).with_groups(count, per_token).into();
    let elects = |rule| Routing::from(tokens.with_coreset(rule));
    for (rule, experts, text) in [
        (tokens.into(), 0, "`experts`: must not be 0"),
        (tokens.into(), 1025, "`experts`: 1025, at most 1024"),
        (TokenChoice::new(0).into(), 16, "`experts_per_token`: must not be 0"),
        (TokenChoice::new(17).into(), 16, "`experts_per_token`: 17 of only 16 experts"),
        (TokenChoice::new(65).into(), 256, "`experts_per_token`: 65, at most 64"),
        (grouped(2, 4, 9), 16, "`groups`: 9 of only 4 groups"),
        (grouped(2, 5, 2), 16, "`groups`: 5 do not divide 16 experts"),
        (grouped(2, 64, 2), 64, "`groups`: 64, must be 1 to 32"),
        (grouped(2, 4, 0), 16, "`groups`: a token must be allowed at least 1"),
        (grouped(4, 8, 1), 16, "`experts_per_token`: 4 of only 2 experts, those of 1 of 8 groups"),
        (tokens.with_scale(f32::NAN).into(), 16, "`scale`: NaN, must be finite"),
        (
            tokens.with_capacity_factor(0.0).into(),
            16,
            "`capacity_factor`: 0, must be positive and finite",
        ),
        (
            elects(BlockRule::mass(60.0)),
            16,
            "`p`: 60, must be 0 to 1; 1 elects every expert with a vote",
        ),
        (elects(BlockRule::mass(0.6).with_floor(17)), 16, "`floor`: 17 of only 16 experts"),
        (elects(BlockRule::capacity(48)), 16, "`capacity`: 48 of only 16 experts"),
        (elects(BlockRule::vote(0)), 16, "`vote`: must not be 0"),
        (elects(BlockRule::union(65)), 256, "`union`: 65, at most 64"),
        (ExpertChoice::new(99).into(), 16, "`experts_per_token`: 99 of only 16 experts"),
        (
            ExpertChoice::new(9).with_max(99).into(),
            16,
            "`max_experts_per_token`: 99 of only 16 experts",
        ),
        (
            ExpertChoice::new(9).with_max(8).into(),
            16,
            "`max_experts_per_token`: 8 is less than `experts_per_token`, 9",
        ),
        (SequenceTop::new(17).into(), 16, "`experts_per_token`: 17 of only 16 experts"),
        (SequenceTop::new(4).with_scale(f32::INFINITY).into(), 16, "`scale`: inf, must be finite"),
    ] {
        assert_eq!(of(rule, experts), text);
    }
    // What is just allowed.
    for (rule, experts) in [
        (grouped(2, 8, 1), 16),
        (TokenChoice::new(64).into(), 64),
        (elects(BlockRule::mass(1.0)), 16),
        (elects(BlockRule::mass(0.0).with_floor(0)), 16),
        (ExpertChoice::new(16).into(), 16),
        (SequenceTop::new(16).into(), 16),
    ] {
        assert_eq!(rule.check(experts), Ok(()), "{rule:?} of {experts}");
    }
}

#[test]
fn builders_set_what_they_say() {
    let rule = TokenChoice::new(8)
        .with_score(Score::Sigmoid)
        .with_gate(GateRule::Unnormalised)
        .with_groups(8, 4)
        .with_scale(2.5)
        .with_capacity_factor(1.25)
        .with_coreset(BlockRule::mass(0.6).with_floor(12));
    assert_eq!((rule.score, rule.gate), (Score::Sigmoid, GateRule::Unnormalised));
    assert_eq!((rule.experts_per_token, rule.scale), (8, 2.5));
    assert_eq!((rule.groups, rule.capacity_factor), (Some(Groups::new(8, 4)), Some(1.25)));
    assert_eq!(rule.coreset, Some(BlockRule::Mass { p: 0.6, floor: 12 }));
    let plain = rule.without_groups().without_coreset().with_experts_per_token(2);
    assert_eq!((plain.groups, plain.coreset, plain.experts_per_token), (None, None, 2));
    let new = TokenChoice::new(8);
    assert_eq!((new.score, new.gate, new.scale), (Score::Softmax, GateRule::Normalised, 1.0));
    assert_eq!((new.groups, new.capacity_factor, new.coreset), (None, None, None));

    assert_eq!(BlockRule::mass(0.6), BlockRule::Mass { p: 0.6, floor: 16 });
    assert_eq!(BlockRule::vote(38).with_floor(3), BlockRule::Vote(38));

    let rule = ExpertChoice::new(8).with_score(Score::Sigmoid).with_max(32);
    assert_eq!((rule.experts_per_token, rule.max_experts_per_token), (8, 32));
    assert_eq!((rule.score, rule.normalise), (Score::Sigmoid, Normalise::AfterSelection));
    let before = rule.with_normalise(Normalise::BeforeSelection).with_experts_per_token(4);
    assert_eq!((before.normalise, before.experts_per_token), (Normalise::BeforeSelection, 4));
    // The rule's own k, as the one formula has it.
    assert_eq!([512, 7, 1, 0].map(|n| ExpertChoice::new(20).capacity(n, 64)), [160, 2, 1, 0]);

    let rule = SequenceTop::new(8).with_gate(GateRule::Softmax).with_scale(2.0);
    assert_eq!((rule.score, rule.gate, rule.scale), (Score::Softmax, GateRule::Softmax, 2.0));
    assert_eq!(rule.with_experts_per_token(3).experts_per_token, 3);
}

fn shape(experts: u32, hidden: u32, intermediate: u32) -> ExpertShape {
    ExpertShape::new(experts, hidden, intermediate, WeightType::F32)
}

/// Without a limit that is seen first, these would take memory without end.
#[test]
fn pages_without_end() {
    let (device, _) = wgpu::Device::noop(&Default::default());
    let ctx = Context::new(&device).unwrap();
    let new = |shape, limit: Option<u64>| {
        message(ExpertWeights::with_page_limit(&ctx, shape, limit.unwrap_or(u64::MAX)))
    };
    assert_eq!(
        new(shape(2, 12, 1 << 31), Some(18_060)),
        "`page_limit`: 18060 bytes a page make 12201612 pages of Gate, at most 16384"
    );
    assert_eq!(
        new(shape(1 << 30, 8, 8), Some(2048)),
        "`page_limit`: 2048 bytes a page make 536870912 pages of Gate, at most 16384"
    );
    // The device's own limit, of 128 MiB.
    assert_eq!(
        new(shape(1 << 20, 1 << 12, 1 << 12), None),
        "`weights`: 134217728 bytes a page make 524288 pages of Gate, at most 16384"
    );
    assert_eq!(
        new(shape(u32::MAX, u32::MAX, u32::MAX), None),
        "`hidden`: [4294967295, 4294967295, 4294967295] overflows"
    );
    // Not even one panel of columns fits.
    assert_eq!(
        new(shape(2, 12, 64), Some(16)),
        "`page_limit`: 16 bytes, 32 columns of an expert need 1536"
    );
    assert_eq!(
        new(shape(1, 1 << 22, 1), None),
        "`weights`: 536870912 needed, max_storage_buffer_binding_size of this device is 134217728"
    );
}

#[test]
fn shared_experts_that_are_not_there() {
    let (device, _) = wgpu::Device::noop(&Default::default());
    let ctx = Context::new(&device).unwrap();
    let weights = ExpertWeights::new(&ctx, shape(17, 8, 8)).unwrap();
    let new = |shared| MoeExperts::new(&ctx, Activation::Silu, shared, weights.clone());
    assert_eq!(message(new(99)), "`shared_experts`: 99 of only 17 experts, and one must be routed");
    assert_eq!(message(new(17)), "`shared_experts`: 17 of only 17 experts, and one must be routed");
    new(16).unwrap();
}

#[test]
fn shapes_beside_bytes() {
    use wgmoe::ops::token_choice::{Args, Dims, TokenChoice};
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let words = |n: usize| gpu.upload(&vec![0u32; n]);
    let (r, short) = (words(8 * 128), words(8 * 3));
    let args = Args {
        experts_per_token: None,
        values: (&r).into(),
        coresets: None,
        assigned: (&short).into(),
    };
    assert_eq!(
        message(TokenChoice::new(&ctx, 8, 2, None).unwrap().bind(&Dims { tokens: 128 }, args)),
        "`assigned`: expected 128 bytes, [8, 4] u32, got 96"
    );
    let args = gather::Args { x: (&short).into(), token_of: (&r).into(), out: (&r).into() };
    let dims = gather::Dims { tokens: 4, slots: 2, hidden: 8 };
    assert_eq!(
        message(Gather::new(&ctx).unwrap().bind(&dims, args)),
        "`x`: expected 128 bytes, [4, 8] f32, got 96"
    );
}

/// Slices of so many bytes that no kernel can bind, and what is wrong with each: one that starts where
/// none may, one of a buffer that is not for storage, one that has been destroyed.
struct Bad {
    buffers: [wgpu::Buffer; 3],
    apart: u64,
    bytes: u64,
}

impl Bad {
    fn new(gpu: &Gpu, bytes: u64) -> Self {
        let apart = u64::from(gpu.device.limits().min_storage_buffer_offset_alignment) / 2;
        let buffer = |usage| {
            gpu.device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: bytes + apart,
                usage,
                mapped_at_creation: false,
            })
        };
        let usage = wgpu::BufferUsages::STORAGE;
        let buffers = [usage, wgpu::BufferUsages::COPY_DST, usage].map(buffer);
        buffers[2].destroy();
        Self { buffers, apart, bytes }
    }

    /// Binds each, and compares what is said: `name` is the caller's argument.
    #[track_caller]
    fn check<T>(&self, name: &str, bind: impl Fn(Slice<'_>) -> Result<T, Error>) {
        let Self { buffers, apart, bytes } = self;
        let [long, bare, gone] = buffers;
        assert_eq!(
            message(bind(Slice::new(long, *apart, *bytes))),
            format!("`{name}`: offset {apart} is not a multiple of {}", 2 * apart)
        );
        assert_eq!(
            message(bind(Slice::new(bare, 0, *bytes))),
            format!("`{name}`: the buffer lacks STORAGE")
        );
        let text = message(bind(Slice::new(gone, 0, *bytes)));
        assert!(text.starts_with(&format!("wgpu: `{name}`: ")), "{text}");
        assert!(text.contains("destroyed"), "{text}");
    }
}

#[test]
fn a_layers_arguments_by_their_own_names() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let host = HostLayer::new(LayerConfig::new(16, 8, 4, TokenChoice::new(2)));
    let layer = host.layer(&ctx, &gpu.queue).unwrap();
    let routing = MoeRouting::new(&ctx, *layer.config(), layer.router().clone()).unwrap();
    let experts = MoeExperts::new(&ctx, Activation::Silu, 0, layer.weights().clone()).unwrap();
    let bad = Bad::new(&gpu, 2 * 16 * 4);
    let [hidden, out] = [(); 2].map(|()| gpu.upload(&[0f32; 32]));
    let (ids, gates) = (gpu.upload(&[0u32; 6]), gpu.upload(&[0f32; 6]));
    fn of_tokens<'a>(ids: Slice<'a>, gates: Slice<'a>) -> Assignments<'a> {
        Assignments::OfTokens { experts_per_token: 3, ids, gates }
    }
    let good = of_tokens((&ids).into(), (&gates).into());

    fn batch<'a>(hidden: Slice<'a>, out: Slice<'a>) -> Batch<'a> {
        Batch::new(hidden, 2).into_out(out)
    }
    bad.check("hidden", |x| routing.bind(&Batch::new(x, 2)));
    bad.check("hidden", |x| layer.bind(&batch(x, (&out).into())));
    bad.check("out", |x| layer.bind(&batch((&hidden).into(), x)));
    bad.check("hidden", |x| experts.bind(&batch(x, (&out).into()).with_assignments(good)));

    let bind = |assignments: Assignments<'_>| {
        experts.bind(&batch((&hidden).into(), (&out).into()).with_assignments(assignments))
    };
    bind(good).unwrap();
    let six = Bad::new(&gpu, 6 * 4);
    six.check("ids", |x| bind(of_tokens(x, (&gates).into())));
    six.check("gates", |x| bind(of_tokens((&ids).into(), x)));
    assert_eq!(
        message(bind(of_tokens((&ids).into(), Slice::new(&gates, 0, 20)))),
        "`gates`: expected 24 bytes, [2, 3] f32, got 20"
    );
    let offsets = gpu.upload(&[0u32; 5]);
    fn lists<'a>(
        offsets: &'a wgpu::Buffer,
        tokens: Slice<'a>,
        gates: Slice<'a>,
    ) -> Assignments<'a> {
        Assignments::OfExperts { entries: 6, offsets: offsets.into(), tokens, gates }
    }
    bind(lists(&offsets, (&ids).into(), (&gates).into())).unwrap();
    six.check("tokens", |x| bind(lists(&offsets, x, (&gates).into())));
    six.check("gates", |x| bind(lists(&offsets, (&ids).into(), x)));
}

#[test]
fn the_router_by_its_own_names() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let config = LayerConfig::new(16, 8, 4, TokenChoice::new(2));
    let host = HostLayer::new(config).with_bias();
    let hidden = gpu.upload(&[0f32; 32]);
    let bind = |router| MoeRouting::new(&ctx, config, router)?.bind(&Batch::new(&hidden, 2));
    bind(host.router(&ctx).unwrap()).unwrap();
    Bad::new(&gpu, 4 * 16 * 4).check("router weight", |weight| {
        let mut router = host.router(&ctx).unwrap();
        router.weight = weight.into();
        bind(router)
    });
    Bad::new(&gpu, 4 * 4).check("router bias", |bias| {
        let mut router = host.router(&ctx).unwrap();
        router.bias = Some(bias.into());
        bind(router)
    });
}

/// The kernel has one binding for three arguments.
#[test]
fn the_source_of_capacities_by_its_own_name() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let op = Capacity::new(&ctx).unwrap();
    let [offsets, steps] = [3, 2].map(|n| gpu.upload(&vec![0u32; n]));
    let [source, capacity_of, k_of] = [(); 3].map(|()| gpu.upload(&[0u32; 2]));
    let bind = |source: Source<'_>, k_of: Slice<'_>| {
        let args = capacity::Args {
            source,
            offsets: (&offsets).into(),
            lengths: None,
            capacity_of: (&capacity_of).into(),
            k_of,
        };
        op.bind(&capacity::Dims { tokens: 9, experts: 3, sequences: 2 }, args)
    };
    let bad = Bad::new(&gpu, 8);
    type Of = for<'a> fn(Slice<'a>, Slice<'a>) -> Source<'a>;
    let kinds: [(&str, Of); 3] = [
        ("ratios", |ratios, steps| Source::Ratios { ratios, steps }),
        ("masked", |masked, steps| Source::Masked { masked, steps }),
        ("experts_per_token", |k, _| Source::ExpertsPerToken(k)),
    ];
    for (name, of) in kinds {
        bind(of((&source).into(), (&steps).into()), (&k_of).into()).unwrap();
        bad.check(name, |x| bind(of(x, (&steps).into()), (&k_of).into()));
        assert_eq!(
            message(bind(of((&source).into(), (&steps).into()), (&source).into())),
            format!("`k_of` is written and overlaps `{name}`")
        );
    }
}

#[test]
fn scores_by_their_own_name() {
    use wgmoe::ops::scores::{Args, Dims, Scores};
    let Some(gpu) = gpu() else { return };
    let op = Scores::new(&Context::new(&gpu.device).unwrap()).unwrap();
    let [logits, values] = [(); 2].map(|()| gpu.upload(&[0f32; 8]));
    let dims = Dims { tokens: 2, experts: 4, score: Score::Softmax, by_logits: true };
    Bad::new(&gpu, 32).check("scores", |scores| {
        let (logits, values) = ((&logits).into(), (&values).into());
        op.bind(&dims, Args { logits, bias: None, scores, values })
    });
}

/// A plan of larger items than the kernels take would lose rows.
#[test]
fn items_larger_than_the_kernels() {
    let (device, _) = wgpu::Device::noop(&Default::default());
    let ctx = Context::new(&device).unwrap();
    let shape = shape(1, 32, 32);
    let weights = ExpertWeights::new(&ctx, shape).unwrap();
    let buffer = |size| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        })
    };
    let [x, plan, out] = [(); 3].map(|()| buffer(1 << 16));
    let bind = |rows: [u32; 2]| {
        let op = GroupedMatmul::new(&ctx, &shape, Stage::Down).unwrap();
        let plan_shape = PlanShape::on_host(8, 1, 8).with_item_rows(rows[0], rows[1]);
        let words = u64::from(plan_shape.sections().unwrap().words);
        let args = grouped_matmul::Args {
            x: Rows::Slots((&x).into()),
            plan: Slice::new(&plan, 0, 4 * words),
            weights: &weights,
            places: None,
            out: (&out).into(),
            slots: 0..8,
            columns: 0..32,
        };
        op.bind(&plan_shape, args)
    };
    let most = grouped_matmul::tile_rows(&ctx);
    // Of items that are smaller, those of tiles are made too.
    let made = |rows| bind(rows).unwrap().dispatches().len();
    assert_eq!([[most, 8], [8, 8], [most, 4], [most, 0], [4, 4]].map(made), [1, 2, 2, 2, 2]);
    assert_eq!(
        message(bind([most + 1, 8])),
        format!("`tile_rows`: {}, the kernels of this device take at most {most}", most + 1)
    );
    assert_eq!(
        message(bind([most, 9])),
        "`skinny_rows`: 9, the kernels of this device take at most 8"
    );
}
