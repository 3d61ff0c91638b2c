//! The CPU twin of a layer's backward pass: plain loops in f64, one expert after the other.
use super::config::LayerConfig;
use super::twin::{HostExperts, HostRouter, HostRouting};
use crate::error::{expect_len, expect_rows};
use crate::ops::gates_backward::{self, Rule};
use crate::ops::plan_count::Scales;
use crate::plan::{HostPlan, PlanShape, bits};
use crate::routing::{Activation, GateRule};
use crate::weights::Projection::{Down, Gate, Up};

/// Gradients of a layer on the host, each of the shape of what it is the gradient of.
#[derive(Clone, Debug, PartialEq)]
pub struct HostGradients {
    /// Of the hidden states, `[T, D]`: by way of the experts, the router, and the residual.
    pub hidden: Vec<f32>,
    /// Of the router's weights, `[E, D]`.
    pub router: Vec<f32>,
    /// Of gate, up `[F, D]` and down `[D, F]` of each expert, the shared ones last.
    pub experts: Vec<[Vec<f32>; 3]>,
    /// Of the gates `[T, E]`, 0 where a token has no slot of an expert.
    pub gates: Vec<f32>,
    /// Of the router's logits, `[T, E]`: what the gates and the losses send back.
    pub logits: Vec<f32>,
}

/// What a layer's forward pass made and its backward pass reads, on the host.
#[derive(Clone, Copy, Debug)]
pub struct HostForward<'a> {
    /// The hidden states, `[T, D]`.
    pub hidden: &'a [f32],
    /// The choice and its gates.
    pub routing: &'a HostRouting,
    /// The router's logits, `[T, E]`.
    pub logits: &'a [f32],
    /// The router's scores, `[T, E]`; those of rules that read only logits are not looked at.
    pub scores: &'a [f32],
}

/// Value and slope of the activation of a gate.
fn activation(activation: Activation, v: f64) -> [f64; 2] {
    match activation {
        Activation::Silu => {
            let sigmoid = 1.0 / (1.0 + (-v).exp());
            [v * sigmoid, sigmoid * (1.0 + v * (1.0 - sigmoid))]
        }
        Activation::Gelu => {
            let root = (2.0 / std::f64::consts::PI).sqrt();
            let tanh = (root * (v + 0.044715 * v.powi(3))).tanh();
            let inner = root * (1.0 + 3.0 * 0.044715 * v * v);
            [0.5 * v * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * v * (1.0 - tanh * tanh) * inner]
        }
    }
}

/// One expert's matrices and the sums of their gradients.
struct Expert<'a> {
    activation: Activation,
    /// Of gate, up, down.
    weights: [&'a dyn Fn(usize) -> f64; 3],
    sums: [Vec<f64>; 3],
}

impl Expert<'_> {
    /// Adds one slot to the sums, and what it gives the hidden state to `dx`; the gradient of its gate.
    fn add(&mut self, x: &[f32], dout: &[f32], gate: f64, dx: &mut [f64]) -> f64 {
        let (d, f) = (x.len(), self.sums[0].len() / x.len());
        let [of_gate, of_up, of_down] = self.weights;
        let [into_gate, into_up, into_down] = &mut self.sums;
        let mut dgate = 0.0;
        for i in 0..f {
            let row = i * d..(i + 1) * d;
            let product = |weight: &dyn Fn(usize) -> f64| -> f64 {
                row.clone().zip(x).map(|(at, &x)| weight(at) * f64::from(x)).sum()
            };
            let (zg, zu) = (product(of_gate), product(of_up));
            let [a, slope] = activation(self.activation, zg);
            let h = a * zu;
            let da: f64 =
                dout.iter().enumerate().map(|(k, &g)| f64::from(g) * of_down(k * f + i)).sum();
            dgate += da * h;
            for (k, &g) in dout.iter().enumerate() {
                into_down[k * f + i] += f64::from(g) * gate * h;
            }
            let (dzg, dzu) = (gate * da * zu * slope, gate * da * a);
            for (k, at) in row.enumerate() {
                into_gate[at] += dzg * f64::from(x[k]);
                into_up[at] += dzu * f64::from(x[k]);
                dx[k] += dzg * of_gate(at) + dzu * of_up(at);
            }
        }
        dgate
    }
}

/// The CPU twin of a layer's backward pass: what `dout [T, D]`, the gradient of the output, is to each of
/// the layer's inputs. `dlogits` `[T, E]` are gradients of losses of the router alone, added to those of
/// its logits. Where the output was added to the hidden states themselves, `residual` adds `dout` to their
/// gradient.
///
/// Selection, coreset, counts, factors and bias are constants: nothing is a gradient of them.
///
/// # Panics
///
/// If an argument has not the shape that the configuration says; the message names it.
pub fn cpu_backward(
    config: &LayerConfig,
    router: &HostRouter<'_>,
    experts: HostExperts<'_>,
    forward: HostForward<'_>,
    dout: &[f32],
    dlogits: Option<&[f32]>,
    residual: bool,
) -> HostGradients {
    let (d, e, f) = (config.hidden as usize, config.experts as usize, config.intermediate as usize);
    let tokens = expect_rows("hidden", forward.hidden.len(), "hidden size", d);
    expect_len("dout", dout.len(), tokens * d);
    expect_len("router weight", router.weight.len(), e * d);
    expect_len("logits", forward.logits.len(), tokens * e);
    let HostRouting { assigned, chosen, gates, .. } = forward.routing;
    let mut hidden: Vec<f64> =
        dout.iter().map(|&g| if residual { g.into() } else { 0.0 }).collect();
    let mut of_gates = vec![0f32; tokens * e];
    let mut all = vec![];
    for i in 0..e + config.shared_experts as usize {
        let matrices = [Gate, Up, Down].map(|p| experts(i as u32, p));
        for (name, matrix) in ["gate_proj", "up_proj", "down_proj"].iter().zip(&matrices) {
            expect_len(name, matrix.len(), d * f);
        }
        let [gate, up, down] = &matrices;
        let mut expert = Expert {
            activation: config.activation,
            weights: [&|at| gate.get(at).into(), &|at| up.get(at).into(), &|at| {
                down.get(at).into()
            }],
            sums: [(); 3].map(|()| vec![0.0; d * f]),
        };
        for t in 0..tokens {
            let row = t * d..(t + 1) * d;
            let (x, g) = (&forward.hidden[row.clone()], &dout[row.clone()]);
            if i >= e {
                expert.add(x, g, 1.0, &mut hidden[row]);
            } else if bits::get(assigned, tokens, i, t) {
                let gate = gates[t * e + i].into();
                of_gates[t * e + i] = expert.add(x, g, gate, &mut hidden[row]) as f32;
            }
        }
        all.push(expert.sums.map(|sums| sums.into_iter().map(|v| v as f32).collect()));
    }

    let routing = config.routing;
    let slots: usize = (0..e).map(|e| bits::tokens_of(assigned, tokens, e).len()).sum();
    let plan =
        HostPlan::cpu(&PlanShape::on_host(tokens as u32, e as u32, slots as u32), assigned, gates);
    let of_expert = |i: usize| plan.expert_offsets[i] as usize..plan.expert_offsets[i + 1] as usize;
    let dgates: Vec<f32> = (0..e)
        .flat_map(|i| plan.token_of[of_expert(i)].iter().map(move |&t| t as usize * e + i))
        .map(|at| of_gates[at])
        .collect();
    let rule = Rule { gate: routing.gate(), score: routing.score(), scale: routing.scale() };
    let scales =
        Scales { scale_by_count: router.scale_by_count, scale_by_expert: router.scale_by_expert };
    let source = if rule.gate == GateRule::Softmax { forward.logits } else { forward.scores };
    let mut logits = gates_backward::cpu(&plan, &dgates, chosen, source, e, rule, scales);
    if let Some(more) = dlogits {
        expect_len("dlogits", more.len(), logits.len());
        for (sum, more) in logits.iter_mut().zip(more) {
            *sum += more;
        }
    }

    let mut of_router = vec![0f64; e * d];
    for (at, &g) in logits.iter().enumerate() {
        let (t, i) = (at / e, at % e);
        for k in 0..d {
            of_router[i * d + k] += f64::from(g) * f64::from(forward.hidden[t * d + k]);
            hidden[t * d + k] += f64::from(g) * f64::from(router.weight[i * d + k]);
        }
    }
    let rounded = |sums: Vec<f64>| sums.into_iter().map(|v| v as f32).collect();
    HostGradients {
        hidden: rounded(hidden),
        router: rounded(of_router),
        experts: all,
        gates: of_gates,
        logits,
    }
}
