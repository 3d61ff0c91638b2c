//! The module against the CPU twins and Burn's own operations, and that nothing is copied.
use burn::tensor::{Distribution, Tensor};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use wgmoe_burn::wgmoe::layer::{self, HostBatch, HostRouter, LayerConfig, MoeLayer, Router};
use wgmoe_burn::wgmoe::routing::{BlockRule, Routing, TokenChoice};
use wgmoe_burn::wgmoe::weights::{HostWeights, Projection};
use wgmoe_burn::wgmoe::{ExpertWeights, WeightType, models};
use wgmoe_burn::{MoeDevice, MoeFfn, MoeTensors, Reference, place};

const RULE: TokenChoice = TokenChoice::new(3);

fn config() -> LayerConfig {
    LayerConfig::new(64, 32, 8, RULE).with_shared_experts(1)
}

/// One device serves all tests: Burn makes it once.
fn device() -> MoeDevice {
    static DEVICE: OnceLock<MoeDevice> = OnceLock::new();
    DEVICE.get_or_init(|| MoeDevice::open().expect("a device")).clone()
}

/// One test at a time, for what the device has moved is counted in one place.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn random<const R: usize>(shape: [usize; R], scale: f64) -> Tensor<R> {
    Tensor::random(shape, Distribution::Normal(0.0, scale), device().device())
}

fn tensors() -> MoeTensors {
    MoeTensors {
        router: random([8, 64], 0.3),
        bias: None,
        gate: random([9, 32, 64], 0.2),
        up: random([9, 32, 64], 0.2),
        down: random([9, 64, 32], 0.2),
    }
}

fn host<const R: usize>(tensor: &Tensor<R>) -> Vec<f32> {
    tensor.clone().try_into_vec_as().expect("a tensor that can be read")
}

#[track_caller]
fn assert_close(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let close = (g - w).abs() <= 1e-4 + 1e-4 * w.abs(); // false for NaN
        assert!(close, "{what}: at {i}: got {g}, want {w}");
    }
}

/// The CPU twin for weights of Burn tensors.
fn cpu(config: &LayerConfig, tensors: &MoeTensors, x: &[f32]) -> Vec<f32> {
    let router = host(&tensors.router);
    let router =
        HostRouter { weight: &router, bias: None, scale_by_count: None, scale_by_expert: None };
    let stacks = [&tensors.gate, &tensors.up, &tensors.down].map(host);
    let size = (config.hidden * config.intermediate) as usize;
    let matrix =
        |e: u32, p: Projection| HostWeights::F32(&stacks[p as usize][e as usize * size..][..size]);
    layer::cpu(config, &router, HostBatch::default(), &matrix, x)
}

#[test]
fn equals_the_twin_under_every_kind_of_rule() {
    let _turn = turn();
    let (device, tensors) = (device(), tensors());
    let block = RULE.with_coreset(BlockRule::Capacity(4));
    for routing in [
        config().routing,
        Routing::TokenChoice(block),
        models::find("ec-dlm").expect("a model").with_experts(8).routing,
    ] {
        let config = config().with_routing(routing);
        let ffn = MoeFfn::new(&device, config, WeightType::F32, tensors.clone()).unwrap();
        for tokens in [1, 33, 70] {
            let x = random([tokens, 64], 1.0);
            let got = host(&ffn.forward(x.clone()));
            assert_close(
                &got,
                &cpu(&config, &tensors, &host(&x)),
                &format!("{routing:?} {tokens}"),
            );
        }
    }
}

#[test]
fn equals_burns_own_operations() {
    let _turn = turn();
    let (device, tensors) = (device(), tensors());
    let ffn = MoeFfn::new(&device, config(), WeightType::F32, tensors.clone()).unwrap();
    let reference = Reference::new(tensors, 3);
    let x = random([40, 64], 1.0);
    let got = host(&ffn.forward(x.clone()));
    assert_close(&got, &host(&reference.dense(x.clone())), "dense");
    assert_close(&got, &host(&reference.scale_by_expert(x)), "by expert");
}

#[test]
fn takes_a_layer_made_elsewhere() {
    let _turn = turn();
    let (device, tensors) = (device(), tensors());
    let ctx = device.context();
    let weights = ExpertWeights::new(ctx, config().expert_shape(WeightType::F32)).unwrap();
    let stacks = [&tensors.gate, &tensors.up, &tensors.down].map(host);
    for (p, stack) in Projection::ALL.into_iter().zip(&stacks) {
        for (e, matrix) in (0..).zip(stack.chunks(64 * 32)) {
            weights.write(device.queue(), e, p, HostWeights::F32(matrix)).unwrap();
        }
    }
    let weight = layer::Tensor::new(ctx, "router", &host(&tensors.router)).unwrap();
    let router = Router::new(weight);
    let made = MoeLayer::new(ctx, config(), router, weights).unwrap();
    let x = random([40, 64], 1.0);
    let of_layer = MoeFfn::from_layer(&device, made).forward(x.clone());
    let of_tensors = MoeFfn::new(&device, config(), WeightType::F32, tensors).unwrap().forward(x);
    let bits = |t: &Tensor<2>| host(t).iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&of_layer), bits(&of_tensors));
}

#[test]
fn runs_in_order_with_burns_work() {
    let _turn = turn();
    let (device, tensors) = (device(), tensors());
    let ffn = MoeFfn::new(&device, config(), WeightType::F32, tensors.clone()).unwrap();
    // Burn's work before, between and behind; memory of dropped tensors is handed out again meanwhile.
    let mut x = random([40, 64], 1.0);
    let mut want = host(&x);
    for _ in 0..5 {
        x = ffn.forward(x * 0.5 + 0.25) + 0.125;
        want = want.iter().map(|v| v * 0.5 + 0.25).collect();
        want = cpu(&config(), &tensors, &want).iter().map(|v| v + 0.125).collect();
    }
    assert_close(&host(&x), &want, "five in a row");
}

#[test]
fn takes_views() {
    let _turn = turn();
    let (device, tensors) = (device(), tensors());
    let ffn = MoeFfn::new(&device, config(), WeightType::F32, tensors.clone()).unwrap();
    let turned = random([64, 96], 1.0).transpose();
    for view in [turned.clone(), turned.slice([7..40])] {
        let want = cpu(&config(), &tensors, &host(&view));
        assert_close(&host(&ffn.forward(view)), &want, "a view");
    }
}

#[test]
fn nothing_is_copied() {
    let _turn = turn();
    let (device, tensors) = (device(), tensors());
    let ffn = MoeFfn::new(&device, config(), WeightType::F32, tensors).unwrap();
    let before = device.traffic();
    assert!(before.readbacks > 0, "the weights were read");
    let x = random([33, 64], 1.0);
    let y = ffn.forward(x.clone());
    // Where Burn says that its tensors lie, in its pages, is where the layer read and wrote.
    let places = [place(&x).unwrap(), place(&y).unwrap()];
    assert!(places.iter().all(|p| p.size == 33 * 64 * 4 && p.size < p.buffer.size()), "{places:?}");
    assert_eq!(ffn.last_places(), Some(places));
    assert_eq!(device.traffic(), before, "something was moved");
}

#[test]
fn a_wrong_shape_is_an_error() {
    let _turn = turn();
    let device = device();
    let short = MoeTensors { up: random([9, 32, 60], 0.2), ..tensors() };
    let error = MoeFfn::new(&device, config(), WeightType::F32, short).unwrap_err();
    assert_eq!(error.to_string(), "`up`: [9, 32, 60], expected [9, 32, 64]");
    let few = MoeTensors { down: random([5, 64, 32], 0.2), ..tensors() };
    let error = MoeFfn::new(&device, config(), WeightType::Bf16, few).unwrap_err();
    assert_eq!(error.to_string(), "`down`: [5, 64, 32], expected [9, 64, 32]");
}

#[test]
#[should_panic(expected = "hidden states are [tokens, 64]")]
fn hidden_states_of_another_width_panic() {
    let _turn = turn();
    let ffn = MoeFfn::new(&device(), config(), WeightType::F32, tensors()).unwrap();
    ffn.forward(random([2, 4], 1.0));
}
