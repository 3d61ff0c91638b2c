//! One block at once: the fused choice against the twins of the kernels that it stands for, the fused plan against those
//! kernels' bits, and the dispatches of a layer that decodes a block.
use rand::{Rng, SeedableRng, rngs::StdRng};
use testkit::layer::router;
use testkit::prelude::{Output, assert_same, contexts, gpu, random, run};
use testkit::rules::every_block_rule;
use wgmoe::layer::{Batch, Blocks, LayerConfig, MoeLayer, Tensor};
use wgmoe::ops::plan_count::{self, Gates, PlanCount, Scales};
use wgmoe::ops::plan_fill::{self, PlanFill};
use wgmoe::ops::plan_scan::{self, PlanScan};
use wgmoe::ops::{block_choice, block_plan};
use wgmoe::plan::bits;
use wgmoe::routing::GateRule;
use wgmoe::routing::Groups;
use wgmoe::routing::{BlockRule, ExpertChoice, Routing, Score, SequenceTop, TokenChoice};
use wgmoe::{Context, ExpertWeights, Gpu, PlanShape, Target, Variant, WeightType, wgpu};

/// Contexts that differ for kernels without subgroup operations.
fn targets(gpu: &Gpu) -> Vec<Context> {
    contexts(gpu).into_iter().filter(|ctx| !ctx.variant().subgroups).collect()
}

/// Selection values: scores, few values that tie, all equal, NaN and infinities among them, NaN alone.
fn values(kind: usize, tokens: usize, experts: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(kind as u64 + 7);
    let mut r = random((tokens * experts + kind) as u64, tokens * experts);
    match kind {
        0 => r.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-4.0 * *x).exp())),
        1 => r.iter_mut().for_each(|x| *x = (*x * 3.0).round() / 4.0),
        2 => r.fill(0.25),
        3 => {
            let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, -1e30, 3000.0];
            for x in &mut r {
                if rng.random_range(0..3) == 0 {
                    *x = odd[rng.random_range(0..odd.len())];
                }
            }
            let t = rng.random_range(0..tokens);
            r[t * experts..][..experts].fill(f32::NAN);
        }
        _ => r.fill(f32::NAN),
    }
    r
}

struct Case<'a> {
    rule: BlockRule,
    experts: usize,
    top: usize,
    groups: Option<Groups>,
    r: &'a [f32],
    offsets: &'a [u32],
    voters: Option<&'a [u32]>,
}

impl Case<'_> {
    #[track_caller]
    fn check(&self, gpu: &Gpu) {
        let Self { rule, experts, top, groups, r, offsets, voters } = *self;
        let (tokens, blocks) = (r.len() / experts, offsets.len() - 1);
        let want = block_choice::cpu(rule, r, experts, top, groups, offsets, voters);
        let [r, at] = [gpu.upload(r), gpu.upload(offsets)];
        let marked = voters.map(|m| gpu.upload(m));
        for ctx in targets(gpu) {
            let assigned = Output::u32s(gpu, experts);
            let members = Output::u32s(gpu, blocks * experts.div_ceil(32));
            let args = block_choice::Args {
                refresh: None,
                experts_per_token: None,
                values: (&r).into(),
                offsets: (&at).into(),
                voters: marked.as_ref().map(Into::into),
                assigned: assigned.slice(),
                members: members.slice(),
            };
            let dims = block_choice::Dims { tokens: tokens as u32, blocks: blocks as u32 };
            let op = block_choice::BlockChoice::new(&ctx, experts as u32, rule, top as u32, groups)
                .expect("a rule");
            run(gpu, &op.bind(&dims, args).expect("bind"));
            let what = format!(
                "{:?} {rule:?} T {tokens} E {experts} {groups:?} {offsets:?} {voters:?}",
                ctx.variant()
            );
            assert_same(&members.get::<u32>(gpu), &want.1, &format!("{what}: coresets"));
            assert_same(&assigned.get::<u32>(gpu), &want.0, &format!("{what}: assigned"));
        }
    }
}

#[test]
fn the_choice_of_a_block_is_that_of_three_kernels() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts) in [(1, 1), (5, 40), (31, 96), (32, 255), (32, 256), (32, 384)] {
        let top = 8.min(experts);
        for rule in every_block_rule(experts as u32, top as u32) {
            for kind in 0..5 {
                let r = values(kind, tokens, experts);
                let groups = (experts % 8 == 0).then_some(Groups::new(8, 4));
                for groups in [None, groups.filter(|_| kind % 2 == 1)] {
                    let offsets = &[0, tokens as u32];
                    Case { rule, experts, top, groups, r: &r, offsets, voters: None }.check(&gpu);
                }
            }
        }
    }
}

#[test]
fn several_blocks_of_a_column_and_marks() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (32, 96);
    let voters: Vec<u32> = (0..32).map(|t| if t < 13 { 0 } else { t % 3 }).collect();
    // Side by side; gaps before, between and behind; empty ones; offsets that decrease or pass the end.
    let offsets: [&[u32]; 4] =
        [&[0, 13, 32], &[3, 9, 9, 20], &[5, 2, 30, 7, 99], &[0, 1, 2, 3, 4, 5, 6, 7, 32]];
    for rule in every_block_rule(96, 8) {
        for kind in [0, 1, 3] {
            let r = values(kind, tokens, experts);
            for offsets in offsets {
                for (voters, groups) in
                    [(None, None), (Some(&voters[..]), Groups::new(8, 3).into())]
                {
                    Case { rule, experts, top: 8, groups, r: &r, offsets, voters }.check(&gpu);
                }
            }
        }
    }
}

#[test]
fn many_experts_a_token() {
    let Some(gpu) = gpu() else { return };
    let r = values(1, 32, 96);
    for (top, rule) in
        [(33usize, BlockRule::Vote(40)), (64, BlockRule::Union(20)), (1, BlockRule::Vote(5))]
    {
        for groups in [None, Some(Groups::new(32, top.div_ceil(3).max(15) as u32))] {
            Case { rule, experts: 96, top, groups, r: &r, offsets: &[0, 32], voters: None }
                .check(&gpu);
        }
    }
}

#[test]
fn the_plan_of_a_block_has_the_bits_of_three_kernels() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts, shared_experts) in
        [(1, 1, 0), (5, 40, 1), (31, 255, 2), (32, 256, 1), (32, 1024, 0)]
    {
        let mut rng = StdRng::seed_from_u64(u64::from(experts));
        let (t, e) = (tokens as usize, experts as usize);
        let mut assigned = bits::empty(t, e);
        for (i, word) in assigned.iter_mut().enumerate() {
            // Some experts that nobody wants, one that everybody wants; bits past the last token.
            *word = match i % 5 {
                0 | 1 => 0,
                2 => 1 << rng.random_range(0..32u32),
                _ if i == 3 => u32::MAX,
                _ => rng.random::<u32>() & rng.random::<u32>() & rng.random::<u32>(),
            };
        }
        let mut source = random(5, t * e);
        source[0] = f32::NAN;
        source[t * e / 2] = f32::INFINITY;
        let [bits, source] = [gpu.upload(&assigned), gpu.upload(&source)];
        let tables = [e + 1, e].map(|n| gpu.upload(&random(9, n)));
        let offsets = gpu.upload(&[0u32, 9, 4, 99, tokens]);
        let count: u32 = assigned.iter().map(|w| w.count_ones()).sum();
        for (rule, slots) in [
            (GateRule::Softmax, count),
            (GateRule::Normalised, count.div_ceil(2)),
            (GateRule::Unnormalised, count + 9),
        ] {
            let shape = PlanShape::on_host(tokens, experts, slots)
                .with_item_rows(8, 3)
                .with_shared_experts(shared_experts);
            let words = (shape.bytes().unwrap() / 4) as usize;
            let scaled = [[false, false], [true, false], [false, true], [true, true]];
            for (ctx, scaled) in targets(&gpu).iter().flat_map(|ctx| scaled.map(|s| (ctx, s))) {
                let outputs = || {
                    [words, 8 + e]
                        .map(|n| Output::u32s(&gpu, n))
                        .into_iter()
                        .chain([Output::f32s(&gpu, t * e)])
                        .collect::<Vec<_>>()
                };
                let (a, b) = (outputs(), outputs());
                let make = |gates| Gates {
                    rule,
                    source: (&source).into(),
                    scale: 2.5,
                    scales: Scales {
                        scale_by_count: scaled[0].then(|| (&tables[0]).into()),
                        scale_by_expert: scaled[1].then(|| (&tables[1]).into()),
                    },
                    gates,
                };
                let assigned = (&bits).into();
                let args = plan_count::Args {
                    assigned,
                    gates: Some(make(a[2].slice())),
                    plan: a[0].slice(),
                };
                let offsets = Some((&offsets).into());
                let scan = plan_scan::Args {
                    lost: None,
                    offsets,
                    plan: a[0].slice(),
                    stats: a[1].slice(),
                    add_stats: false,
                };
                let fill = plan_fill::Args { assigned, gates: a[2].slice(), plan: a[0].slice() };
                let steps = PlanCount::new(ctx).unwrap().bind(&shape, args).unwrap();
                let steps = steps
                    .then(PlanScan::new(ctx).unwrap().bind(&shape, scan).unwrap())
                    .then(PlanFill::new(ctx).unwrap().bind(&shape, fill).unwrap());
                run(&gpu, &steps);
                let args = block_plan::Args {
                    assigned,
                    gates: make(b[2].slice()),
                    offsets,
                    plan: b[0].slice(),
                    stats: b[1].slice(),
                    add_stats: false,
                };
                let op = block_plan::BlockPlan::new(ctx).unwrap();
                let step = op.bind(&shape, args).unwrap();
                assert_eq!(step.dispatches().len(), 1);
                run(&gpu, &step);
                for (name, (a, b)) in ["plan", "stats", "gates"].iter().zip(a.iter().zip(&b)) {
                    let what = format!(
                        "{:?} T {tokens} E {experts} {rule:?} {scaled:?}: {name}",
                        ctx.variant()
                    );
                    assert_same(&b.get::<u32>(&gpu), &a.get::<u32>(&gpu), &what);
                }
            }
        }
    }
}

/// Tables of factors and what a batch says of its tokens do not fit one kernel together.
#[test]
fn gates_with_tables_take_one_plan_dispatch_too() {
    let (device, _) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    let ctx = Context::new(&device).unwrap();
    let config = LayerConfig::new(4, 4, 8, ExpertChoice::new(2));
    let weights = ExpertWeights::new(&ctx, config.expert_shape(WeightType::F32)).unwrap();
    let tensor = |n: u32| Tensor::new(&ctx, "zeros", &vec![0u32; n as usize]).unwrap();
    let router = router(&ctx, &[0.0; 32], None).unwrap().with_scale_by_count(tensor(9));
    let layer = MoeLayer::new(&ctx, config, router, weights).unwrap();
    let [hidden, out, active] = [tensor(128), tensor(128), tensor(1)];
    let batch = Batch::new(hidden.slice(), 32).into_out(out.slice());
    let plans = |batch: &Batch<'_>| -> Vec<_> {
        let step = layer.bind(batch).unwrap();
        step.dispatches().map(wgmoe::Dispatch::name).filter(|n| n.contains("plan")).collect()
    };
    assert_eq!(plans(&batch), ["block_plan_scaled"]);
    let active = batch.with_active(active.slice());
    assert_eq!(plans(&active), ["plan_count", "plan_scan", "plan_fill"]);
}

/// Dispatches between the logits and the first matmul of the experts.
fn between(
    ctx: &Context,
    tokens: u32,
    experts: u32,
    blocks: Option<u32>,
    routing: Routing,
) -> Vec<&'static str> {
    let config = LayerConfig::new(4, 4, experts, routing).with_shared_experts(1);
    let weights = ExpertWeights::new(ctx, config.expert_shape(WeightType::F32)).unwrap();
    let e = experts as usize;
    let router = router(ctx, &vec![0.0; 4 * e], Some(&vec![0.0; e])).unwrap();
    let layer = MoeLayer::new(ctx, config, router, weights).unwrap();
    let tensor = |n: u32| Tensor::new(ctx, "zeros", &vec![0u32; n as usize]).unwrap();
    let [hidden, out, offsets] = [tensor(4 * tokens), tensor(4 * tokens), tensor(65)];
    let blocks = blocks.map(|count| {
        Blocks::new(count, wgmoe::Slice { size: 4 * (u64::from(count) + 1), ..offsets.slice() })
    });
    let step = layer
        .bind(&{
            let mut batch = Batch::new(hidden.slice(), tokens).into_out(out.slice());
            batch.blocks = blocks;
            batch
        })
        .unwrap();
    let names: Vec<_> = step.dispatches().map(wgmoe::Dispatch::name).collect();
    let matmuls: Vec<usize> =
        (0..names.len()).filter(|&i| names[i].starts_with("matmul")).collect();
    names[matmuls[0] + 1..matmuls[1]].to_vec()
}

#[test]
fn a_decoding_block_takes_three_dispatches_before_its_experts() {
    let (device, _) = wgpu::Device::noop(&wgpu::DeviceDescriptor {
        required_limits: wgpu::Limits::default(),
        ..Default::default()
    });
    for target in [Target::Wide, Target::Serial] {
        let variant = Variant { target, ..Variant::PORTABLE };
        let ctx = Context::with_variant(&device, variant).unwrap();
        let rule = TokenChoice::new(8).with_score(Score::Sigmoid).with_groups(8, 4).with_scale(2.5);
        let block = |rule: TokenChoice, coreset: Option<BlockRule>| {
            Routing::TokenChoice(coreset.map_or(rule, |c| rule.with_coreset(c)))
        };
        for coreset in every_block_rule(256, 8) {
            let routing = block(rule, Some(coreset));
            for blocks in [None, Some(1), Some(8)] {
                let names = between(&ctx, 32, 256, blocks, routing);
                assert_eq!(names, ["scores", "block_choice", "block_plan"], "{coreset:?}");
            }
            // More blocks, tokens or experts than one workgroup takes.
            assert!(!between(&ctx, 32, 256, Some(9), routing).contains(&"block_choice"));
            assert!(!between(&ctx, 33, 256, None, routing).contains(&"block_choice"));
            assert!(!between(&ctx, 32, 392, None, routing).contains(&"block_choice"));
        }
        assert_eq!(between(&ctx, 32, 256, None, block(rule, None)).len(), 3);
        let experts = ExpertChoice::new(8);
        assert_eq!(between(&ctx, 32, 256, None, Routing::ExpertChoice(experts)).len(), 3);
        let pairs = SequenceTop::new(8);
        let names = between(&ctx, 32, 256, None, Routing::SequenceTop(pairs));
        assert_eq!((names[0], *names.last().unwrap()), ("scores", "block_plan"));
        // Drops come between the gates and the plan.
        let dropping = rule.with_capacity_factor(1.0);
        assert!(!between(&ctx, 32, 256, None, block(dropping, None)).contains(&"block_plan"));
    }
}

/// The loops of one lane go over the blocks in turn: of the most experts that tokens may take, from the
/// most there may be, fewer blocks fit than of others. The most that fit are right.
#[test]
fn most_blocks_of_the_longest_loops() {
    let Some(gpu) = gpu() else { return };
    let (experts, top, groups) = (384, 64, Some(Groups::new(32, 32)));
    let r = values(0, 32, experts);
    let mut most = vec![];
    for ctx in targets(&gpu) {
        for rule in every_block_rule(experts as u32, top as u32) {
            let new = |experts, top, groups| {
                block_choice::BlockChoice::new(&ctx, experts, rule, top, groups).unwrap()
            };
            let llada = new(256, 8, Some(Groups::new(8, 4)));
            assert_eq!(llada.max_blocks(), block_choice::MAX_BLOCKS);
            let op = new(experts as u32, top as u32, groups);
            assert!(op.fits(block_choice::Dims { tokens: 32, blocks: op.max_blocks() }));
            most.push(op.max_blocks());
            let all = Tensor::new(&ctx, "r", &r).unwrap();
            let args = block_choice::Args {
                refresh: None,
                experts_per_token: None,
                values: all.slice(),
                offsets: all.slice(),
                voters: None,
                assigned: all.slice(),
                members: all.slice(),
            };
            let blocks = op.max_blocks() + 1;
            let dims = block_choice::Dims { tokens: 32, blocks };
            assert!(!op.fits(dims));
            let text = op.bind(&dims, args).unwrap_err().to_string();
            assert_eq!(text, format!("`blocks`: {blocks}, at most {}", op.max_blocks()));
        }
    }
    let fewest = *most.iter().min().unwrap();
    assert!((4..block_choice::MAX_BLOCKS).contains(&fewest), "{most:?}");
    // Each begins within the turn of the one before.
    let mut offsets: Vec<u32> = (0..fewest).map(|b| 4 * b + 1).collect();
    offsets.push(32);
    for rule in every_block_rule(experts as u32, top as u32) {
        for kind in [0, 1, 3] {
            let r = values(kind, 32, experts);
            Case { rule, experts, top, groups, r: &r, offsets: &offsets, voters: None }.check(&gpu);
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (device, _) = wgpu::Device::noop(&Default::default());
    let ctx = Context::new(&device).unwrap();
    let new = |experts, rule, top| block_choice::BlockChoice::new(&ctx, experts, rule, top, None);
    assert!(new(385, BlockRule::Vote(8), 8).is_err());
    assert!(new(64, BlockRule::Vote(65), 8).is_err());
    assert!(new(64, BlockRule::Vote(8), 65).is_err());
    assert!(new(128, BlockRule::Union(65), 8).is_err());
    let op = new(64, BlockRule::Vote(8), 8).unwrap();
    let tensor = |n: usize| Tensor::new(&ctx, "zeros", &vec![0u32; n]).unwrap();
    let [r, offsets, assigned, members] = [32 * 64, 2, 64, 2].map(tensor);
    let args = block_choice::Args {
        refresh: None,
        experts_per_token: None,
        values: r.slice(),
        offsets: offsets.slice(),
        voters: None,
        assigned: assigned.slice(),
        members: members.slice(),
    };
    let bind = |tokens, blocks, args| op.bind(&block_choice::Dims { tokens, blocks }, args);
    assert!(bind(32, 1, args).is_ok());
    assert!(bind(0, 1, args).unwrap().dispatches().is_empty());
    assert!(bind(32, 0, args).is_err() && bind(33, 1, args).is_err() && bind(32, 9, args).is_err());
    assert!(bind(32, 1, block_choice::Args { voters: Some(offsets.slice()), ..args }).is_err());
    assert!(bind(32, 1, block_choice::Args { assigned: offsets.slice(), ..args }).is_err());
}
