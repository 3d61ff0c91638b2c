//! The module as it learns: its gradients against those of Burn's own autodiff, optimizers, records.
use burn::module::Module;
use burn::optim::{AdamConfig, GradientsParams};
use burn::store::ModuleRecord;
use burn::tensor::{Device, Distribution, Tensor, activation};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use wgmoe_burn::wgmoe::WeightType;
use wgmoe_burn::wgmoe::layer::LayerConfig;
use wgmoe_burn::wgmoe::ops::router_loss::Coefficients;
use wgmoe_burn::wgmoe::routing::{ExpertChoice, TokenChoice};
use wgmoe_burn::{MoeDevice, MoeFfn, MoeTensors, Reference};

const D: usize = 64;
const TOP: u32 = 3;
const TOKENS: usize = 70;

/// One device serves all tests: Burn makes it once.
fn device() -> MoeDevice {
    static DEVICE: OnceLock<MoeDevice> = OnceLock::new();
    DEVICE.get_or_init(|| MoeDevice::open().expect("a device")).clone()
}

/// The same, with Burn's autodiff.
fn autodiff() -> Device {
    device().device().clone().autodiff()
}

/// One test at a time, so that what a step keeps is its own.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn token_choice() -> LayerConfig {
    LayerConfig::new(D as u32, 32, 8, TokenChoice::new(TOP)).with_shared_experts(2)
}

fn expert_choice() -> LayerConfig {
    token_choice().with_routing(ExpertChoice::new(2))
}

/// Tokens that each expert takes of [`TOKENS`].
fn capacity() -> usize {
    ExpertChoice::new(2).capacity(TOKENS as u32, 8) as usize
}

fn random<const R: usize>(shape: [usize; R]) -> Tensor<R> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device().device())
}

/// Weights, not yet of autodiff.
fn tensors() -> MoeTensors {
    MoeTensors::random(&token_choice(), device().device())
}

fn host<const R: usize>(tensor: &Tensor<R>) -> Vec<f32> {
    tensor.clone().try_into_vec_as().expect("a tensor that can be read")
}

fn bits<const R: usize>(tensor: &Tensor<R>) -> Vec<u32> {
    host(tensor).iter().map(|v| v.to_bits()).collect()
}

fn learning(config: LayerConfig, tensors: &MoeTensors) -> MoeFfn {
    MoeFfn::learning(&device(), config, tensors.clone()).unwrap().train()
}

/// Gradients of the hidden states, the router, gate, up and down, `[X, out, in]`.
type All = [Vec<f32>; 5];

#[track_caller]
fn assert_close(got: &All, want: &All, what: &str) {
    for (name, (got, want)) in
        ["hidden", "router", "gate", "up", "down"].iter().zip(got.iter().zip(want))
    {
        assert_eq!(got.len(), want.len(), "{what}, {name}: lengths");
        assert!(want.iter().any(|w| *w != 0.0), "{what}, {name}: nothing to compare with");
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            let close = (g - w).abs() <= 1e-4 + 1e-3 * w.abs(); // false for NaN
            assert!(close, "{what}, {name}: at {i}: got {g}, want {w}");
        }
    }
}

/// Of `MoeFfn`, for a loss `sum(out * dout)`.
fn own(ffn: &MoeFfn, x: &Tensor<2>, dout: &Tensor<2>) -> (Vec<f32>, All) {
    let x = x.clone().autodiff().require_grad();
    let out = ffn.forward(x.clone());
    let grads = (out.clone() * dout.clone()).sum().backward();
    let weights = ffn.weights.as_ref().expect("weights");
    let stacks = [&weights.gate, &weights.up, &weights.down];
    let [gate, up, down] = stacks.map(|p| host(&p.val().grad(&grads).expect("a gradient")));
    let [x, router] = [x, weights.router.val()].map(|t| host(&t.grad(&grads).expect("a gradient")));
    (host(&out), [x, router, gate, up, down])
}

/// Of Burn's own operations.
fn burns(
    tensors: &MoeTensors,
    x: &Tensor<2>,
    dout: &Tensor<2>,
    run: impl Fn(&Reference, Tensor<2>) -> Tensor<2>,
) -> (Vec<f32>, All) {
    let leaf = |t: &Tensor<3>| t.clone().autodiff().require_grad();
    let of = MoeTensors {
        router: tensors.router.clone().autodiff().require_grad(),
        bias: None,
        gate: leaf(&tensors.gate),
        up: leaf(&tensors.up),
        down: leaf(&tensors.down),
    };
    let x = x.clone().autodiff().require_grad();
    let out = run(&Reference::new(of.clone(), TOP as usize), x.clone());
    let grads = (out.clone() * dout.clone()).sum().backward();
    let [gate, up, down] =
        [of.gate, of.up, of.down].map(|t| host(&t.grad(&grads).expect("a gradient")));
    let [x, router] = [x, of.router].map(|t| host(&t.grad(&grads).expect("a gradient")));
    (host(&out), [x, router, gate, up, down])
}

#[track_caller]
fn same_outputs(got: &[f32], want: &[f32]) {
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= 1e-4 + 1e-4 * w.abs(), "output {i}: got {g}, want {w}");
    }
}

#[test]
fn gradients_of_token_choice_equal_burns() {
    let _turn = turn();
    let (tensors, x, dout) = (tensors(), random([TOKENS, D]), random([TOKENS, D]));
    let (out, got) = own(&learning(token_choice(), &tensors), &x, &dout);
    let (dense, want) = burns(&tensors, &x, &dout, |r, x| r.dense(x));
    same_outputs(&out, &dense);
    assert_close(&got, &want, "dense");
    let (each, want) = burns(&tensors, &x, &dout, |r, x| r.scale_by_expert(x));
    same_outputs(&out, &each);
    assert_close(&got, &want, "each expert");
}

#[test]
fn gradients_of_expert_choice_equal_burns() {
    let _turn = turn();
    let (tensors, x, dout) = (tensors(), random([TOKENS, D]), random([TOKENS, D]));
    let (out, got) = own(&learning(expert_choice(), &tensors), &x, &dout);
    let (dense, want) = burns(&tensors, &x, &dout, |r, x| r.expert_choice(x, capacity()));
    same_outputs(&out, &dense);
    assert_close(&got, &want, "expert choice");
}

/// Two sequences, of which experts take as many tokens as the rule says, or as many as they are told.
#[test]
fn sequences_are_apart() {
    let _turn = turn();
    let tensors = tensors();
    let [x, dout] = [(); 2].map(|()| random([2, 40, D]));
    for (capacity, each) in [(None, [10, 10]), (Some([4, 9]), [4, 9])] {
        let config = token_choice().with_routing(ExpertChoice::new(2).with_max(3));
        let ffn = learning(config, &tensors);
        let leaf = x.clone().autodiff().require_grad();
        let out = ffn.forward_sequences(leaf.clone(), capacity.as_ref().map(|c| &c[..]));
        let grads = (out.clone() * dout.clone()).sum().backward();
        let router = ffn.weights.as_ref().expect("weights").router.val();
        let got =
            [host(&out), host(&leaf.grad(&grads).unwrap()), host(&router.grad(&grads).unwrap())];
        let flat = |t: &Tensor<3>| t.clone().reshape([80, D]);
        let (out, [dx, router, ..]) = burns(&tensors, &flat(&x), &flat(&dout), |r, x| {
            let of = |i: usize| r.expert_choice(x.clone().slice([40 * i..40 * i + 40]), each[i]);
            Tensor::cat(vec![of(0), of(1)], 0)
        });
        for (got, want) in got.iter().zip([out, dx, router]) {
            for (g, w) in got.iter().zip(&want) {
                assert!((g - w).abs() <= 1e-4 + 1e-3 * w.abs(), "{capacity:?}: got {g}, want {w}");
            }
        }
    }
}

#[test]
fn the_same_bits_twice() {
    let _turn = turn();
    let (tensors, x, dout) = (tensors(), random([TOKENS, D]), random([TOKENS, D]));
    let ffn = learning(token_choice(), &tensors);
    let of = |(out, all): (Vec<f32>, All)| -> Vec<u32> {
        all.iter().flatten().chain(&out).map(|v| v.to_bits()).collect()
    };
    assert_eq!(of(own(&ffn, &x, &dout)), of(own(&ffn, &x, &dout)));
}

/// A layer twice in one graph, on batches of two sizes: each pass has its own tape.
#[test]
fn passes_of_one_graph_do_not_mix() {
    let _turn = turn();
    let tensors = tensors();
    let [x, dout] = [(); 2].map(|()| random([TOKENS, D]));
    let twice = |run: &dyn Fn(Tensor<2>) -> Tensor<2>, x: Tensor<2>| {
        let first = run(x.clone());
        run(first.clone() * 0.5 + x.clone()) + run(x.slice([0..33])).sum().reshape([1, 1]) * 0.1
    };
    let ffn = learning(token_choice(), &tensors);
    let leaf = x.clone().autodiff().require_grad();
    let out = twice(&|x| ffn.forward(x), leaf.clone());
    let grads = (out * dout.clone()).sum().backward();
    let weights = ffn.weights.as_ref().expect("weights");
    let stacks = [&weights.gate, &weights.up, &weights.down];
    let [gate, up, down] = stacks.map(|p| host(&p.val().grad(&grads).expect("a gradient")));
    let [of_x, router] =
        [leaf, weights.router.val()].map(|t| host(&t.grad(&grads).expect("a gradient")));
    let got = [of_x, router, gate, up, down];
    let (_, want) = burns(&tensors, &x, &dout, |r, x| twice(&|x| r.dense(x), x));
    // Sums of two passes, the second on the output of the first: gradients are larger.
    for (g, w) in got.iter().flatten().zip(want.iter().flatten()) {
        assert!((g - w).abs() <= 1e-3 + 2e-3 * w.abs(), "got {g}, want {w}");
    }
}

/// What lies in the pages is of the last pass; a backward pass of an earlier one is still its own.
#[test]
fn a_later_pass_on_other_weights_does_not_change_a_backward_pass() {
    let _turn = turn();
    let (tensors, x, dout) = (tensors(), random([TOKENS, D]), random([TOKENS, D]));
    let ffn = learning(token_choice(), &tensors);
    let mut other = ffn.clone();
    let weights = other.weights.as_mut().expect("weights");
    weights.gate = weights.gate.clone().map(|w| (w * -2.0).detach().require_grad());
    weights.down = weights.down.clone().map(|w| (w + 1.0).detach().require_grad());
    weights.router = weights.router.clone().map(|w| (w * -1.0).detach().require_grad());

    let leaf = x.clone().autodiff().require_grad();
    let loss = (ffn.forward(leaf.clone()) * dout.clone()).sum();
    let _ = host(&other.forward(x.clone().autodiff()));
    let grads = loss.backward();
    let got = host(&leaf.grad(&grads).expect("a gradient"));
    let (_, want) = burns(&tensors, &x, &dout, |r, x| r.dense(x));
    for (g, w) in got.iter().zip(&want[0]) {
        assert!((g - w).abs() <= 1e-4 + 1e-3 * w.abs(), "got {g}, want {w}");
    }
}

#[test]
fn router_losses_are_added() {
    let _turn = turn();
    let (tensors, x, dout) = (tensors(), random([TOKENS, D]), random([TOKENS, D]));
    let plain = learning(token_choice(), &tensors);
    let coefficients = Coefficients { router_z: 0.5, balance: 0.0 };
    let lossy = plain.clone().with_router_losses(coefficients).unwrap();
    let (_, without) = own(&plain, &x, &dout);
    let (_, with) = own(&lossy, &x, &dout);
    // The mean square of log(sum(exp(logits))).
    let router = tensors.router.clone().autodiff().require_grad();
    let logits = x.clone().autodiff().matmul(router.clone().transpose());
    let z = activation::log_softmax(logits.clone(), 1) - logits;
    let z = z.slice([0..TOKENS, 0..1]);
    let loss = (z.clone() * z).mean();
    let value = host(&loss)[0];
    let want = host(&router.grad(&(loss * 0.5).backward()).expect("a gradient"));
    for ((with, without), want) in with[1].iter().zip(&without[1]).zip(&want) {
        assert!((with - without - want).abs() <= 1e-3, "{with} - {without}, want {want}");
    }
    let [got, _] = lossy.router_losses().unwrap();
    assert!((got - 0.5 * value).abs() <= 1e-3 * value, "{got}, want half of {value}");
    assert!(plain.router_losses().is_ok());
}

#[test]
fn adam_learns_another_layer() {
    let _turn = turn();
    for config in [token_choice(), expert_choice()] {
        let x = random([TOKENS, D]);
        let wanted = learning(config, &tensors()).valid().forward(x.clone()) * 0.5;
        let mut ffn = learning(config, &tensors());
        let before = ffn.weights.clone().expect("weights");
        let mut adam = AdamConfig::new().with_beta_1(0.9).with_beta_2(0.95).init();
        let mut losses = vec![];
        for _ in 0..30 {
            let off = ffn.forward(x.clone().autodiff()) - wanted.clone().autodiff();
            let loss = (off.clone() * off).mean();
            losses.push(host(&loss)[0]);
            let grads = GradientsParams::from_grads(loss.backward(), &ffn);
            ffn = adam.step(3e-3, ffn, grads);
        }
        assert!(losses[29] < 0.5 * losses[0], "{config:?}: {losses:?}");
        let after = ffn.weights.clone().expect("weights");
        assert_ne!(bits(&before.router.val()), bits(&after.router.val()), "router");
        for (name, before, after) in [
            ("gate", before.gate, after.gate),
            ("up", before.up, after.up),
            ("down", before.down, after.down),
        ] {
            assert_ne!(bits(&before.val()), bits(&after.val()), "{name}");
        }
    }
}

#[test]
fn records_save_and_load() {
    let _turn = turn();
    let biased = || MoeTensors { bias: Some(random([8])), ..tensors() };
    let ffn = learning(token_choice(), &biased());
    let other = learning(token_choice(), &biased());
    let x = random([TOKENS, D]);
    let want = bits(&ffn.valid().forward(x.clone()));
    assert_ne!(bits(&other.valid().forward(x.clone())), want);
    let bytes = ffn.into_record().into_bytes().unwrap();
    let loaded = other.load_record(ModuleRecord::from_bytes(bytes).unwrap());
    assert_eq!(bits(&loaded.valid().forward(x.clone())), want);
    // And what was loaded learns on.
    let (out, _) = own(&loaded, &x, &x);
    assert_eq!(out.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), want);
    // A layer for inference has nothing to save.
    let fixed = MoeFfn::new(&device(), token_choice(), WeightType::F32, tensors()).unwrap();
    assert!(fixed.into_record().is_empty());
}

#[test]
fn the_pass_for_validation_is_the_same() {
    let _turn = turn();
    let (tensors, x) = (tensors(), random([TOKENS, D]));
    let ffn = learning(token_choice(), &tensors);
    let fixed = MoeFfn::new(&device(), token_choice(), WeightType::F32, tensors).unwrap();
    let want = bits(&fixed.forward(x.clone()));
    assert_eq!(bits(&ffn.valid().forward(x.clone())), want);
    assert_eq!(ffn.saved_bytes(), 0, "validation keeps nothing");
    let (out, _) = own(&ffn, &x, &x);
    same_outputs(&out, &host(&fixed.forward(x)));
    assert!(ffn.saved_bytes() > 0);
}

#[test]
fn steps_are_used_again() {
    let _turn = turn();
    let ffn = learning(token_choice(), &tensors());
    let x = random([TOKENS, D]);
    let _ = own(&ffn, &x, &x);
    let once = ffn.saved_bytes();
    for _ in 0..3 {
        let _ = own(&ffn, &x, &x);
    }
    assert!(once > 0);
    assert_eq!(ffn.saved_bytes(), once);
}

#[test]
fn nothing_goes_to_the_host() {
    let _turn = turn();
    let device = device();
    let (tensors, x) = (tensors(), random([TOKENS, D]));
    let before = device.traffic();
    let ffn = learning(token_choice(), &tensors);
    let _ = own(&ffn, &x, &x);
    assert_eq!(device.traffic(), before);
}

#[test]
fn what_is_frozen_has_no_gradient() {
    let _turn = turn();
    let (tensors, x, dout) = (tensors(), random([TOKENS, D]), random([TOKENS, D]));
    let ffn = learning(token_choice(), &tensors).no_grad();
    let leaf = x.clone().autodiff().require_grad();
    let grads = (ffn.forward(leaf.clone()) * dout.clone()).sum().backward();
    let weights = ffn.weights.as_ref().expect("weights");
    assert!(weights.router.val().grad(&grads).is_none());
    assert!(weights.down.val().grad(&grads).is_none());
    let got = host(&leaf.grad(&grads).expect("a gradient"));
    let (_, want) = burns(&tensors, &x, &dout, |r, x| r.dense(x));
    for (g, w) in got.iter().zip(&want[0]) {
        assert!((g - w).abs() <= 1e-4 + 1e-3 * w.abs(), "got {g}, want {w}");
    }
}

/// Frozen experts cost no gradients: no room is made for them.
#[test]
fn a_router_learns_alone() {
    let _turn = turn();
    // A shape that no other test has.
    let config = LayerConfig::new(D as u32, 40, 8, TokenChoice::new(TOP)).with_shared_experts(2);
    let tensors = MoeTensors::random(&config, device().device());
    let (x, dout) = (random([TOKENS, D]), random([TOKENS, D]));
    let ffn = learning(config, &tensors);
    let mut frozen = ffn.clone().no_grad();
    let weights = frozen.weights.as_mut().expect("weights");
    weights.router = weights.router.clone().set_require_grad(true);
    let leaf = x.clone().autodiff().require_grad();
    let grads = (frozen.forward(leaf.clone()) * dout.clone()).sum().backward();
    let weights = frozen.weights.as_ref().expect("weights");
    assert!(weights.gate.val().grad(&grads).is_none());
    let got = [leaf, weights.router.val()].map(|t| host(&t.grad(&grads).expect("a gradient")));
    let before = device().scratch_bytes();
    let (_, all) = own(&ffn, &x, &dout);
    assert_eq!(got, [all[0].clone(), all[1].clone()]);
    let of_experts = 4 * (tensors.gate.shape().num_elements() * 3) as u64;
    assert!(device().scratch_bytes() - before >= of_experts, "{before}, then {of_experts} more");
}

#[test]
fn training_counts_tokens_of_experts() {
    let _turn = turn();
    let (tensors, x) = (tensors(), random([TOKENS, D]));
    let ffn = learning(token_choice(), &tensors);
    for passes in [1, 2] {
        for _ in 0..passes {
            let _ = own(&ffn, &x, &x);
        }
        // Validation does not count.
        let _ = host(&ffn.valid().forward(x.clone()));
        let stats = ffn.take_stats().unwrap();
        assert_eq!(stats.slots, passes * TOKENS as u32 * TOP);
        assert_eq!(stats.tokens_per_expert.iter().sum::<u32>(), stats.slots);
        let logits = host(&x.clone().matmul(tensors.router.clone().transpose()));
        let mut want = [0; 8];
        for row in logits.chunks(8) {
            let mut order: Vec<usize> = (0..8).collect();
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
            order[..TOP as usize].iter().for_each(|&e| want[e] += passes);
        }
        assert_eq!(stats.tokens_per_expert, want);
    }
    assert_eq!(ffn.take_stats().unwrap().slots, 0);
    let fixed = MoeFfn::new(&device(), token_choice(), WeightType::F32, tensors).unwrap();
    assert!(fixed.take_stats().is_err());
}

#[test]
fn a_wrong_shape_is_an_error() {
    let _turn = turn();
    let short = MoeTensors { router: random([7, D]), ..tensors() };
    let error = MoeFfn::learning(&device(), token_choice(), short).unwrap_err();
    assert_eq!(error.to_string(), "`router`: [7, 64], expected [8, 64]");
    let few = MoeTensors { down: random([5, 64, 32]), ..tensors() };
    let error = MoeFfn::learning(&device(), token_choice(), few).unwrap_err();
    assert_eq!(error.to_string(), "`down`: [5, 64, 32], expected [10, 64, 32]");
    let fixed = MoeFfn::new(&device(), token_choice(), WeightType::F32, tensors()).unwrap();
    let error = fixed.router_losses().unwrap_err();
    assert_eq!(error.to_string(), "`layer`: does not learn: `MoeFfn::learning` does");
}

#[test]
#[should_panic(expected = "weights that do not learn have no gradients")]
fn a_layer_for_inference_refuses_autodiff() {
    let _turn = turn();
    let fixed = MoeFfn::new(&device(), token_choice(), WeightType::F32, tensors()).unwrap();
    fixed.forward(Tensor::zeros([2, D], &autodiff()));
}
