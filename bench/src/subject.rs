//! A layer on the device under one rule and one load: weights and inputs that take turns, the
//! comparison with the CPU twins, and the parts that are timed.
use crate::device::Device;
use crate::file::{self, Part};
use crate::matrix::{Group, Layer};
use crate::timing::{Stop, Timer, Timing};
use testkit::works::{self, Bound, Choice, Part as Stage, Work};
use wgmoe::plan::HostPlan;
use wgmoe::{Context, Dispatch, Error, Gpu, MoeLayer, WeightType, wgpu};

/// Copies of weights, all together, that no cache holds.
const BEYOND_CACHES: u64 = 512 << 20;
/// Fewest experts that a layer is cut down to.
const FEWEST_EXPERTS: u32 = 16;

/// A layer with its weights on the device.
pub(crate) struct Loaded {
    pub(crate) layer: Layer,
    work: Work,
    /// One for each copy of the weights.
    copies: Vec<MoeLayer>,
}

/// Uploads a layer's weights, cut down to `memory` bytes and to what the device gives; at most a
/// copy for each input.
pub(crate) async fn load(
    device: &Device,
    ctx: &Context,
    mut layer: Layer,
    memory: u64,
    inputs: u32,
) -> Result<Loaded, String> {
    let shape = layer.config.expert_shape(layer.weights);
    let fit = memory / shape.device_bytes();
    if u64::from(shape.experts) > fit {
        let routed = (fit as u32).saturating_sub(layer.config.shared_experts);
        // Groups of experts stay whole.
        let most = if routed == 0 { 0 } else { 1 << routed.ilog2() };
        layer = layer.with_experts(most, &format!("{} MiB for weights", memory >> 20));
    }
    loop {
        let experts = layer.config.experts;
        if experts < FEWEST_EXPERTS {
            return Err(format!("no room for {FEWEST_EXPERTS} experts"));
        }
        match upload(device, ctx, &layer, memory, inputs).await {
            Ok((work, copies)) => return Ok(Loaded { layer, work, copies }),
            Err(e) if device.lost().await.is_some() => return Err(e.to_string()),
            // Out of memory, as a rule.
            Err(e @ (Error::Device(_) | Error::Limit { .. })) if experts / 2 >= FEWEST_EXPERTS => {
                layer = layer.with_experts(experts / 2, &e.to_string());
            }
            Err(e) => return Err(e.to_string()),
        }
    }
}

async fn upload(
    device: &Device,
    ctx: &Context,
    layer: &Layer,
    memory: u64,
    inputs: u32,
) -> Result<(Work, Vec<MoeLayer>), Error> {
    let gpu = &device.gpu;
    let work = Work::synthetic(layer.config, 32);
    let first = work.weights(gpu, ctx, layer.weights).await?;
    let bytes = first.bytes();
    let count = BEYOND_CACHES.div_ceil(bytes).min(memory / bytes).clamp(1, inputs.into());
    let mut copies = vec![work.layer(ctx, first)?];
    for _ in 1..count {
        let weights = work.weights(gpu, ctx, layer.weights).await?;
        copies.push(work.layer(ctx, weights)?);
    }
    if let Err(Stop::Failed(e)) = device.errors() {
        return Err(Error::Device(e));
    }
    Ok((work, copies))
}

/// How many inputs take turns, how many rows of each are compared, and which parts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) inputs: u32,
    pub(crate) rows: usize,
}

/// A layer under one rule and one load, on several inputs.
pub(crate) struct Subject {
    inputs: Vec<Input>,
    weight_copies: u32,
    weights: WeightType,
    effort: Effort,
    /// What the comparison of each part came to.
    routing: Result<(), String>,
    plan: Result<(), String>,
    gather: Result<(), String>,
    experts: Result<(), String>,
}

struct Input {
    bound: Bound,
    choice: Option<Choice>,
    gather: Vec<Dispatch>,
    gathered: u32,
    /// Tokens that the routed or shared experts read.
    rows_read: u32,
}

impl Loaded {
    /// Binds a group's inputs, runs what its parts need, and compares it. `Err` is of the device;
    /// what differs from the twin is kept for its parts.
    pub(crate) async fn prepare(
        &self,
        device: &Device,
        ctx: &Context,
        group: &Group,
        effort: Effort,
    ) -> Result<Subject, Error> {
        let layers = self.copies.iter().map(|l| l.with_routing(group.routing));
        let layers: Vec<MoeLayer> = layers.collect::<Result<_, _>>()?;
        let mut subject = Subject {
            inputs: vec![],
            weight_copies: layers.len() as u32,
            weights: self.layer.weights,
            effort,
            routing: Ok(()),
            plan: Ok(()),
            gather: Ok(()),
            experts: Ok(()),
        };
        for i in 0..effort.inputs {
            let work = self.work.with_input(group.tokens, i);
            let layer = &layers[i as usize % layers.len()];
            subject.add(device, ctx, &work, layer, group).await?;
        }
        if let Err(Stop::Failed(e)) = device.errors() {
            return Err(Error::Device(e));
        }
        Ok(subject)
    }
}

impl Subject {
    async fn add(
        &mut self,
        device: &Device,
        ctx: &Context,
        work: &Work,
        layer: &MoeLayer,
        group: &Group,
    ) -> Result<(), Error> {
        let gpu = &device.gpu;
        let bound = work.bind(gpu, layer, None)?;
        let whole = group.parts.iter().any(|&p| p != Part::Routing);
        let parts: &[Stage] = if whole { &Stage::ALL } else { &[Stage::Router, Stage::Routing] };
        bound.run(gpu, parts).await?;
        let mut input = Input { bound, choice: None, gather: vec![], gathered: 0, rows_read: 0 };
        let choice = work.check_choice(gpu, &input.bound).await;
        if let Some(choice) = keep(&mut self.routing, choice) {
            if whole {
                let plan = work.check_plan(gpu, &input.bound, &choice).await;
                let plan = keep(&mut self.plan, plan);
                if let Some(plan) = plan.filter(|_| group.parts.contains(&Part::Gather)) {
                    let gather = input.bind_gather(gpu, ctx, work, &plan).await;
                    keep(&mut self.gather, gather);
                }
                let rows = self.effort.rows;
                let output = work.check_output(gpu, layer, &input.bound, &choice, rows).await;
                keep(&mut self.experts, output);
            }
            input.choice = Some(choice);
        }
        self.inputs.push(input);
        Ok(())
    }

    /// What is wrong with a part's result, or with one that it rests on.
    pub(crate) fn wrong(&self, part: Part) -> Result<(), String> {
        let rests_on: &[&Result<(), String>] = match part {
            Part::Routing => &[&self.routing],
            Part::Plan => &[&self.routing, &self.plan],
            Part::Gather => &[&self.routing, &self.plan, &self.gather],
            Part::Experts | Part::Layer => &[&self.routing, &self.plan, &self.experts],
        };
        rests_on.iter().copied().cloned().collect()
    }

    /// How a part was compared.
    pub(crate) fn check(&self, part: Part) -> String {
        let Effort { inputs, rows } = self.effort;
        let how = match part {
            Part::Routing => {
                "logits and scores of 8 tokens; coresets and choices of all, exactly".into()
            }
            Part::Plan => "whole, exactly; gates within 1e-5".into(),
            Part::Gather => "whole or in 64 rows, exactly".into(),
            Part::Experts | Part::Layer => {
                format!(
                    "choice and plan whole; outputs of {rows} tokens, within 2e-5 of the largest"
                )
            }
        };
        format!("against the CPU twin, for each of {inputs} inputs: {how}")
    }

    /// Times a part whose result was right.
    pub(crate) async fn time(
        &self,
        timer: &Timer<'_>,
        part: Part,
        seconds: f64,
    ) -> Result<Timing, Stop> {
        self.wrong(part).map_err(Stop::Failed)?;
        let turns: Vec<Vec<Dispatch>> = self.inputs.iter().map(|i| i.dispatches(part)).collect();
        let record = |turn: usize, pass: &mut wgpu::ComputePass<'_>| {
            for dispatch in &turns[turn % turns.len()] {
                dispatch.record(pass);
            }
        };
        timer.time(&record, seconds).await
    }

    /// What a part must do, on average over the inputs.
    pub(crate) fn work(&self, part: Part) -> file::Work {
        let mut sum = file::Work {
            bytes: 0.0,
            flops: 0.0,
            dispatches: 0.0,
            slots: 0.0,
            experts_touched: 0.0,
            experts_per_block: 0.0,
        };
        let share = 1.0 / self.inputs.len() as f64;
        for input in &self.inputs {
            let Some(choice) = &input.choice else { continue };
            let work = input.work(part, choice, self.weights);
            sum.bytes += work.bytes * share;
            sum.flops += work.flops * share;
            sum.dispatches += work.dispatches * share;
            sum.slots += work.slots * share;
            sum.experts_touched += work.experts_touched * share;
            sum.experts_per_block += work.experts_per_block * share;
        }
        sum
    }

    pub(crate) fn inputs(&self) -> u32 {
        self.inputs.len() as u32
    }

    pub(crate) fn weight_copies(&self) -> u32 {
        self.weight_copies.min(self.inputs())
    }
}

impl Input {
    /// Binds and compares a gather of the plan's rows, as many as one binding holds.
    async fn bind_gather(
        &mut self,
        gpu: &Gpu,
        ctx: &Context,
        work: &Work,
        plan: &HostPlan,
    ) -> Result<(), String> {
        let hidden = self.bound.config.hidden;
        let limits = gpu.device.limits();
        let most = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        let rows = plan.token_of.len().min((most / (4 * u64::from(hidden))) as usize);
        let rows = &plan.token_of[..rows];
        let x = (&self.bound.hidden, &work.x[..]);
        let step = works::gather(gpu, ctx, x, hidden, rows).await?;
        self.gather = step.dispatches().to_vec();
        self.gathered = rows.len() as u32;
        self.rows_read = distinct(rows);
        Ok(())
    }

    fn dispatches(&self, part: Part) -> Vec<Dispatch> {
        match part {
            Part::Routing => self.bound.part(Stage::Routing),
            Part::Plan => self.bound.part(Stage::Plan),
            Part::Experts => self.bound.part(Stage::Experts),
            Part::Gather => self.gather.clone(),
            Part::Layer => self.bound.step.dispatches().cloned().collect(),
        }
    }

    fn work(&self, part: Part, choice: &Choice, weights: WeightType) -> file::Work {
        let config = self.bound.config;
        let (d, f) = (f64::from(config.hidden), f64::from(config.intermediate));
        let (e, shared) = (f64::from(config.experts), f64::from(config.shared_experts));
        let t = choice.tokens() as f64;
        let routed = f64::from(choice.slots());
        let slots = routed + shared * t;
        let touched = f64::from(choice.unique_experts());
        let weights = (touched + shared) * config.expert_shape(weights).device_bytes() as f64;
        let bits = 4.0 * choice.assigned.len() as f64;
        let matmuls = 6.0 * slots * d * f;
        // In words of 4 bytes but for the weights.
        let (bytes, flops) = match part {
            // Logits; the scores where there are any; the bits and the coresets.
            Part::Routing => {
                let same = testkit::layer::selection(&self.bound.step)
                    .is_some_and(|[g, s, _]| g.buffer == s.buffer);
                let scores = if same { 0.0 } else { t * e };
                (4.0 * (t * e + scores + choice.coreset_words as f64) + bits, 0.0)
            }
            // The bits, a score for each pair; for each slot its token, its gate and its place.
            Part::Plan => (bits + 4.0 * (routed + 3.0 * slots), 0.0),
            Part::Gather => {
                let gathered = f64::from(self.gathered);
                (4.0 * (f64::from(self.rows_read) * d + gathered + gathered * d), 0.0)
            }
            Part::Experts => (4.0 * (t * d + slots + slots * d) + weights, matmuls),
            Part::Layer => (4.0 * (2.0 * t * d + e * d) + weights, matmuls + 2.0 * t * e * d),
        };
        file::Work {
            bytes,
            flops,
            dispatches: self.dispatches(part).len() as f64,
            slots,
            experts_touched: touched,
            experts_per_block: choice.experts_per_block(),
        }
    }
}

/// Keeps the first of several errors.
fn keep<T>(kept: &mut Result<(), String>, result: Result<T, String>) -> Option<T> {
    result.map_err(|e| *kept = kept.clone().and(Err(e))).ok()
}

fn distinct(tokens: &[u32]) -> u32 {
    let mut sorted = tokens.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    sorted.len() as u32
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::device;
    use crate::file::{Ceilings, Load, Outcome};
    use crate::run::measure;
    use std::sync::atomic::AtomicBool;
    use testkit::block_on;
    use wgmoe::models;
    use wgmoe::weights::{HostWeights, Projection};

    /// The device, or `None` with a note; `MOE_REQUIRE_GPU=1` makes absence a failure.
    fn open() -> Option<Device> {
        let adapters = block_on(device::adapters());
        let opened = device::first(&adapters).ok_or("no adapters".into());
        match opened.and_then(|i| block_on(Device::open(&adapters[i], false))) {
            Ok(device) => Some(device),
            Err(e) if std::env::var_os("MOE_REQUIRE_GPU").is_some() => panic!("{e}"),
            Err(e) => {
                eprintln!("skipped: {e}");
                None
            }
        }
    }

    const EFFORT: Effort = Effort { inputs: 2, rows: 2 };

    #[test]
    fn a_wrong_result_is_reported_and_never_timed() {
        let Some(device) = open() else { return };
        let ctx = Context::new(&device.gpu.device).unwrap();
        let model = models::find("ec-dlm").unwrap();
        let layer = Layer {
            model,
            config: model.config,
            reduced: None,
            weights: WeightType::Bf16,
            loads: vec![(Load::Block, 32)],
        };
        let layer = layer.with_experts(16, "a test");
        let loaded = block_on(load(&device, &ctx, layer, 1 << 30, 1)).unwrap();
        let stop = AtomicBool::new(false);
        let timer = Timer::new(&device, &stop);
        let group = &loaded.layer.groups()[0];
        let outcomes = |subject: &Subject| {
            block_on(measure(&timer, &Ceilings::default(), subject, group, 0.05)).unwrap()
        };

        let right = block_on(loaded.prepare(&device, &ctx, group, EFFORT)).unwrap();
        for (part, outcome) in outcomes(&right) {
            let measured = outcome.measured().unwrap_or_else(|| panic!("{part:?}: {outcome:?}"));
            assert!(measured.wall.median_ms > 0.0 && measured.work.bytes > 0.0, "{measured:?}");
            assert_eq!(measured.gpu.is_none(), measured.gpu_dropped.is_some());
        }

        // One value of each expert's last matrix, behind the twin's back.
        for e in 0..loaded.layer.config.experts {
            let matrix = loaded.work.expert(e, Projection::Down);
            let mut values: Vec<f32> =
                (0..matrix.host().len()).map(|i| matrix.host().get(i)).collect();
            values[7] += 1.0;
            let weights = loaded.copies[0].weights();
            weights
                .write(&device.gpu.queue, e, Projection::Down, HostWeights::F32(&values))
                .unwrap();
        }
        let wrong = block_on(loaded.prepare(&device, &ctx, group, EFFORT)).unwrap();
        for (part, outcome) in outcomes(&wrong) {
            match (part, outcome) {
                (Part::Experts | Part::Layer, Outcome::Failed { reason }) => {
                    assert!(reason.contains("output: at 0 of 512: got"), "{reason}");
                }
                (Part::Routing | Part::Plan | Part::Gather, Outcome::Measured(_)) => {}
                (part, outcome) => panic!("{part:?}: {outcome:?}"),
            }
        }
        let before = timer.turns();
        assert!(matches!(block_on(wrong.time(&timer, Part::Layer, 0.05)), Err(Stop::Failed(_))));
        assert_eq!(timer.turns(), before, "a wrong result was timed");
    }

    #[test]
    fn what_rests_on_a_wrong_result_is_wrong() {
        let wrong = || Err("wrong".to_string());
        let subject = |routing, plan, gather, experts| Subject {
            inputs: vec![],
            weights: WeightType::Bf16,
            weight_copies: 1,
            effort: EFFORT,
            routing,
            plan,
            gather,
            experts,
        };
        let parts = [Part::Routing, Part::Plan, Part::Gather, Part::Experts, Part::Layer];
        let right = |s: Subject| parts.map(|p| s.wrong(p).is_ok());
        assert_eq!(right(subject(Ok(()), Ok(()), Ok(()), Ok(()))), [true; 5]);
        assert_eq!(right(subject(wrong(), Ok(()), Ok(()), Ok(()))), [false; 5]);
        assert_eq!(
            right(subject(Ok(()), wrong(), Ok(()), Ok(()))),
            [true, false, false, false, false]
        );
        assert_eq!(
            right(subject(Ok(()), Ok(()), wrong(), Ok(()))),
            [true, true, false, true, true]
        );
        assert_eq!(
            right(subject(Ok(()), Ok(()), Ok(()), wrong())),
            [true, true, true, false, false]
        );
    }

    #[test]
    fn an_interrupted_run_measures_no_more() {
        let Some(device) = open() else { return };
        let stop = AtomicBool::new(true);
        let timer = Timer::new(&device, &stop);
        assert_eq!(block_on(timer.time(&|_, _| {}, 0.05)).unwrap_err(), Stop::Interrupted);
    }
}
