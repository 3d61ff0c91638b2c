//! Training steps of whole layers: against the twin, and what bad input gets.
use testkit::golden::expert_gradients;
use testkit::layer::HostLayer;
use testkit::prelude::*;
use testkit::rules::every_rule;
use wgmoe::layer::{
    Batch, BoundBackward, BoundLayer, HostBatch, HostForward, HostGradients, LayerConfig, Losses,
    MoeLayer, Scratch, Sequences, TrainingBatch, TrainingSizes, cpu_backward,
};
use wgmoe::ops::router_loss::{self, Coefficients};
use wgmoe::ops::{balance_loss, logits, scores};
use wgmoe::plan::bits;
use wgmoe::routing::{Activation, ExpertChoice, GateRule, Routing, SequenceTop, TokenChoice};
use wgmoe::weights::ExpertGradients;
use wgmoe::{Context, Gpu, Result, Score, Slice, WeightType, wgpu};

const TOKENS: u32 = 45;

/// A layer, and the buffers of its training.
struct Trained {
    host: HostLayer,
    layer: MoeLayer,
    hidden: Vec<f32>,
    dout: Vec<f32>,
    /// Hidden states, the gradient of the output, the output, the gradient of the hidden states, that of
    /// the router, values of losses.
    buffers: [wgpu::Buffer; 6],
    experts: ExpertGradients,
}

impl Trained {
    fn new(gpu: &Gpu, ctx: &Context, config: LayerConfig, weight_type: WeightType) -> Self {
        let host = HostLayer::new(config).stored_as(weight_type);
        let layer = host.layer_as(ctx, &gpu.queue, weight_type, None).unwrap();
        let size = (TOKENS * config.hidden) as usize;
        let (hidden, dout) = (random(4, size), random(5, size));
        let poison = |len: usize| gpu.upload(&vec![f32::NAN; len]);
        let buffers = [
            gpu.upload(&hidden),
            gpu.upload(&dout),
            poison(size),
            poison(size),
            poison(host.router.len()),
            poison(2),
        ];
        let experts = ExpertGradients::new(ctx, &layer.weights().shape()).unwrap();
        Self { host, layer, hidden, dout, buffers, experts }
    }

    fn batch(&self) -> Batch<'_> {
        Batch::new(&self.buffers[0], TOKENS).into_out(&self.buffers[2])
    }

    /// What learns: everything.
    fn of(&self) -> TrainingBatch<'_> {
        let [_, dout, _, dhidden, drouter, _] = &self.buffers;
        TrainingBatch::new(self.batch(), dout, dhidden)
            .with_router_gradient(drouter)
            .with_expert_gradients(&self.experts)
    }

    fn run(&self, gpu: &Gpu, of: &TrainingBatch<'_>) -> HostGradients {
        let [first, _] = self.run_twice(gpu, of, 1);
        first
    }

    /// The first and the last of some runs of one binding.
    fn run_twice(&self, gpu: &Gpu, of: &TrainingBatch<'_>, runs: usize) -> [HostGradients; 2] {
        let bound = self.layer.bind_training(of).unwrap();
        let first = self.step(gpu, &bound);
        let last = (1..runs).fold(first.clone(), |_, _| self.step(gpu, &bound));
        [first, last]
    }

    fn step(&self, gpu: &Gpu, (forward, backward): &(BoundLayer, BoundBackward)) -> HostGradients {
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        forward.encode(&mut encoder);
        backward.encode(&mut encoder).unwrap();
        gpu.queue.submit([encoder.finish()]);
        HostGradients {
            hidden: gpu.download(&self.buffers[3]).unwrap(),
            router: gpu.download(&self.buffers[4]).unwrap(),
            experts: expert_gradients(gpu, &self.experts).unwrap(),
            gates: vec![],
            logits: gpu.download(backward.dlogits()).unwrap(),
        }
    }

    /// The twin's gradients, with losses of these coefficients, and their values.
    fn twin(&self, of: Coefficients, residual: bool) -> (HostGradients, [f32; 2]) {
        let config = &self.host.config;
        let (d, e, routing) = (config.hidden as usize, config.experts as usize, config.routing);
        let g = logits::cpu(&self.hidden, &self.host.router, d);
        let (s, r) = scores::cpu(&g, e, routing.score(), routing.by_logits(), None);
        let routed = self.host.routing(HostBatch::default(), [&g, &s, &r]);
        let tokens = TOKENS as usize;
        let k = routing.experts_per_token();
        let dims = router_loss::Dims { tokens: TOKENS, experts: e as u32, experts_per_token: k };
        let counts: Vec<u32> =
            (0..e).map(|e| bits::tokens_of(&routed.chosen, tokens, e).len() as u32).collect();
        let by_experts = matches!(routing, Routing::ExpertChoice(_));
        let own = Coefficients { balance: if by_experts { 0.0 } else { of.balance }, ..of };
        let (mut values, mut dlogits) = router_loss::cpu(&dims, own, &g, &counts);
        if by_experts {
            let taken: Vec<u32> = (0..tokens)
                .map(|t| bits::experts_of(&routed.assigned, tokens, t).len() as u32)
                .collect();
            let dims =
                balance_loss::Dims { tokens: TOKENS, experts: e as u32, experts_per_token: k };
            let (value, more) = balance_loss::cpu(&dims, of.balance, &g, &taken);
            values[1] = value;
            dlogits.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        }
        let forward =
            HostForward { hidden: &self.hidden, routing: &routed, logits: &g, scores: &s };
        let matrix = |e, p| self.host.matrix(e, p);
        let (router, dout) = (self.host.host_router(), &self.dout);
        let all = cpu_backward(config, &router, &matrix, forward, dout, Some(&dlogits), residual);
        (all, values)
    }
}

fn compare(got: &HostGradients, want: &HostGradients, what: &str) {
    let near = |got: &[f32], want: &[f32], name: &str| {
        assert_close(got, want, 2e-4, 2e-4, &format!("{what}: {name}"));
    };
    near(&got.logits, &want.logits, "logits");
    near(&got.router, &want.router, "router");
    near(&got.experts.concat().concat(), &want.experts.concat().concat(), "experts");
    near(&got.hidden, &want.hidden, "hidden");
}

/// The bits of all gradients.
fn bits_of(got: &HostGradients) -> Vec<u32> {
    let all = [&got.hidden, &got.router, &got.logits];
    all.into_iter().chain(got.experts.iter().flatten()).flat_map(|v| exact(v)).collect()
}

fn config(routing: impl Into<Routing>) -> LayerConfig {
    LayerConfig::new(20, 12, 16, routing).with_shared_experts(1)
}

/// Every rule, in every variant: dropped slots, dense rows, coresets, groups.
#[test]
fn every_rule_equals_the_twin() {
    let Some(gpu) = gpu() else { return };
    let own = TokenChoice::new(4).with_score(Score::Sigmoid).with_groups(4, 2).with_scale(2.5);
    let mut rules = every_rule(own.into(), 16);
    let more: [(&str, Routing); 4] = [
        ("drop", TokenChoice::new(3).with_gate(GateRule::Softmax).with_capacity_factor(0.8).into()),
        ("dense", TokenChoice::new(3).with_gate(GateRule::Unnormalised).into()),
        ("expert choice", ExpertChoice::new(3).into()),
        ("sequence top", SequenceTop::new(3).with_gate(GateRule::Softmax).into()),
    ];
    rules.extend(more.map(|(name, rule)| (name.into(), rule)));
    for ctx in contexts(&gpu) {
        for (i, (name, routing)) in rules.iter().enumerate() {
            let what = format!("{} {name}", variant_name(&ctx));
            let activation = if i % 2 == 0 { Activation::Silu } else { Activation::Gelu };
            let config = config(*routing).with_activation(activation);
            let trained = Trained::new(&gpu, &ctx, config, WeightType::F32);
            let (want, _) = trained.twin(Coefficients::default(), false);
            let [got, again] = trained.run_twice(&gpu, &trained.of(), 2);
            compare(&got, &want, &what);
            assert_same(&bits_of(&again), &bits_of(&got), "twice");
        }
    }
}

#[test]
fn losses_and_the_residual_are_added() {
    let Some(gpu) = gpu() else { return };
    let drop = TokenChoice::new(3).with_gate(GateRule::Softmax).with_capacity_factor(0.8);
    let rules: [Routing; 3] =
        [TokenChoice::new(3).into(), drop.into(), ExpertChoice::new(3).into()];
    for ctx in contexts(&gpu) {
        for routing in rules {
            let trained = Trained::new(&gpu, &ctx, config(routing), WeightType::F32);
            let coefficients = Coefficients { router_z: 0.7, balance: 30.0 };
            let losses = Losses::new(coefficients, &trained.buffers[5]);
            let of = trained.of().with_losses(losses).with_residual();
            let (want, values) = trained.twin(coefficients, true);
            let what = format!("{} {routing:?}", variant_name(&ctx));
            compare(&trained.run(&gpu, &of), &want, &what);
            let got: Vec<f32> = gpu.download(&trained.buffers[5]).unwrap();
            assert_close(&got, &values, 1e-5, 1e-4, &what);
            // Over layers they add up.
            trained.run(&gpu, &trained.of().with_losses(losses.added()));
            let got: Vec<f32> = gpu.download(&trained.buffers[5]).unwrap();
            assert_close(&got, &values.map(|v| 2.0 * v), 1e-5, 1e-4, &what);
        }
    }
}

/// Weights in bf16 learn as those in f32 do; experts in a few bits let gradients through.
#[test]
fn weights_of_other_types() {
    let Some(gpu) = gpu() else { return };
    // Matmuls do not know of subgroups where they are not matrix units.
    for ctx in contexts(&gpu).into_iter().filter(|c| !c.variant().subgroups) {
        for weight_type in [WeightType::Bf16, WeightType::Q4_0] {
            let mut config = config(TokenChoice::new(3));
            (config.hidden, config.intermediate) = (64, 32);
            let trained = Trained::new(&gpu, &ctx, config, weight_type);
            let (want, _) = trained.twin(Coefficients::default(), false);
            let what = format!("{} {weight_type:?}", variant_name(&ctx));
            if weight_type == WeightType::Bf16 {
                compare(&trained.run(&gpu, &trained.of()), &want, &what);
                continue;
            }
            let error = trained.layer.bind_training(&trained.of()).unwrap_err().to_string();
            let name = weight_type.name();
            let told = format!("`experts`: {name} weights cannot learn: f32 and bf16 can");
            assert_eq!(error, told);
            let mut of = trained.of();
            of.experts = None;
            let got = trained.run(&gpu, &of);
            let got = HostGradients { experts: want.experts.clone(), ..got };
            compare(&got, &want, &what);
        }
    }
}

/// Gradients of two micro-batches add up; an expert without tokens gets zeros, or is left alone.
#[test]
fn gradients_add_up() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        let trained = Trained::new(&gpu, &ctx, config(TokenChoice::new(1)), WeightType::F32);
        let once = trained.run(&gpu, &trained.of());
        let idle = once.experts.iter().filter(|m| m.iter().flatten().all(|v| *v == 0.0)).count();
        assert!(once.experts.iter().flatten().flatten().all(|v| v.is_finite()));
        let twice = trained.run(&gpu, &trained.of().adding());
        for (once, twice) in once.experts.iter().flatten().zip(twice.experts.iter().flatten()) {
            let want: Vec<f32> = once.iter().map(|v| 2.0 * v).collect();
            assert_close(twice, &want, 1e-5, 1e-5, &variant_name(&ctx));
        }
        let want: Vec<f32> = once.router.iter().map(|v| 2.0 * v).collect();
        assert_close(&twice.router, &want, 1e-5, 1e-5, "router");
        assert_same(&exact(&twice.hidden), &exact(&once.hidden), "hidden states' is written");
        println!("{}: {idle} experts without tokens", variant_name(&ctx));
    }
}

/// A NaN in one token's `dout` reaches that token's gradient and no other's, and the weights of its
/// experts alone.
#[test]
fn nan_goes_through() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        let config = config(TokenChoice::new(2)).with_shared_experts(0);
        let mut trained = Trained::new(&gpu, &ctx, config, WeightType::F32);
        let d = config.hidden as usize;
        trained.dout[7 * d + 3] = f32::NAN;
        trained.buffers[1] = gpu.upload(&trained.dout);
        let (want, _) = trained.twin(Coefficients::default(), false);
        let got = trained.run(&gpu, &trained.of());
        let nan = |v: &[f32]| v.iter().map(|v| v.is_nan()).collect::<Vec<_>>();
        assert_same(&nan(&got.hidden), &nan(&want.hidden), "hidden");
        assert_same(&nan(&got.logits), &nan(&want.logits), "logits");
        for (e, (got, want)) in got.experts.iter().zip(&want.experts).enumerate() {
            assert_same(&nan(&got.concat()), &nan(&want.concat()), &format!("expert {e}"));
        }
        assert!(nan(&got.hidden)[..7 * d].iter().all(|nan| !nan));
    }
}

/// What is said beforehand is what is taken, for every rule; layers share scratch.
#[test]
fn bytes_are_said_beforehand() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let own = TokenChoice::new(4).with_score(Score::Sigmoid).with_groups(4, 2);
    let mut rules = every_rule(own.into(), 16);
    rules.push(("drop".into(), TokenChoice::new(3).with_capacity_factor(0.8).into()));
    rules.push(("expert choice".into(), ExpertChoice::new(3).into()));
    for (name, routing) in rules {
        let trained = Trained::new(&gpu, ctx, config(routing), WeightType::F32);
        let mut kept = 0;
        for recompute_z in [false, true] {
            let scratch = Scratch::new(ctx);
            let mut of = trained.of();
            of.batch = of.batch.with_scratch(&scratch);
            of = of.with_losses(Losses::new(Coefficients::default(), &trained.buffers[5]));
            of.recompute_z = recompute_z;
            let mut sizes = TrainingSizes::new(TOKENS);
            sizes.recompute_z = recompute_z;
            let said = trained.layer.training_bytes(&sizes).unwrap();
            if matches!(routing, Routing::SequenceTop(_)) {
                of.losses = of.losses.map(|mut losses| {
                    losses.coefficients.balance = 0.0;
                    losses
                });
            }
            let (_, backward) = trained.layer.bind_training(&of).unwrap();
            assert_eq!(backward.saved_bytes(), said.saved, "{name}: saved");
            assert_eq!(scratch.bytes(), said.scratch, "{name}: scratch");
            let (_, second) = trained.layer.bind_training(&of).unwrap();
            assert_eq!(second.saved_bytes(), said.saved);
            assert_eq!(scratch.bytes(), said.scratch, "{name}: shared");
            if recompute_z {
                assert!(said.saved < kept, "{name}");
            }
            kept = said.saved;
        }
    }
}

/// The message of the error that a change of the step leads to.
fn refused(
    trained: &Trained,
    change: impl for<'a> Fn(&'a Trained, &mut TrainingBatch<'a>),
) -> String {
    let mut of = trained.of();
    change(trained, &mut of);
    trained.layer.bind_training(&of).unwrap_err().to_string()
}

#[test]
fn bad_input_is_an_error() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let trained = Trained::new(&gpu, ctx, config(TokenChoice::new(2)), WeightType::F32);
    let all = (TOKENS * 20 * 4) as u64;
    let short = refused(&trained, |t, of| of.dout = Slice::new(&t.buffers[1], 0, all - 4));
    assert!(short.starts_with("`dout`: expected 3600 bytes, [45, 20] f32, got 3596"), "{short}");
    let short = refused(&trained, |t, of| of.dhidden = Slice::new(&t.buffers[3], 0, all - 4));
    assert!(short.starts_with("`dhidden`: expected 3600 bytes"), "{short}");
    let short = refused(&trained, |t, of| of.router = Some((&t.buffers[5]).into()));
    assert!(short.starts_with("`router`: expected 1280 bytes"), "{short}");
    let over = refused(&trained, |t, of| of.dhidden = (&t.buffers[0]).into());
    assert!(over.contains("`dhidden`") && over.contains("`hidden`"), "{over}");
    let over = refused(&trained, |t, of| of.dhidden = (&t.buffers[1]).into());
    assert!(over.contains("`dhidden`") && over.contains("`dout`"), "{over}");
    let none = refused(&trained, |_, of| of.batch.tokens = 0);
    assert_eq!(none, "`tokens`: must not be 0");
    let none = refused(&trained, |_, of| of.batch.out = None);
    assert!(none.starts_with("`out`: missing"), "{none}");
    let other = trained.layer.weights().shape();
    let fewer =
        ExpertGradients::new(ctx, &config(TokenChoice::new(2)).expert_shape(WeightType::F32));
    assert_eq!(fewer.unwrap().shape().experts, other.experts);
    let mut wrong = other;
    wrong.experts = 3;
    let wrong = ExpertGradients::new(ctx, &wrong).unwrap();
    let mut of = trained.of();
    of.experts = Some(&wrong);
    let error = trained.layer.bind_training(&of).unwrap_err().to_string();
    let told = "`experts`: [experts, D, F] of [3, 20, 12], the weights' are [17, 20, 12]";
    assert_eq!(error, told);
    let unread = refused(&trained, |t, of| {
        of.batch = of.batch.with_sequences(Sequences::new(1, &t.buffers[5]));
    });
    assert!(unread.starts_with("`sequences`"), "{unread}");

    let half = gpu.upload(&vec![0u16; (TOKENS * 20) as usize]);
    let mut of = trained.of();
    of.batch.hidden = wgmoe::Floats::new(&half, wgmoe::FloatType::Bf16);
    let error = trained.layer.bind_training(&of).unwrap_err().to_string();
    assert_eq!(error, "`hidden`: bf16, training takes f32");

    let pairs = Trained::new(&gpu, ctx, config(SequenceTop::new(2)), WeightType::F32);
    let of = Coefficients { router_z: 0.0, balance: 1.0 };
    let of = pairs.of().with_losses(Losses::new(of, &pairs.buffers[5]));
    let error = pairs.layer.bind_training(&of).unwrap_err().to_string();
    assert_eq!(error, "`losses`: this rule has no balance loss");
}

#[test]
fn a_backward_pass_waits_for_its_forward_pass() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let trained = Trained::new(&gpu, ctx, config(TokenChoice::new(2)), WeightType::F32);
    let (forward, backward) = trained.layer.bind_training(&trained.of()).unwrap();
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    let error: Result<()> = backward.encode(&mut encoder);
    assert_eq!(error.unwrap_err().to_string(), "`backward`: recorded before its forward pass");
    forward.encode(&mut encoder);
    backward.encode(&mut encoder).unwrap();
    gpu.queue.submit([encoder.finish()]);
    gpu.wait().unwrap();
}
