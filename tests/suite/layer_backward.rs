//! The twin of a layer's backward pass against slopes of the layer, in f64.
use testkit::cases;
use testkit::layer::HostLayer;
use wgmoe::layer::{HostBatch, HostForward, HostRouting, LayerConfig, cpu_backward, cpu_routing};
use wgmoe::ops::{logits, scores};
use wgmoe::plan::bits;
use wgmoe::routing::{Activation, ExpertChoice, GateRule, Routing, SequenceTop, TokenChoice};
use wgmoe::{Score, routing::Normalise};

/// Everything that has a gradient, in f64.
#[derive(Clone)]
struct Inputs {
    hidden: Vec<f64>,
    router: Vec<f64>,
    /// Gate, up, down of each expert.
    experts: Vec<[Vec<f64>; 3]>,
}

/// The sum of the layer's output times `dout`, choice and counts held fast.
fn weighed(config: &LayerConfig, routed: &HostRouting, of: &Inputs, dout: &[f32]) -> f64 {
    let [d, f, e] = [config.hidden, config.intermediate, config.experts].map(|n| n as usize);
    let tokens = of.hidden.len() / d;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut sum = 0.0;
    for t in 0..tokens {
        let x = &of.hidden[t * d..][..d];
        let g: Vec<f64> = of.router.chunks(d).map(|w| dot(x, w)).collect();
        let all: f64 = g.iter().map(|g| g.exp()).sum();
        let routing = config.routing;
        let (gate_rule, scale) = match routing {
            Routing::ExpertChoice(rule) => match (rule.normalise, rule.score) {
                (Normalise::BeforeSelection, _) => (GateRule::Unnormalised, 1.0),
                (_, Score::Softmax) => (GateRule::Softmax, 1.0),
                _ => (GateRule::Normalised, 1.0),
            },
            Routing::TokenChoice(rule) => (rule.gate, rule.scale),
            Routing::SequenceTop(rule) => (rule.gate, rule.scale),
            _ => panic!("{routing:?}"),
        };
        let score = |e: usize| match (gate_rule, routing.score()) {
            (GateRule::Softmax, _) => g[e].exp(),
            (_, Score::Softmax) => g[e].exp() / all,
            _ => 1.0 / (1.0 + (-g[e]).exp()),
        };
        let over: f64 = match gate_rule {
            GateRule::Unnormalised => 1.0,
            _ => bits::experts_of(&routed.chosen, tokens, t).iter().map(|&e| score(e)).sum(),
        };
        let routed = bits::experts_of(&routed.assigned, tokens, t)
            .into_iter()
            .map(|e| (e, f64::from(scale) * score(e) / over));
        for (i, gate) in routed.chain((e..of.experts.len()).map(|e| (e, 1.0))) {
            let [w_gate, w_up, w_down] = &of.experts[i];
            for j in 0..f {
                let (v, up) = (dot(x, &w_gate[j * d..][..d]), dot(x, &w_up[j * d..][..d]));
                let a = match config.activation {
                    Activation::Silu => v / (1.0 + (-v).exp()),
                    Activation::Gelu => {
                        let u = 0.7978845608028654 * (v + 0.044715 * v * v * v);
                        0.5 * v * (1.0 + u.tanh())
                    }
                    other => panic!("{other:?}"),
                };
                for k in 0..d {
                    sum += gate * a * up * w_down[k * f + j] * f64::from(dout[t * d + k]);
                }
            }
        }
    }
    sum
}

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

/// The twin's gradients of one layer against slopes, at every `step`th value.
fn check(config: LayerConfig) {
    let host = HostLayer::new(config);
    let (d, e, tokens) = (config.hidden as usize, config.experts as usize, 13);
    let hidden = cases::random(4, tokens * d);
    let dout = cases::random(5, tokens * d);
    let g = logits::cpu(&hidden, &host.router, d);
    let routing = config.routing;
    let (s, r) = scores::cpu(&g, e, routing.score(), routing.by_logits(), None);
    let routed = cpu_routing(&config, &host.host_router(), HostBatch::default(), [&g, &s, &r]);
    let forward = HostForward { hidden: &hidden, routing: &routed, logits: &g, scores: &s };
    let matrix = |e, p| host.matrix(e, p);
    let got = cpu_backward(&config, &host.host_router(), &matrix, forward, &dout, None, false);

    let experts = host.experts.iter().map(|m| [&m[0], &m[1], &m[2]].map(|m| f64s(m))).collect();
    let inputs = Inputs { hidden: f64s(&hidden), router: f64s(&host.router), experts };
    let mut worst = 0.0f64;
    let mut compare = |what: &str, value: f32, place: &dyn Fn(&mut Inputs) -> &mut f64| {
        let moved = |by: f64| {
            let mut inputs = inputs.clone();
            *place(&mut inputs) += by;
            weighed(&config, &routed, &inputs, &dout)
        };
        let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
        let off = (slope - f64::from(value)).abs() / (1.0 + slope.abs());
        worst = worst.max(off);
        // Logits and gates come to the twin as f32, and gradients leave it as such.
        assert!(off < 5e-6, "{routing:?}: {what}: {value}, slope {slope}");
    };
    for i in (0..hidden.len()).step_by(11) {
        compare("hidden", got.hidden[i], &|of| &mut of.hidden[i]);
    }
    for i in (0..host.router.len()).step_by(7) {
        compare("router", got.router[i], &|of| &mut of.router[i]);
    }
    for expert in 0..host.experts.len() {
        for p in 0..3 {
            for i in (0..got.experts[expert][p].len()).step_by(17) {
                let value = got.experts[expert][p][i];
                compare("experts", value, &|of| &mut of.experts[expert][p][i]);
            }
        }
    }
    println!("{routing:?}: off by {worst:e} at most");

    // Losses of the router and the residual are added on top.
    let more = cases::random(6, tokens * e);
    let with =
        cpu_backward(&config, &host.host_router(), &matrix, forward, &dout, Some(&more), true);
    for t in 0..tokens {
        for k in 0..d {
            let of_losses: f32 = (0..e).map(|e2| more[t * e + e2] * host.router[e2 * d + k]).sum();
            let want = got.hidden[t * d + k] + dout[t * d + k] + of_losses;
            let off = (with.hidden[t * d + k] - want).abs();
            assert!(off < 1e-5 * (1.0 + want.abs()), "residual and losses at {t}, {k}");
        }
    }
}

#[test]
fn twin_has_the_slopes_of_the_layer() {
    let sigmoid = TokenChoice::new(3).with_score(Score::Sigmoid).with_scale(2.5);
    let before = ExpertChoice::new(2).with_normalise(Normalise::BeforeSelection);
    let rules: [Routing; 8] = [
        TokenChoice::new(2).into(),
        TokenChoice::new(3).with_gate(GateRule::Softmax).with_capacity_factor(0.7).into(),
        TokenChoice::new(2).with_gate(GateRule::Unnormalised).into(),
        sigmoid.into(),
        ExpertChoice::new(2).into(),
        ExpertChoice::new(2).with_score(Score::Sigmoid).into(),
        before.into(),
        SequenceTop::new(2).into(),
    ];
    for (i, rule) in rules.into_iter().enumerate() {
        let activation = if i % 2 == 0 { Activation::Silu } else { Activation::Gelu };
        let config = LayerConfig::new(6, 5, 5, rule).with_activation(activation);
        check(config.with_shared_experts(i as u32 % 3));
    }
}
