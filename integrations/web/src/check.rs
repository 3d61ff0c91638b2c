//! The checks: recorded layers, every routing rule, every storage type. On a device each is compared with the CPU
//! twins, and choices with an oracle that sorts; without one the twins are compared with what was recorded, with that
//! oracle, and with themselves by another way.
use crate::Device;
use serde::Serialize;
use std::cell::RefCell;
use testkit::compare::{close, largest, same};
use testkit::golden::{ATOL, File, Layer, RTOL};
use testkit::layer::selection;
use testkit::oracle;
use testkit::rules::{Rule, every_rule};
use testkit::works::{Bound, Choice, Part, Work};
use wgmoe::layer::{HostBatch, LayerConfig};
use wgmoe::plan::{HostPlan, bits};
use wgmoe::reference;
use wgmoe::routing::Routing;
use wgmoe::weights::Projection;
use wgmoe::{Gpu, MoeLayer, PlanShape, WeightType, models};

/// Two blocks.
const TOKENS: u32 = 64;
/// Experts of the layer: small enough to be checked whole.
const EXPERTS: u32 = 64;
const HIDDEN: u32 = 256;
const INTERMEDIATE: u32 = 64;

/// What came of a check.
#[derive(Serialize)]
pub(crate) struct Found {
    ok: bool,
    /// What was compared, or what differs.
    what: String,
}

impl From<Result<String, String>> for Found {
    fn from(result: Result<String, String>) -> Self {
        match result {
            Ok(what) => Self { ok: true, what },
            Err(what) => Self { ok: false, what },
        }
    }
}

/// Work on a device, told apart from what else the device reports; or without one.
async fn watched(
    device: Option<&Device>,
    work: impl Future<Output = Result<String, String>>,
) -> Result<String, String> {
    match device {
        Some(device) => device.watched(work).await,
        None => work.await,
    }
}

/// A recorded layer: its output by the device, or by the twins, beside the recorded one.
pub(crate) async fn recorded(
    device: Option<&Device>,
    name: &str,
    bytes: &[u8],
) -> Result<String, String> {
    let file = File::parse(name, bytes)?;
    let layer = Layer::read(&file)?.ok_or("holds no whole layer")?;
    watched(device, async {
        let got = match device {
            Some(Device { gpu, ctx, .. }) => {
                layer.on_gpu(gpu, ctx).await.map_err(|e| e.to_string())?
            }
            None => layer.on_cpu(),
        };
        let (error, ok) = layer.compare(&got);
        let text = format!(
            "{} outputs beside the recorded ones: largest difference {error:.1e}, allowed {ATOL:e} + {RTOL:e} of each",
            layer.y.len()
        );
        if ok { Ok(text) } else { Err(text) }
    })
    .await
}

enum Check {
    Rule(Rule),
    Type(WeightType),
}

/// The checks of a layer made here, in order.
pub(crate) struct Checks {
    work: Work,
    rules: Vec<Rule>,
    /// The layer on the device, once made.
    layer: RefCell<Option<MoeLayer>>,
}

impl Checks {
    pub(crate) fn new() -> Self {
        let model = models::find("llada2-mini").expect("a model of this name");
        let mut config = model.with_experts(EXPERTS);
        (config.hidden, config.intermediate) = (HIDDEN, INTERMEDIATE);
        let rules = every_rule(config.routing, config.experts);
        Self { work: Work::synthetic(config, TOKENS), rules, layer: RefCell::default() }
    }

    fn all(&self, on_device: bool) -> impl Iterator<Item = Check> {
        let types: &[WeightType] = if on_device { WeightType::ALL } else { &[] };
        let rules = self.rules.iter().cloned().map(Check::Rule);
        rules.chain(types.iter().copied().map(Check::Type))
    }

    pub(crate) fn names(&self, on_device: bool) -> Vec<String> {
        let name = |check| match check {
            Check::Rule((name, _)) => name,
            Check::Type(weight_type) => format!("weights in {}", weight_type.name()),
        };
        self.all(on_device).map(name).collect()
    }

    pub(crate) async fn run(&self, device: Option<&Device>, i: usize) -> Result<String, String> {
        let check = self.all(device.is_some()).nth(i).ok_or("no such check")?;
        let work = async {
            match (check, device) {
                (Check::Rule((_, rule)), Some(device)) => self.rule(device, rule).await,
                (Check::Rule((_, rule)), None) => self.rule_on_twins(rule),
                (Check::Type(weight_type), Some(device)) => self.weights(device, weight_type).await,
                (Check::Type(_), None) => Err("needs a device".into()),
            }
        };
        watched(device, work).await
    }

    /// A rule on the device: choice and plan whole and exactly, the outputs of all tokens.
    async fn rule(&self, device: &Device, rule: Routing) -> Result<String, String> {
        let kept = self.layer.borrow().clone();
        let layer = match kept {
            Some(layer) => layer,
            None => self.layer_of(device, WeightType::Bf16).await?,
        };
        *self.layer.borrow_mut() = Some(layer.clone());
        let layer = layer.with_routing(rule).map_err(|e| e.to_string())?;
        self.compare(device, &layer).await
    }

    /// The model's own rule over weights of a type.
    async fn weights(&self, device: &Device, weight_type: WeightType) -> Result<String, String> {
        self.compare(device, &self.layer_of(device, weight_type).await?).await
    }

    async fn layer_of(&self, device: &Device, weight_type: WeightType) -> Result<MoeLayer, String> {
        let Device { gpu, ctx, .. } = device;
        let weights = self.work.weights(gpu, ctx, weight_type).await;
        weights.and_then(|weights| self.work.layer(ctx, weights)).map_err(|e| e.to_string())
    }

    async fn compare(&self, device: &Device, layer: &MoeLayer) -> Result<String, String> {
        let (gpu, work) = (&device.gpu, &self.work);
        let bound = work.bind(gpu, layer, None).map_err(|e| e.to_string())?;
        bound.run(gpu, &Part::ALL).await.map_err(|e| e.to_string())?;
        let choice = work.check_choice(gpu, &bound).await?;
        self.sorted(gpu, &bound, &choice).await?;
        work.check_plan(gpu, &bound, &choice).await?;
        work.check_output(gpu, layer, &bound, &choice, TOKENS as usize).await?;
        let (slots, experts) = (choice.slots(), choice.unique_experts());
        Ok(format!(
            "choice as the twin's and as sorting finds it, exactly ({slots} slots, {experts} experts); plan as the twin's, exactly; outputs of {TOKENS} tokens within 2e-5 of the largest"
        ))
    }

    /// The device's choice and gates beside what sorting finds.
    async fn sorted(&self, gpu: &Gpu, bound: &Bound, choice: &Choice) -> Result<(), String> {
        let read = async |slice| gpu.download_async::<f32>(slice).await.map_err(|e| e.to_string());
        let [logits, s, r] = selection(&bound.step).ok_or("no tokens")?;
        let [logits, s, r] = [read(logits).await?, read(s).await?, read(r).await?];
        let gates = read(bound.step.gates().ok_or("no tokens")?).await?;
        let experts = bound.config.experts as usize;
        let want = oracle::choose(bound.config.routing, experts, [&logits, &s, &r]);
        oracle::compare(&choice.assigned, &gates, experts, &want)
    }

    /// A rule on the twins alone: beside what sorting finds, and its experts run token by token and, through the
    /// plan, expert by expert.
    fn rule_on_twins(&self, rule: Routing) -> Result<String, String> {
        let Work { config, x, .. } = &self.work;
        let config = config.with_routing(rule);
        let LayerConfig { hidden, intermediate, activation, .. } = config;
        let (d, e, t) = (hidden as usize, config.experts as usize, TOKENS as usize);
        let router = self.work.host_router();
        let logits = reference::logits(x, router.weight, d);
        let (s, r) = reference::scores(&logits, e, rule.score(), rule.by_logits(), router.bias);
        let batch = HostBatch::default();
        let routed = reference::layer_routing(&config, &router, batch, [&logits, &s, &r]);
        let want = oracle::choose(rule, e, [&logits, &s, &r]);
        oracle::compare(&routed.assigned, &routed.gates, e, &want)?;
        let slots: u32 = routed.assigned.iter().map(|w| w.count_ones()).sum();
        let shape = PlanShape::on_host(TOKENS, config.experts, slots.max(1))
            .with_shared_experts(config.shared_experts);
        let plan = HostPlan::cpu(&shape, &routed.assigned, &routed.gates);
        let mut y = vec![];
        for (e, span) in (0..).zip(plan.expert_offsets.windows(2)) {
            let matrices = Projection::ALL.map(|p| self.work.expert(e, p));
            let [gate, up, down] = [0, 1, 2].map(|i| matrices[i].host());
            for &t in &plan.token_of[span[0] as usize..span[1] as usize] {
                y.extend(reference::expert(
                    &x[t as usize * d..][..d],
                    intermediate as usize,
                    activation,
                    [&|i| gate.get(i), &|i| up.get(i), &|i| down.get(i)],
                ));
            }
        }
        let got = reference::combine(&plan, &y, d, None);
        let pools: Vec<_> = (0..config.experts + config.shared_experts)
            .map(|e| Projection::ALL.map(|p| self.work.expert(e, p)))
            .collect();
        for t in 0..t {
            let ids = bits::experts_of(&routed.assigned, TOKENS as usize, t);
            let chosen: Vec<(u32, f32)> =
                ids.iter().map(|&i| (i as u32, routed.gates[t * e + i])).collect();
            let place = |p| Projection::ALL.iter().position(|&q| q == p).expect("a projection");
            let host = |e: u32, p| pools[e as usize][place(p)].host();
            let want = reference::layer_token(&config, &host, &x[t * d..][..d], &chosen);
            let of_plan: Vec<u32> = (0..config.experts)
                .filter(|&e| {
                    let span = &plan.expert_offsets[e as usize..][..2];
                    plan.token_of[span[0] as usize..span[1] as usize].contains(&(t as u32))
                })
                .collect();
            same(&of_plan, &chosen.iter().map(|c| c.0).collect::<Vec<_>>(), "experts")?;
            let atol = 2e-5 * largest(&want);
            close(&got[t * d..][..d], &want, atol, 2e-5, &format!("token {t}"))?;
        }
        Ok(format!(
            "choice as sorting finds it, exactly ({slots} slots); on the CPU, expert by expert as token by token, {TOKENS} tokens within 2e-5 of the largest"
        ))
    }
}
