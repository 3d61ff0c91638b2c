//! Every op binds and records on wgpu's noop backend, under WebGPU's default limits, with no optional feature.
//!
//! Long: one list of every op, with its arguments.
use testkit::layer::router;
use testkit::rules::every_rule;
use wgmoe::layer::{Batch, BoundLayer, MoeLayer};
use wgmoe::models::find;
use wgmoe::ops::*;
use wgmoe::routing::{BlockRule, Routing};
use wgmoe::wgpu::{self, BufferUsages};
use wgmoe::{
    Activation, BoundOp, Context, ExpertWeights, PlanShape, SPECS, Score, Slice, Target, Variant,
    WeightType,
};

fn buffer(device: &wgpu::Device, words: u64) -> wgpu::Buffer {
    device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 4 * words.max(4),
        usage: BufferUsages::STORAGE,
        mapped_at_creation: false,
    })
}

/// A slice of the first `words` words of a buffer.
fn words(buffer: &wgpu::Buffer, words: u64) -> Slice<'_> {
    Slice::new(buffer, 0, 4 * words)
}

fn steps(ctx: &Context, tokens: u32, experts: u32) -> wgmoe::Result<Vec<BoundOp>> {
    let (t, e) = (u64::from(tokens), u64::from(experts));
    let columns = t.div_ceil(32);
    let b: Vec<wgpu::Buffer> = (0..8).map(|_| buffer(ctx.device(), (t * e).max(1 << 22))).collect();
    let of = |n| {
        let shape = PlanShape::on_host(n, experts, 4 * tokens).with_item_rows(32, 8);
        shape.with_shared_experts(1)
    };
    let shape = of(tokens);
    let plan = words(&b[7], u64::from(shape.sections()?.words));
    let few = of(tokens.min(32));
    let few_pairs = |i: usize| words(&b[i], u64::from(few.tokens) * e);
    let pairs = |i: usize| words(&b[i], t * e);
    let bits = |i: usize| words(&b[i], columns * e);
    Ok(vec![
        scores::Scores::new(ctx)?.bind(
            &scores::Dims { tokens, experts, score: Score::Softmax, by_logits: false },
            scores::Args {
                logits: pairs(0),
                bias: Some(words(&b[1], e)),
                scores: pairs(2),
                values: pairs(3),
            },
        )?,
        expert_choice::ExpertChoice::new(ctx)?.bind(
            &expert_choice::Dims { tokens, experts, sequences: 2 },
            expert_choice::Args {
                values: pairs(0),
                offsets: words(&b[1], 3),
                lengths: None,
                capacity: words(&b[2], 2),
                assigned: bits(3),
            },
        )?,
        expert_choice::ExpertChoice::new(ctx)?.bind_drop(
            &expert_choice::DropDims { tokens, experts },
            expert_choice::DropArgs {
                gates: pairs(0),
                offsets: words(&b[1], 2),
                capacity: words(&b[2], 1),
                assigned: bits(3),
                dropped: words(&b[4], e),
            },
        )?,
        token_choice::TokenChoice::new(ctx, experts, 4, None)?.bind(
            &token_choice::Dims { tokens },
            token_choice::Args {
                experts_per_token: None,
                values: pairs(0),
                coresets: None,
                assigned: bits(1),
            },
        )?,
        token_choice::TokenChoice::new(ctx, experts, 9, Some(wgmoe::routing::Groups::new(8, 5)))?
            .bind(
            &token_choice::Dims { tokens },
            token_choice::Args {
                experts_per_token: None,
                values: pairs(0),
                coresets: Some(token_choice::Coresets {
                    blocks: 3,
                    coreset: words(&b[1], 3 * e.div_ceil(32)),
                    block_of: words(&b[2], t),
                }),
                assigned: bits(3),
            },
        )?,
        assign::Assign::new(ctx)?.bind(
            &assign::Dims { tokens, experts, experts_per_token: 4 },
            assign::Args {
                ids: words(&b[0], 4 * t),
                weights: words(&b[1], 4 * t),
                assigned: bits(2),
                gates: pairs(3),
                ignored: words(&b[4], columns),
            },
        )?,
        assign_lists::AssignLists::new(ctx)?.bind(
            &assign_lists::Dims { tokens, experts, entries: 3 * tokens },
            assign_lists::Args {
                offsets: words(&b[0], e + 1),
                list: words(&b[1], 3 * t),
                weights: words(&b[2], 3 * t),
                assigned: bits(3),
                gates: pairs(4),
                ignored: words(&b[5], e),
            },
        )?,
        plan_count::PlanCount::new(ctx)?.bind(
            &shape,
            plan_count::Args {
                assigned: bits(0),
                gates: Some(plan_count::Gates {
                    rule: wgmoe::routing::GateRule::Softmax,
                    source: pairs(1),
                    scale: 1.0,
                    scales: plan_count::Scales {
                        scale_by_count: None,
                        scale_by_expert: Some(words(&b[2], e)),
                    },
                    gates: pairs(3),
                }),
                plan,
            },
        )?,
        plan_count::PlanCount::new(ctx)?
            .bind(&shape, plan_count::Args { assigned: bits(0), gates: None, plan })?,
        plan_scan::PlanScan::new(ctx)?.bind(
            &shape,
            plan_scan::Args {
                lost: None,
                offsets: None,
                plan,
                stats: words(&b[1], 8 + e),
                add_stats: false,
            },
        )?,
        plan_fill::PlanFill::new(ctx)?
            .bind(&shape, plan_fill::Args { assigned: bits(0), gates: pairs(1), plan })?,
        block_choice::BlockChoice::new(ctx, experts, BlockRule::Vote(4), 4, None)?.bind(
            &block_choice::Dims { tokens: few.tokens, blocks: 2 },
            block_choice::Args {
                refresh: None,
                experts_per_token: None,
                values: few_pairs(0),
                offsets: words(&b[1], 3),
                voters: Some(words(&b[2], few.tokens.into())),
                assigned: words(&b[3], e),
                members: words(&b[4], 2 * e.div_ceil(32)),
            },
        )?,
        block_plan::BlockPlan::new(ctx)?.bind(
            &few,
            block_plan::Args {
                assigned: words(&b[0], e),
                gates: plan_count::Gates {
                    rule: wgmoe::routing::GateRule::Normalised,
                    source: few_pairs(1),
                    scale: 1.0,
                    scales: plan_count::Scales { scale_by_count: None, scale_by_expert: None },
                    gates: few_pairs(2),
                },
                offsets: None,
                plan: words(&b[7], u64::from(few.sections()?.words)),
                stats: words(&b[3], 8 + e),
                add_stats: false,
            },
        )?,
        block_plan::BlockPlan::new(ctx)?.bind(
            &few,
            block_plan::Args {
                assigned: words(&b[0], e),
                gates: plan_count::Gates {
                    rule: wgmoe::routing::GateRule::Normalised,
                    source: few_pairs(1),
                    scale: 1.0,
                    scales: plan_count::Scales {
                        scale_by_count: Some(words(&b[4], e + 1)),
                        scale_by_expert: Some(words(&b[5], e)),
                    },
                    gates: few_pairs(2),
                },
                offsets: None,
                plan: words(&b[7], u64::from(few.sections()?.words)),
                stats: words(&b[3], 8 + e),
                add_stats: false,
            },
        )?,
        coverage::Coverage::new(ctx)?.bind(
            &coverage::Dims { tokens, experts, blocks: 2 },
            coverage::Args {
                own_choice: bits(0),
                members: words(&b[1], 2 * e.div_ceil(32)),
                offsets: words(&b[2], 3),
                coverage: words(&b[3], 4),
            },
        )?,
        active_rows::ActiveRows::new(ctx)?.bind(
            &active_rows::Dims { tokens, sequences: 2 },
            active_rows::Args {
                offsets: words(&b[0], 3),
                lengths: words(&b[1], 2),
                rows: words(&b[2], columns),
                capacities: None,
            },
        )?,
        expert_lists::ExpertLists::new(ctx)?.bind(
            &expert_lists::Dims { tokens, experts, room: 64 },
            expert_lists::Args {
                assigned: bits(0),
                offsets: words(&b[1], e + 1),
                list: words(&b[2], 64),
                lost: words(&b[3], e),
            },
        )?,
        gather::Gather::new(ctx)?.bind(
            &gather::Dims { tokens, slots: 2 * tokens, hidden: 6 },
            gather::Args {
                x: words(&b[0], 6 * t).into(),
                token_of: words(&b[1], 2 * t),
                out: words(&b[2], 12 * t),
            },
        )?,
        combine::Combine::new(ctx)?.bind(
            &shape,
            combine::Args {
                y: words(&b[0], 8 * u64::from(shape.slots()?)),
                plan,
                out: words(&b[1], 8 * t).into(),
                columns: 0..8,
                hidden: 8,
                add: true,
            },
        )?,
        gates_backward::GatesBackward::new(ctx)?.bind(
            &shape,
            gates_backward::Rule {
                gate: wgmoe::routing::GateRule::Normalised,
                score: Score::Sigmoid,
                scale: 2.0,
            },
            gates_backward::Args {
                dgates: words(&b[0], shape.slots()?.into()),
                plan,
                chosen: bits(1),
                source: pairs(2),
                scales: plan_count::Scales {
                    scale_by_count: Some(words(&b[3], e + 1)),
                    scale_by_expert: Some(words(&b[4], e)),
                },
                dlogits: pairs(5),
            },
        )?,
        router_loss::RouterLoss::new(ctx)?.bind(
            &router_loss::Dims { tokens, experts, experts_per_token: 4 },
            router_loss::Coefficients { router_z: 1e-3, balance: 0.01 },
            router_loss::Args {
                logits: pairs(0),
                counts: Some(router_loss::Counts::Plan(shape, plan)),
                dropped: Some(words(&b[1], e)),
                dlogits: pairs(2),
                add: true,
                terms: words(&b[3], 2 * t),
                values: words(&b[4], 2),
                add_values: false,
            },
        )?,
        balance_loss::BalanceLoss::new(ctx)?.bind(
            &balance_loss::Dims { tokens, experts, experts_per_token: 4 },
            0.01,
            balance_loss::Args {
                logits: pairs(0),
                taken: balance_loss::Taken::Plan(shape, plan),
                dlogits: pairs(2),
                add: true,
                terms: words(&b[3], e),
                values: words(&b[4], 2),
                add_values: false,
            },
        )?,
        cross_entropy::CrossEntropy::new(ctx)?.bind(
            &cross_entropy::Dims { tokens, classes: experts },
            cross_entropy::Args {
                logits: pairs(0),
                targets: words(&b[1], t),
                weights: words(&b[2], t),
                dlogits: pairs(3),
                losses: words(&b[4], t),
                value: words(&b[5], 1),
            },
        )?,
        bias_update::BiasUpdate::new(ctx)?.bind(
            experts,
            0.001,
            bias_update::Args { counts: words(&b[0], e), bias: words(&b[1], e) },
        )?,
        capacity::Capacity::new(ctx)?.bind(
            &capacity::Dims { tokens, experts, sequences: 2 },
            capacity::Args {
                source: capacity::Source::Ratios {
                    ratios: words(&b[0], 2),
                    steps: words(&b[1], 8),
                },
                offsets: words(&b[2], 3),
                lengths: None,
                capacity_of: words(&b[3], 2),
                k_of: words(&b[4], 2),
            },
        )?,
        activation::Activate::new(ctx, Activation::Silu)?.bind(
            &shape,
            activation::Args {
                z: words(&b[0], 8 * u64::from(shape.slots()?)),
                plan,
                h: words(&b[1], 4 * u64::from(shape.slots()?)),
                intermediate: 4,
            },
        )?,
        activation_gradient::ActivationGradient::new(ctx, Activation::Silu)?.bind(
            &shape,
            activation_gradient::Args {
                z: words(&b[0], 8 * u64::from(shape.slots()?)),
                plan,
                dz: words(&b[1], 8 * u64::from(shape.slots()?)),
                hg: words(&b[2], 4 * u64::from(shape.slots()?)),
                dgate: words(&b[3], shape.slots()?.into()),
                intermediate: 4,
            },
        )?,
        matmul_transposed::Dense::new(ctx, experts, 4)?.bind(
            tokens,
            matmul_transposed::DenseArgs {
                g: pairs(0),
                weights: words(&b[1], 4 * e),
                out: words(&b[2], 4 * t),
                add: false,
            },
        )?,
        weight_gradient::Dense::new(ctx, experts, 4)?.bind(
            tokens,
            weight_gradient::DenseArgs {
                a: pairs(0),
                b: words(&b[1], 4 * t),
                out: words(&b[2], 4 * e),
                add: true,
            },
        )?,
        expert_union::ExpertUnion::new(ctx)?.bind(
            &expert_union::Dims { tokens, experts, blocks: 5, expert_bytes: 1 << 33 },
            expert_union::Args {
                assigned: bits(0),
                offsets: words(&b[1], 6),
                members: words(&b[2], 5 * e.div_ceil(32)),
                counts: words(&b[3], 5),
                bytes: words(&b[4], 10),
                totals: None,
            },
        )?,
    ])
}

/// Layers of every kind of rule, bound to `tokens` tokens.
fn layers(ctx: &Context, tokens: u32) -> wgmoe::Result<Vec<BoundLayer>> {
    let (x, out) = (
        buffer(ctx.device(), 64 * u64::from(tokens)),
        buffer(ctx.device(), 64 * u64::from(tokens)),
    );
    let config = find("llada2-mini").unwrap().config;
    // Experts choose by logits too.
    let softmax = ("EC-DLM's".into(), find("ec-dlm").unwrap().config.routing);
    every_rule(config.routing, 64)
        .into_iter()
        .chain([softmax])
        .map(|(_, routing)| {
            let config = {
                let mut config = config.with_routing(routing);
                config.hidden = 64;
                config.intermediate = 32;
                config.experts = 64;
                config
            };
            let weights = ExpertWeights::new(ctx, config.expert_shape(WeightType::Bf16))?;
            let router = router(ctx, &[0.0; 64 * 64], None)?;
            let layer = MoeLayer::new(ctx, config, router, weights)?;
            let n = 64 * u64::from(tokens);
            layer.bind(&Batch::new(words(&x, n), tokens).into_out(words(&out, n)))
        })
        .collect()
}

#[test]
fn every_op_records_under_default_limits() {
    let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor {
        required_limits: wgpu::Limits::default(),
        required_features: wgpu::Features::empty(),
        ..Default::default()
    });
    let mut recorded: Vec<&str> = vec![];
    let wide = Variant::PORTABLE;
    let small_items = Variant { small_items: true, ..wide };
    let serial = Variant { target: Target::Serial, ..wide };
    for variant in [wide, small_items, serial] {
        let ctx = Context::with_variant(&device, variant).unwrap();
        // 70,000 tokens: more groups than a dimension of the grid holds.
        for (tokens, experts) in [(33, 40), (70_000, 16)] {
            let steps = steps(&ctx, tokens, experts).unwrap();
            let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
            let mut encoder = device.create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&Default::default());
            for step in &steps {
                assert!(!step.dispatches().is_empty());
                step.record(&mut pass);
                step.record(&mut pass);
                recorded.extend(step.dispatches().iter().map(wgmoe::Dispatch::name));
            }
            drop(pass);
            queue.submit([encoder.finish()]);
            assert_eq!(pollster::block_on(scope.pop()).map(|e| e.to_string()), None);
        }
        for tokens in [1, 33, 5000] {
            for step in layers(&ctx, tokens).unwrap() {
                let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
                let mut encoder = device.create_command_encoder(&Default::default());
                step.encode(&mut encoder);
                queue.submit([encoder.finish()]);
                assert_eq!(pollster::block_on(scope.pop()).map(|e| e.to_string()), None);
                recorded.extend(step.dispatches().map(wgmoe::Dispatch::name));
            }
        }
    }
    // Matrix units need features.
    for spec in SPECS.iter().filter(|spec| !spec.name.ends_with("_matrix")) {
        assert!(recorded.contains(&spec.name), "{} was not recorded: add it above", spec.name);
    }
}

/// Hidden states and outputs of more than a binding, where bindings start at multiples of 256 bytes.
#[test]
fn windows_of_tensors_are_aligned() {
    let limits =
        wgpu::Limits { max_storage_buffer_binding_size: 48 << 10, ..wgpu::Limits::default() };
    assert_eq!(limits.min_storage_buffer_offset_alignment, 256);
    let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor {
        required_limits: limits,
        ..Default::default()
    });
    let ctx = Context::with_variant(&device, Variant::PORTABLE).unwrap();
    let base = find("llada2-mini").unwrap().config;
    let Routing::TokenChoice(rule) = base.routing else { unreachable!() };
    let routing = Routing::TokenChoice(rule.without_groups().with_experts_per_token(3));
    for hidden in [504, 508, 512] {
        let config = {
            let mut config = base.with_routing(routing);
            config.hidden = hidden;
            config.intermediate = 40;
            config.experts = 12;
            config
        };
        let weights = ExpertWeights::new(&ctx, config.expert_shape(WeightType::Bf16)).unwrap();
        let router = router(&ctx, &vec![0.0; 12 * hidden as usize], None).unwrap();
        let layer = MoeLayer::new(&ctx, config, router, weights).unwrap();
        let tokens = 90;
        let [x, out] = [0; 2].map(|_| buffer(&device, 64 + 90 * u64::from(hidden)));
        let slice = |b| Slice::new(b, 256, 4 * 90 * u64::from(hidden));
        let step = layer.bind(&Batch::new(slice(&x), tokens).into_out(slice(&out))).unwrap();
        let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let mut encoder = device.create_command_encoder(&Default::default());
        step.encode(&mut encoder);
        queue.submit([encoder.finish()]);
        assert_eq!(pollster::block_on(scope.pop()).map(|e| e.to_string()), None);
        let count = |name| step.dispatches().filter(|d| d.name() == name).count();
        assert!(count("gather") > 20 && count("combine") > 10, "{hidden}");
        let logits = step.dispatches().filter(|d| d.stage() == Some("logits")).count();
        assert!((4..=6).contains(&logits), "{hidden}: {logits}");
    }
}

#[test]
fn no_tokens_are_no_work() {
    let (device, _) = wgpu::Device::noop(&Default::default());
    let ctx = Context::new(&device).unwrap();
    let b = buffer(&device, 64);
    let nothing = words(&b, 0);
    let dims = scores::Dims { tokens: 0, experts: 4, score: Score::Sigmoid, by_logits: true };
    let args = scores::Args { logits: nothing, bias: None, scores: nothing, values: nothing };
    let step = scores::Scores::new(&ctx).unwrap().bind(&dims, args).unwrap();
    assert!(step.dispatches().is_empty());
    let args = token_choice::Args {
        experts_per_token: None,
        values: nothing,
        coresets: None,
        assigned: nothing,
    };
    let op = token_choice::TokenChoice::new(&ctx, 8, 2, None).unwrap();
    assert!(op.bind(&token_choice::Dims { tokens: 0 }, args).unwrap().dispatches().is_empty());
    let args = gather::Args { x: words(&b, 4).into(), token_of: nothing, out: nothing };
    let dims = gather::Dims { tokens: 1, slots: 0, hidden: 4 };
    assert!(gather::Gather::new(&ctx).unwrap().bind(&dims, args).unwrap().dispatches().is_empty());
    let dims = expert_choice::Dims { tokens: 0, experts: 4, sequences: 1 };
    let args = expert_choice::Args {
        values: nothing,
        offsets: words(&b, 2),
        lengths: None,
        capacity: words(&b, 1),
        assigned: nothing,
    };
    let op = expert_choice::ExpertChoice::new(&ctx).unwrap();
    assert!(op.bind(&dims, args).unwrap().dispatches().is_empty());
}
