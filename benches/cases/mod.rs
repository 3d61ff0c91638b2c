//! The works that are timed, their numbers, and the comparisons with the CPU twins.
use half::{bf16, f16};
use std::collections::HashMap;
use wgmoe::layer::{
    Batch, HostBatch, HostRouter, LayerStep, MoeLayer, Router, Settings, Tensor, cpu_routing,
    cpu_token,
};
use wgmoe::ops::matmul::cpu_logits;
use wgmoe::ops::plan_count::GateRule;
use wgmoe::ops::plan_scan::Stats;
use wgmoe::ops::token_choice::Groups;
use wgmoe::routing::{Activation, ExpertChoice, Normalise, Routing, Scope, Score, TokenChoice};
use wgmoe::weights::{HostWeights, Projection};
use wgmoe::{Context, ExpertWeights, Gpu, WeightType, bits, model};

/// Seeds of the generator. W1, W2 and OP1 to OP3 are what other implementations (Burn, ggml, candle, PyTorch) are timed on
/// as well: all of them, in whatever language, draw their inputs from this hash of (seed, index), so that they compute on
/// the same numbers.
pub(crate) const X: u32 = 1;
const ROUTER: u32 = 2;
pub(crate) const GATE: u32 = 3;
const UP: u32 = 4;
const DOWN: u32 = 5;
pub(crate) const SCORES: u32 = 6;
pub(crate) const TABLE: u32 = 7;
pub(crate) const INDEX: u32 = 8;
/// Seeds of ours.
pub(crate) const BIAS: u32 = 20;
const BLOCK: u32 = 21;

/// 32 bits of (seed, index).
pub(crate) fn mix(seed: u32, i: u32) -> u32 {
    let mut h = i.wrapping_mul(0x9E37_79B1) ^ seed.wrapping_mul(0x85EB_CA77);
    h ^= h >> 16;
    h = h.wrapping_mul(0x7FEB_352D);
    h ^= h >> 15;
    h = h.wrapping_mul(0x846C_A68B);
    h ^ h >> 16
}

/// Uniform in [-scale / 2, scale / 2), 24 bits.
pub(crate) fn uniform(seed: u32, i: u32, scale: f32) -> f32 {
    ((mix(seed, i) >> 8) as f32 * (1.0 / 16_777_216.0) - 0.5) * scale
}

/// Values `first..first + n` of a seed.
fn stretch(seed: u32, first: u32, n: u32, scale: f32) -> Vec<f32> {
    (first..first + n).map(|i| uniform(seed, i, scale)).collect()
}

/// The first `n` values of a seed.
pub(crate) fn fill(seed: u32, n: u32, scale: f32) -> Vec<f32> {
    stretch(seed, 0, n, scale)
}

/// A layer and its input.
#[derive(Clone)]
pub(crate) struct Work {
    pub(crate) settings: Settings,
    pub(crate) tokens: u32,
    /// `[T, D]`.
    x: Vec<f32>,
    /// `[E, D]`.
    router: Vec<f32>,
    /// `[E]`.
    bias: Option<Vec<f32>>,
}

impl Work {
    fn new(settings: Settings, tokens: u32) -> Self {
        let Settings { hidden, experts, .. } = settings;
        let router = fill(ROUTER, experts * hidden, 12.0 / (hidden as f32).sqrt());
        Self { settings, tokens, x: fill(X, tokens * hidden, 1.0), router, bias: None }
    }

    /// Decoding one block: T 32, D 2048, F 512, E 32, K 8, softmax, the gates of the 8 normalised.
    pub(crate) fn w1() -> Self {
        let routing = Routing::TokenChoice(TokenChoice {
            score: Score::Softmax,
            gate: GateRule::Normalised,
            top: 8,
            groups: None,
            scale: 1.0,
            capacity_factor: None,
            coreset: None,
        });
        let settings = Settings {
            hidden: 2048,
            intermediate: 512,
            experts: 32,
            shared_experts: 0,
            activation: Activation::Silu,
            routing,
        };
        Self::new(settings, 32)
    }

    /// Expert choice: T 512, D 512, F 384, E 64, C 64, chosen by and weighed with softmax over all experts.
    pub(crate) fn w2() -> Self {
        let routing = Routing::ExpertChoice(ExpertChoice {
            score: Score::Softmax,
            normalise: Normalise::BeforeSelection,
            scope: Scope::Batch,
            experts_per_token: 8,
            max_experts_per_token: 8,
        });
        let settings =
            Settings { hidden: 512, intermediate: 384, experts: 64, ..Self::w1().settings };
        Self::new(Settings { routing, ..settings }, 512)
    }

    /// LLaDA2.0-mini decoding a block of 32 tokens, with `experts` of its 256. The inputs are synthetic: normal logits
    /// `2 (sqrt(0.6) Z_block + sqrt(0.4) Z) - 3`, of which tokens of a block share a part, so that a block uses about as many
    /// distinct experts as published (69.5 of 256).
    pub(crate) fn block(experts: u32) -> Self {
        let llada = model::find("llada2-mini").expect("a model").settings;
        let Routing::TokenChoice(rule) = llada.routing else {
            unreachable!("LLaDA2 routes tokens")
        };
        // Groups of 32, half of which a token may use.
        let groups = Some(Groups { count: experts / 32, top: experts / 64 });
        let routing = Routing::TokenChoice(TokenChoice { groups, ..rule });
        let settings = Settings { experts, routing, ..llada };
        let (tokens, hidden) = (32, settings.hidden);
        let unit = 12f32.sqrt(); // variance 1
        let shared = fill(BLOCK, hidden, unit);
        let mut x = fill(X, tokens * hidden, unit);
        for row in x.chunks_exact_mut(hidden as usize) {
            for (x, shared) in row.iter_mut().zip(&shared) {
                *x = 0.6f32.sqrt() * shared + 0.4f32.sqrt() * *x;
            }
            row[0] = 1.0;
        }
        let mut router = fill(ROUTER, experts * hidden, 2.0 * unit / (hidden as f32).sqrt());
        for row in router.chunks_exact_mut(hidden as usize) {
            row[0] = -3.0;
        }
        let bias = Some(fill(BIAS, experts, 0.002));
        Self { settings, tokens, x, router, bias }
    }

    /// Useful floating-point operations of `slots` routed rows and the shared experts' rows.
    pub(crate) fn flops(&self, slots: u32) -> u64 {
        let Settings { hidden, intermediate, shared_experts, .. } = self.settings;
        let rows = u64::from(slots) + u64::from(shared_experts * self.tokens);
        6 * rows * u64::from(hidden) * u64::from(intermediate)
    }

    /// A matrix of an expert, `[out, in]`.
    fn expert(&self, e: u32, projection: Projection) -> Vec<f32> {
        let Settings { hidden, intermediate, .. } = self.settings;
        let (seed, depth) = match projection {
            Projection::Gate => (GATE, hidden),
            Projection::Up => (UP, hidden),
            Projection::Down => (DOWN, intermediate),
        };
        let n = hidden * intermediate;
        stretch(seed, e * n, n, 2.0 / (depth as f32).sqrt())
    }

    /// The layer, its weights uploaded.
    pub(crate) fn layer(&self, gpu: &Gpu, ctx: &Context, weight_type: WeightType) -> MoeLayer {
        let shape = self.settings.expert_shape(weight_type);
        let weights = ExpertWeights::new(ctx, shape, None).expect("weights");
        for e in 0..shape.experts {
            for p in [Projection::Gate, Projection::Up, Projection::Down] {
                let values = self.expert(e, p);
                weights.write(&gpu.queue, e, p, HostWeights::F32(&values)).expect("a matrix");
            }
            // Lets go of the staging memory.
            gpu.queue.submit([]);
            gpu.wait().expect("upload");
        }
        let router = Router {
            weight: Tensor::new(ctx, "router", &self.router).expect("router"),
            bias: self.bias.as_ref().map(|b| Tensor::new(ctx, "bias", b).expect("bias")),
            by_count: None,
            by_expert: None,
        };
        MoeLayer::new(ctx, self.settings, router, weights).expect("layer")
    }

    /// Binds the layer, runs it once, and compares it with the CPU twins: logits, coreset, choice and statistics whole, the
    /// output in eight tokens (and no NaN anywhere).
    pub(crate) fn bind(&self, gpu: &Gpu, layer: &MoeLayer, what: &str) -> LayerStep {
        let settings = *layer.settings();
        let (d, e, t) = (settings.hidden as usize, settings.experts as usize, self.tokens as usize);
        let hidden = gpu.upload(&self.x);
        let out = gpu.upload(&vec![f32::NAN; t * d]);
        let batch = Batch::new((&hidden).into(), (&out).into(), self.tokens);
        let step = layer.bind(&batch).expect("a step");
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        step.record(&mut encoder);
        gpu.queue.submit([encoder.finish()]);
        let got: Vec<f32> = gpu.download(&out).expect("output");

        let [logits, s, r] = step
            .selection()
            .expect("logits")
            .map(|slice| gpu.download::<f32>(slice).expect("logits"));
        let want = cpu_logits(&self.x, &self.router, d);
        close(&logits, &want, 2e-5 * (d as f32).sqrt(), 2e-5, &format!("{what}: logits"));
        let router = HostRouter {
            weight: &self.router,
            bias: self.bias.as_deref(),
            by_count: None,
            by_expert: None,
        };
        let want = cpu_routing(&settings, &router, HostBatch::default(), [&logits, &s, &r]);
        let words = |slice: wgmoe::Slice<'_>| gpu.download::<u32>(slice).expect("words");
        let assigned = words(step.assigned().expect("bits"));
        same(&assigned, &want.assigned, &format!("{what}: assigned"));
        if let Some(coreset) = &want.coreset {
            let got = words(step.coreset().expect("coreset"));
            same(&got, coreset, &format!("{what}: coreset"));
        }
        let stats = Stats::from_words(&words(step.stats())).expect("statistics");
        let slots = want.assigned.iter().map(|w| w.count_ones()).sum();
        assert_eq!((stats.slots, stats.ignored), (slots, 0), "{what}: statistics");

        let weight_type = layer.weights().shape().weight_type;
        let tokens: Vec<usize> = (0..8).map(|i| i * (t - 1) / 7).collect();
        let chosen: Vec<Vec<(u32, f32)>> = tokens
            .iter()
            .map(|&t| {
                let experts = bits::experts_of(&want.assigned, self.tokens as usize, t);
                experts.into_iter().map(|i| (i as u32, want.gates[t * e + i])).collect()
            })
            .collect();
        let mut experts: HashMap<(u32, Projection), Vec<f32>> = HashMap::new();
        let shared = settings.experts..settings.experts + settings.shared_experts;
        for e in chosen.iter().flatten().map(|&(e, _)| e).chain(shared) {
            for p in [Projection::Gate, Projection::Up, Projection::Down] {
                experts.entry((e, p)).or_insert_with(|| {
                    self.expert(e, p).into_iter().map(|v| round(v, weight_type)).collect()
                });
            }
        }
        let host = |e: u32, p: Projection| HostWeights::F32(&experts[&(e, p)]);
        for (&t, chosen) in tokens.iter().zip(&chosen) {
            let want = cpu_token(&settings, &host, &self.x[t * d..][..d], chosen);
            let scale = want.iter().fold(0f32, |m, v| m.max(v.abs()));
            let what = format!("{what}: token {t}");
            close(&got[t * d..][..d], &want, 2e-5 * scale + 1e-6, 2e-5, &what);
        }
        assert!(got.iter().all(|v| v.is_finite()), "{what}: not finite");
        eprintln!(
            "{what}: {} slots, {} of {} routed experts used, weights of {:.1} MB read",
            stats.slots,
            stats.unique_experts,
            settings.experts,
            f64::from(stats.unique_experts + settings.shared_experts)
                * layer.weights().shape().expert_bytes() as f64
                / 1e6
        );
        step
    }
}

/// A weight as it is stored.
pub(crate) fn round(v: f32, weight_type: WeightType) -> f32 {
    match weight_type {
        WeightType::F32 => v,
        WeightType::F16 => f16::from_f32(v).to_f32(),
        WeightType::Bf16 => bf16::from_f32(v).to_f32(),
    }
}

/// Fails on the first value that is not within `atol + rtol * |want|`; NaN never is.
pub(crate) fn close(got: &[f32], want: &[f32], atol: f32, rtol: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let close = (got - want).abs() <= atol + rtol * want.abs(); // false for NaN
        assert!(close, "{what}: at {i}: got {got}, want {want}");
    }
}

/// Fails on the first difference.
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(got: &[T], want: &[T], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    if let Some(i) = (0..got.len()).find(|&i| got[i] != want[i]) {
        panic!("{what}: at {i}: got {:?}, want {:?}", got[i], want[i]);
    }
}
