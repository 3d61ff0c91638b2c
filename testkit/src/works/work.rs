//! A layer and its input, on the device and for the CPU twins.
use super::numbers::{BIAS, BLOCK, DOWN, GATE, ROUTER, UP, X, fill, stretch, uniform};
use crate::compare::{close, largest, same};
use crate::layer::{host_router, selection, stored};
use crate::statistics::{on_every_core, spread, threads};
use half::bf16;
use std::collections::HashMap;
use std::sync::Arc;
use wgmoe::layer::{
    Batch, BoundLayer, HostBatch, HostRouter, LayerConfig, MoeLayer, Router, Scratch, Tensor,
    cpu_routing, cpu_token,
};
use wgmoe::ops::logits::cpu as logits_twin;
use wgmoe::ops::scores;
use wgmoe::plan::HostPlan;
use wgmoe::plan::Stats;
use wgmoe::plan::bits;
use wgmoe::routing::{ExpertChoice, Normalise, Score, TokenChoice};
use wgmoe::weights::{HostWeights, Projection};
use wgmoe::{BoundOp, Context, Dispatch, ExpertWeights, Gpu, WeightType, models, wgpu};

const PROJECTIONS: [Projection; 3] = [Projection::Gate, Projection::Up, Projection::Down];

/// A layer and its input. Clones share the experts.
#[derive(Clone)]
pub struct Work {
    pub config: LayerConfig,
    pub tokens: u32,
    /// `[T, D]`.
    pub x: Vec<f32>,
    /// `[E, D]`.
    router: Vec<f32>,
    /// `[E]`.
    bias: Option<Vec<f32>>,
    experts: Experts,
}

/// Where the experts' numbers come from.
#[derive(Clone)]
enum Experts {
    /// Each matrix has numbers of its own, made when asked for.
    Own,
    /// Each matrix is a window of one pool of its projection, at a place of its own: a layer of any
    /// size takes little memory and no time to make.
    Pool(Arc<[Vec<bf16>; 3]>),
}

/// From one matrix's window to the next; prime, so that no row of one is a row of another nearby.
const STRIDE: usize = 1009;

/// An expert's matrix, `[out, in]`.
pub enum Matrix<'a> {
    Own(Vec<f32>),
    Window(&'a [bf16]),
}

impl Matrix<'_> {
    fn values(&self) -> Vec<f32> {
        match self {
            Self::Own(values) => values.clone(),
            Self::Window(values) => values.iter().map(|v| v.to_f32()).collect(),
        }
    }

    pub fn host(&self) -> HostWeights<'_> {
        match self {
            Self::Own(values) => HostWeights::F32(values),
            Self::Window(values) => HostWeights::Bf16(values),
        }
    }
}

/// Values of a token's hidden state in common with its block, and its own; their squares sum to 1.
const SHARED: f32 = 0.6;

impl Work {
    fn new(config: LayerConfig, tokens: u32) -> Self {
        let LayerConfig { hidden, experts, .. } = config;
        let router = fill(ROUTER, experts * hidden, 12.0 / (hidden as f32).sqrt());
        let x = fill(X, tokens * hidden, 1.0);
        Self { config, tokens, x, router, bias: None, experts: Experts::Own }
    }

    /// Decoding one block: T 32, D 2048, F 512, E 32, K 8, softmax, the gates of the 8 normalised.
    pub fn w1() -> Self {
        let routing = TokenChoice::new(8);
        let config = LayerConfig::new(2048, 512, 32, routing);
        Self::new(config, 32)
    }

    /// Expert choice: D 512, F 384, E 64, C T / 8 (W2 itself: T 512, C 64), chosen by and weighed
    /// with softmax over all experts.
    pub fn w2(tokens: u32) -> Self {
        let routing = ExpertChoice::new(8).with_normalise(Normalise::BeforeSelection);
        let config = {
            let mut config = Self::w1().config;
            config.hidden = 512;
            config.intermediate = 384;
            config.experts = 64;
            config
        };
        Self::new(config.with_routing(routing), tokens)
    }

    /// The same with some experts more popular than others: to logits of variance 1, one of
    /// variance 1 is added that is each expert's own.
    pub fn skewed(mut self) -> Self {
        let width = self.config.hidden as usize;
        self.x.chunks_exact_mut(width).for_each(|row| row[0] = 1.0);
        for (e, row) in self.router.chunks_exact_mut(width).enumerate() {
            row[0] = uniform(BIAS, e as u32, 12f32.sqrt());
        }
        self
    }

    /// LLaDA2.0-mini decoding a block of 32 tokens, with `experts` of its 256.
    pub fn block(experts: u32) -> Self {
        let llada = models::find("llada2-mini").expect("a model");
        Self::synthetic(llada.with_experts(experts), 32)
    }

    /// A model's layer with synthetic inputs: normal logits `2 (sqrt(0.6) Z_block + sqrt(0.4) Z) -
    /// 3`, of which the 32 tokens of a block share a part, so that a block of LLaDA2.0-mini uses
    /// about as many distinct experts as published (69.5 of 256). Weights are bf16.
    pub fn synthetic(config: LayerConfig, tokens: u32) -> Self {
        let LayerConfig { hidden, intermediate, experts, shared_experts, routing, .. } = config;
        let unit = 12f32.sqrt(); // variance 1
        let mut router = fill(ROUTER, experts * hidden, 2.0 * unit / (hidden as f32).sqrt());
        for row in router.chunks_exact_mut(hidden as usize) {
            row[0] = -3.0;
        }
        let bias = (routing.score() == Score::Sigmoid).then(|| fill(BIAS, experts, 0.002));
        let all = (experts + shared_experts) as usize;
        let count = (hidden * intermediate) as usize + all * STRIDE;
        let pool = [(GATE, hidden), (UP, hidden), (DOWN, intermediate)].map(|(seed, depth)| {
            let scale = 2.0 / (depth as f32).sqrt();
            (0..count as u32).map(|i| bf16::from_f32(uniform(seed, i, scale))).collect()
        });
        let experts = Experts::Pool(Arc::new(pool));
        Self { config, tokens, x: vec![], router, bias, experts }.with_input(tokens, 0)
    }

    /// The same layer with another input: `tokens` tokens of batch number `batch`.
    pub fn with_input(&self, tokens: u32, batch: u32) -> Self {
        let hidden = self.config.hidden;
        let unit = 12f32.sqrt();
        let width = hidden as usize;
        let blocks = tokens.div_ceil(32);
        let shared = stretch(BLOCK, batch * blocks * hidden, blocks * hidden, unit);
        let mut x = stretch(X, batch * tokens * hidden, tokens * hidden, unit);
        for (rows, shared) in x.chunks_mut(32 * width).zip(shared.chunks_exact(width)) {
            for row in rows.chunks_exact_mut(width) {
                for (x, shared) in row.iter_mut().zip(shared) {
                    *x = SHARED.sqrt() * shared + (1.0 - SHARED).sqrt() * *x;
                }
                row[0] = 1.0; // carries the -3
            }
        }
        Self { tokens, x, ..self.clone() }
    }

    /// Useful floating-point operations of `slots` routed rows and the shared experts' rows.
    pub fn flops(&self, slots: u32) -> u64 {
        let LayerConfig { hidden, intermediate, shared_experts, .. } = self.config;
        let rows = u64::from(slots) + u64::from(shared_experts) * u64::from(self.tokens);
        6 * rows * u64::from(hidden) * u64::from(intermediate)
    }

    /// `[E, D]`.
    pub fn router(&self) -> &[f32] {
        &self.router
    }

    /// The router for the twins.
    pub fn host_router(&self) -> HostRouter<'_> {
        host_router(&self.router, self.bias.as_deref())
    }

    pub fn expert(&self, e: u32, projection: Projection) -> Matrix<'_> {
        let LayerConfig { hidden, intermediate, .. } = self.config;
        let (place, seed, depth) = match projection {
            Projection::Gate => (0, GATE, hidden),
            Projection::Up => (1, UP, hidden),
            Projection::Down => (2, DOWN, intermediate),
        };
        let n = hidden * intermediate;
        match &self.experts {
            Experts::Own => Matrix::Own(stretch(seed, e * n, n, 2.0 / (depth as f32).sqrt())),
            Experts::Pool(pool) => {
                Matrix::Window(&pool[place][e as usize * STRIDE..][..n as usize])
            }
        }
    }

    /// The experts' weights, uploaded by every core.
    pub async fn weights(
        &self,
        gpu: &Gpu,
        ctx: &Context,
        weight_type: WeightType,
    ) -> wgmoe::Result<ExpertWeights> {
        let shape = self.config.expert_shape(weight_type);
        let weights = ExpertWeights::new(ctx, shape)?;
        let write = |e| {
            PROJECTIONS
                .iter()
                .try_for_each(|&p| weights.write(&gpu.queue, e, p, self.expert(e, p).host()))
        };
        let all: Vec<u32> = (0..shape.experts).collect();
        for part in all.chunks(threads()) {
            on_every_core(part, |&e| write(e)).into_iter().collect::<wgmoe::Result<()>>()?;
            // Lets go of the staging memory.
            gpu.queue.submit([]);
            gpu.wait_async().await?;
        }
        Ok(weights)
    }

    /// The layer over these weights.
    pub fn layer(&self, ctx: &Context, weights: ExpertWeights) -> wgmoe::Result<MoeLayer> {
        let router = {
            let mut router = Router::new(Tensor::new(ctx, "router", &self.router)?);
            router.bias = self.bias.as_ref().map(|b| Tensor::new(ctx, "bias", b)).transpose()?;
            router
        };
        MoeLayer::new(ctx, self.config, router, weights)
    }

    /// Binds a layer of this work, under whatever rule, to this input.
    pub fn bind(
        &self,
        gpu: &Gpu,
        layer: &MoeLayer,
        scratch: Option<&Scratch>,
    ) -> wgmoe::Result<Bound> {
        self.bind_within(gpu, layer, scratch, None)
    }

    /// The same within a limit of scratch.
    pub fn bind_within(
        &self,
        gpu: &Gpu,
        layer: &MoeLayer,
        scratch: Option<&Scratch>,
        limit: Option<u64>,
    ) -> wgmoe::Result<Bound> {
        let hidden = gpu.upload(&self.x);
        let out = gpu.upload(&vec![f32::NAN; self.x.len()]);
        let mut batch = Batch::new(&hidden, self.tokens).into_out(&out);
        batch.scratch = scratch;
        batch.scratch_limit = limit;
        let step = layer.bind(&batch)?;
        Ok(Bound { config: *layer.config(), step, hidden, out })
    }

    /// What the twins make of the logits and scores that the device computed, compared with what it
    /// chose: logits (whole, or in eight tokens where that takes long), scores of eight tokens,
    /// coresets and choice whole.
    pub async fn check_choice(&self, gpu: &Gpu, bound: &Bound) -> Result<Choice, String> {
        let config = bound.config;
        let (d, e, t) = (config.hidden as usize, config.experts as usize, self.tokens as usize);
        let read = async |slice| gpu.download_async::<f32>(slice).await.map_err(|e| e.to_string());
        let [logits, s, r] = selection(&bound.step).ok_or("no tokens")?;
        let [logits, s, r] = [read(logits).await?, read(s).await?, read(r).await?];
        let eight = spread(t, 8);
        let whole: Vec<usize> = (0..t).collect();
        for &t in if t * e * d <= WHOLE_LOGITS { &whole } else { &eight } {
            let want = logits_twin(&self.x[t * d..][..d], &self.router, d);
            let (got, atol) = (&logits[t * e..][..e], 2e-5 * (d as f32).sqrt());
            close(got, &want, atol, 2e-5, &format!("token {t}: logits"))?;
        }
        let routing = config.routing;
        for &t in &eight {
            let row = |v: &[f32]| v[t * e..][..e].to_vec();
            let bias = self.bias.as_deref();
            let (want_s, want_r) =
                scores::cpu(&row(&logits), e, routing.score(), routing.by_logits(), bias);
            if s != logits {
                close(&row(&s), &want_s, 1e-7, 1e-5, &format!("token {t}: scores"))?;
                close(&row(&r), &want_r, 1e-5, 1e-5, &format!("token {t}: selection values"))?;
            }
        }
        let want =
            cpu_routing(&config, &self.host_router(), HostBatch::default(), [&logits, &s, &r]);
        let words = async |slice| gpu.download_async::<u32>(slice).await.map_err(|e| e.to_string());
        let assigned = words(bound.step.assigned().ok_or("no tokens")?).await?;
        same(&assigned, &want.assigned, "assigned")?;
        if let Some(coreset) = &want.coreset {
            let elected = words(bound.step.coreset().ok_or("no coreset")?).await?;
            same(&elected, coreset, "coreset")?;
        }
        Ok(Choice {
            assigned,
            gates: want.gates,
            tokens: t,
            coreset_words: want.coreset.map_or(0, |c| c.len()),
        })
    }

    /// The plan exactly, for the device's own gates; the gates of all pairs; the statistics.
    pub async fn check_plan(
        &self,
        gpu: &Gpu,
        bound: &Bound,
        choice: &Choice,
    ) -> Result<HostPlan, String> {
        let say = |e: wgmoe::Error| e.to_string();
        let e = bound.config.experts as usize;
        let gates = bound.step.gates().ok_or("no tokens")?;
        let gates: Vec<f32> = gpu.download_async(gates).await.map_err(say)?;
        // Only assigned pairs have a gate.
        let pairs: Vec<usize> = (0..choice.tokens * e)
            .filter(|i| bits::get(&choice.assigned, choice.tokens, i % e, i / e))
            .collect();
        let of = |gates: &[f32]| pairs.iter().map(|&i| gates[i]).collect::<Vec<_>>();
        close(&of(&gates), &of(&choice.gates), 1e-7, 1e-5, "gates")?;
        let (shape, plan) = bound.step.plan().ok_or("no tokens")?;
        let words: Vec<u32> = gpu.download_async(plan).await.map_err(say)?;
        let got = HostPlan::from_words(&shape, &words).map_err(say)?;
        let want = HostPlan::cpu(&shape, &choice.assigned, &gates);
        if got != want {
            return Err("the plan differs".into());
        }
        let stats: Vec<u32> = gpu.download_async(bound.step.stats()).await.map_err(say)?;
        let stats = Stats::from_words(&stats).map_err(say)?;
        let got = [stats.slots, stats.unique_experts, stats.ignored];
        same(
            &got,
            &[choice.slots(), choice.unique_experts(), 0],
            "slots, unique experts, ignored",
        )?;
        Ok(want)
    }

    /// The output of `sample` tokens, computed by every core; none may be NaN or infinite anywhere.
    pub async fn check_output(
        &self,
        gpu: &Gpu,
        layer: &MoeLayer,
        bound: &Bound,
        choice: &Choice,
        sample: usize,
    ) -> Result<(), String> {
        let config = bound.config;
        let (d, e) = (config.hidden as usize, config.experts as usize);
        let shape = layer.weights().shape();
        let got: Vec<f32> = gpu.download_async(&bound.out).await.map_err(|e| e.to_string())?;
        let tokens: Vec<(usize, Vec<(u32, f32)>)> = spread(choice.tokens, sample)
            .into_iter()
            .map(|t| {
                let experts = bits::experts_of(&choice.assigned, choice.tokens, t);
                let gate = |i| (i as u32, choice.gates[t * e + i]);
                (t, experts.into_iter().map(gate).collect())
            })
            .collect();
        let shared = config.experts..config.experts + config.shared_experts;
        let used = tokens.iter().flat_map(|(_, chosen)| chosen).map(|&(e, _)| e).chain(shared);
        let mut experts: HashMap<(u32, Projection), Matrix<'_>> = HashMap::new();
        for e in used {
            for p in PROJECTIONS {
                experts.entry((e, p)).or_insert_with(|| {
                    let weight_type = shape.types_of(e).of(p);
                    match (self.expert(e, p), weight_type) {
                        // What is held in bf16 is as it is in the wider types.
                        (window @ Matrix::Window(_), WeightType::Bf16 | WeightType::F32) => window,
                        (matrix, _) => {
                            let depth = shape.matrix(p)[1];
                            Matrix::Own(stored(&matrix.values(), depth, weight_type))
                        }
                    }
                });
            }
        }
        let host = |e: u32, p: Projection| experts[&(e, p)].host();
        let check = |(t, chosen): &(usize, Vec<(u32, f32)>)| {
            let row = t * d..(t + 1) * d;
            let want = cpu_token(&config, &host, &self.x[row.clone()], chosen);
            let atol = 2e-5 * largest(&want) + 1e-6;
            close(&got[row], &want, atol, 2e-5, &format!("token {t}: output"))
        };
        on_every_core(&tokens, check).into_iter().collect::<Result<(), _>>()?;
        match got.iter().position(|v| !v.is_finite()) {
            Some(i) => Err(format!("token {}: output not finite", i / d)),
            None => Ok(()),
        }
    }
}

/// Multiply-adds up to which all logits are compared, not those of eight tokens.
const WHOLE_LOGITS: usize = 1 << 25;

/// A layer bound to an input.
pub struct Bound {
    pub config: LayerConfig,
    pub step: BoundLayer,
    pub hidden: wgpu::Buffer,
    pub out: wgpu::Buffer,
}

impl Bound {
    /// The dispatches of one part.
    pub fn part(&self, part: Part) -> Vec<Dispatch> {
        self.step.dispatches().filter(|d| Part::of(d) == part).cloned().collect()
    }

    /// Runs some parts, and waits.
    pub async fn run(&self, gpu: &Gpu, parts: &[Part]) -> wgmoe::Result<()> {
        let dispatches = self.step.dispatches().filter(|d| parts.contains(&Part::of(d)));
        let step = dispatches.fold(BoundOp::default(), |step, d| step.then(d.clone().into()));
        gpu.run_async(&step).await
    }
}

/// A part of a layer, in the order in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The logits.
    Router,
    /// From logits to the choice.
    Routing,
    /// Gates, plan, statistics.
    Plan,
    /// The expert matmuls.
    Experts,
    /// The weighted sum of the experts' rows.
    Combine,
}

impl Part {
    pub const ALL: [Self; 5] =
        [Self::Router, Self::Routing, Self::Plan, Self::Experts, Self::Combine];

    pub fn of(dispatch: &Dispatch) -> Self {
        match (dispatch.stage(), dispatch.name()) {
            (Some("logits"), _) => Self::Router,
            (Some(_), _) => Self::Experts,
            (
                None,
                "plan_count" | "plan_scan" | "plan_fill" | "block_plan" | "block_plan_scaled",
            ) => Self::Plan,
            (None, "combine") => Self::Combine,
            (None, _) => Self::Routing,
        }
    }
}

/// A choice that device and twin agree on.
pub struct Choice {
    /// The bit set `[E, ceil(T / 32)]`.
    pub assigned: Vec<u32>,
    /// `[T, E]`, the twin's.
    gates: Vec<f32>,
    tokens: usize,
    pub coreset_words: usize,
}

impl Choice {
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// (token, expert) pairs, shared experts apart.
    pub fn slots(&self) -> u32 {
        self.assigned.iter().map(|w| w.count_ones()).sum()
    }

    /// Tokens of each expert.
    pub fn loads(&self) -> Vec<u32> {
        let load = |bits: &[u32]| bits.iter().map(|w| w.count_ones()).sum();
        self.assigned.chunks_exact(self.tokens.div_ceil(32)).map(load).collect()
    }

    /// Experts that some token uses.
    pub fn unique_experts(&self) -> u32 {
        self.loads().iter().filter(|&&n| n > 0).count() as u32
    }

    /// Experts that the tokens of a block use together: the mean over blocks of 32 tokens, each a
    /// column of words.
    pub fn experts_per_block(&self) -> f64 {
        let used = self.assigned.iter().filter(|&&w| w != 0).count();
        used as f64 / self.tokens.div_ceil(32) as f64
    }
}
