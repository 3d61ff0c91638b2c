//! A run: adapters, layers and cases in order, within a time, kept as they come.
use crate::ceilings;
use crate::device::{self, Device};
use crate::file::{Adapter, Case, Ceilings, Measured, Outcome, Part, Report};
use crate::matrix::{Group, Layer, layers};
use crate::subject::{Effort, Loaded, Subject, load};
use crate::timing::{Stop, Timer};
use futures_util::FutureExt;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use web_time::Instant;
use wgmoe::{Context, ContextOptions, MatrixUnits, Precision, WeightType, wgpu};

/// How a run goes.
#[derive(Debug)]
#[non_exhaustive]
pub struct Plan<'a> {
    /// Few models with few experts, so that a software driver is done in time.
    pub quick: bool,
    /// Seconds for each adapter.
    pub seconds: f64,
    /// Bytes of weights, where they are limited.
    pub memory: Option<u64>,
    /// What the experts are stored as.
    pub weights: WeightType,
    /// Experts on matrix units, at this precision, where the adapter has some that the kernels know.
    pub matrix_units: Option<Precision>,
    /// What to call a driver of which wgpu knows nothing.
    pub driver: Option<String>,
    /// Commit of this program's source.
    pub commit: Option<String>,
    /// Set to end the run early.
    pub stop: &'a AtomicBool,
}

impl<'a> Plan<'a> {
    /// A full run.
    pub fn new(seconds: f64, stop: &'a AtomicBool) -> Self {
        let weights = WeightType::Bf16;
        let (memory, matrix_units, driver, commit) = (None, None, None, None);
        Self { quick: false, seconds, memory, weights, matrix_units, driver, commit, stop }
    }
}

/// Who watches a run.
pub trait Watch {
    /// The next adapter has so many cases, no fewer than one.
    fn begin(&mut self, cases: usize);
    /// What is going on, for at most so many seconds more.
    fn say(&mut self, what: &str, seconds_left: u64);
    /// What went wrong, to stay.
    fn note(&mut self, what: &str);
    /// One more case is done.
    fn advance(&mut self);
    /// The adapter is done.
    fn end(&mut self);
    /// Keeps what was measured until now.
    ///
    /// # Errors
    ///
    /// Why it cannot be kept. The run ends with it.
    fn save(&mut self, report: &Report) -> Result<(), String>;
}

/// Seconds that a case is timed for.
const CASE_SECONDS: [f64; 2] = [0.03, 0.6];

/// Measures adapters one after another; what was measured is saved after each group of cases.
///
/// # Errors
///
/// Why it could not be saved.
pub async fn run(
    adapters: &[wgpu::Adapter],
    plan: &Plan<'_>,
    watch: &mut dyn Watch,
) -> Result<Report, String> {
    let mut report = Report::new(plan.quick, plan.commit.clone());
    // Says at once where the file cannot be written.
    watch.save(&report)?;
    for adapter in adapters {
        let mut entry = device::describe(adapter);
        if let Some(driver) = plan.driver.as_ref().filter(|_| entry.driver.is_empty()) {
            entry.driver = driver.clone();
        }
        report.adapters.push(entry);
        watch.save(&report)?;
        let mut measuring = Measuring::new(plan, &mut report, watch);
        let outcome = match AssertUnwindSafe(measuring.adapter(adapter)).catch_unwind().await {
            Ok(outcome) => outcome,
            Err(panic) => Err(Stop::Failed(message(&*panic))),
        };
        measuring.watch.end();
        let entry = measuring.entry();
        match outcome {
            Ok(()) => {}
            Err(Stop::Failed(why)) => entry.failure = Some(why),
            Err(Stop::Interrupted) => report.interrupted = true,
        }
        watch.save(&report)?;
        if report.interrupted {
            break;
        }
    }
    Ok(report)
}

/// What a panic of a driver or of wgpu says.
fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    format!("a panic of the driver or of wgpu: {text}")
}

/// Where cases are measured: a device, and what was made of it.
#[derive(Clone, Copy)]
struct Site<'a> {
    device: &'a Device,
    ctx: &'a Context,
    timer: &'a Timer<'a>,
    ceilings: &'a Ceilings,
}

/// The last adapter of a report, being measured.
struct Measuring<'a> {
    plan: &'a Plan<'a>,
    report: &'a mut Report,
    watch: &'a mut dyn Watch,
    end: Instant,
}

impl<'a> Measuring<'a> {
    fn new(plan: &'a Plan<'a>, report: &'a mut Report, watch: &'a mut dyn Watch) -> Self {
        let end = Instant::now() + Duration::from_secs_f64(plan.seconds);
        Self { plan, report, watch, end }
    }

    fn entry(&mut self) -> &mut Adapter {
        self.report.adapters.last_mut().expect("pushed before")
    }

    /// So that a driver that crashes or hangs later takes nothing with it.
    fn save(&mut self) -> Result<(), Stop> {
        self.watch.save(self.report).map_err(Stop::Failed)
    }

    fn say(&mut self, what: &str) {
        let left = self.end.saturating_duration_since(Instant::now()).as_secs();
        let name = self.entry().name.clone();
        self.watch.say(&format!("{name}: {what}"), left);
    }

    async fn adapter(&mut self, adapter: &wgpu::Adapter) -> Result<(), Stop> {
        self.say("opening");
        let units = self.plan.matrix_units;
        let device = Device::open(adapter, units.is_some()).await.map_err(|e| {
            self.watch.note(&format!("{}: {e}", adapter.get_info().name));
            Stop::Failed(e)
        })?;
        let mut options = ContextOptions::default();
        if let Some(precision) = units {
            let units = MatrixUnits::new(adapter, &device.gpu.queue).with_precision(precision);
            options = options.with_matrix_units(units);
        }
        let ctx = Context::with_options(&device.gpu.device, options)?;
        if units.is_some() {
            self.entry().matrix_units = ctx.matrix().to_string();
        }
        let timer = Timer::new(&device, self.plan.stop);
        self.say("ceilings");
        let ceilings =
            ceilings::measure(&timer, &ctx, if self.plan.quick { 0.3 } else { 1.0 }).await?;
        self.entry().ceilings = Some(ceilings.clone());
        self.save()?;
        let site = Site { device: &device, ctx: &ctx, timer: &timer, ceilings: &ceilings };
        let layers = layers(self.plan.quick, self.plan.weights);
        self.watch.begin(layers.iter().map(cases).sum());
        let count = layers.len();
        for (i, layer) in layers.into_iter().enumerate() {
            // What one layer leaves of its time goes to the next.
            let now = Instant::now();
            let end = now + self.end.saturating_duration_since(now) / (count - i) as u32;
            self.layer(site, layer, end).await?;
            self.save()?;
            if let Some(why) = device.lost().await {
                return Err(Stop::Failed(why));
            }
        }
        Ok(())
    }

    /// Bytes of a layer's weights, at most.
    fn memory(&self, device: &Device) -> u64 {
        self.plan.memory.unwrap_or(match device.gpu.info.device_type {
            wgpu::DeviceType::DiscreteGpu => 8 << 30,
            wgpu::DeviceType::Cpu => 1 << 30,
            _ => 4 << 30,
        })
    }

    /// Measures a layer's groups until `end`.
    async fn layer(&mut self, site: Site<'_>, layer: Layer, end: Instant) -> Result<(), Stop> {
        if end <= Instant::now() {
            self.skip_layer(&layer, &self.out_of_time());
            return Ok(());
        }
        let (device, quick) = (site.device, self.plan.quick);
        self.say(&format!("weights of {}", layer.model.name));
        let inputs = effort(quick, 0).inputs;
        let memory = self.memory(device);
        let loaded = match load(device, site.ctx, layer.clone(), memory, inputs).await {
            Ok(loaded) => loaded,
            Err(e) => {
                self.skip_layer(&layer, &e);
                return Ok(());
            }
        };
        let layer = &loaded.layer;
        let groups = layer.groups();
        let mut left: usize = groups.iter().map(|g| g.parts.len()).sum();
        for group in &groups {
            let seconds = end.saturating_duration_since(Instant::now()).as_secs_f64();
            let effort = effort(quick, group.tokens);
            let expected = expected_seconds(layer, group, effort, site.ceilings);
            if seconds <= 0.0 {
                self.skip(layer, group, &self.out_of_time());
            } else if expected > seconds {
                let why = format!(
                    "would take about {expected:.0} s, and {seconds:.0} s of this layer's share \
                     are left"
                );
                self.skip(layer, group, &why);
            } else {
                self.say(&format!("{}, {}", layer.model.name, group.rule));
                let each = (seconds / left as f64 / 2.0).clamp(CASE_SECONDS[0], CASE_SECONDS[1]);
                let turn = self.group(site, &loaded, group, effort, each);
                match AssertUnwindSafe(turn).catch_unwind().await {
                    Ok(result) => result?,
                    Err(panic) => self.fail(layer, group, &message(&*panic)),
                }
                self.save()?;
            }
            left -= group.parts.len();
            if device.lost().await.is_some() {
                break;
            }
        }
        Ok(())
    }

    /// Prepares, checks and times the cases of a group, about `seconds` each.
    async fn group(
        &mut self,
        site: Site<'_>,
        loaded: &Loaded,
        group: &Group,
        effort: Effort,
        seconds: f64,
    ) -> Result<(), Stop> {
        let Site { device, ctx, timer, ceilings } = site;
        if timer.stopped() {
            return Err(Stop::Interrupted);
        }
        let one = Effort { inputs: 1, ..effort };
        let mut prepared = loaded.prepare(device, ctx, group, effort).await;
        // Several inputs may be more than fits.
        if prepared.is_err() && device.lost().await.is_none() {
            prepared = loaded.prepare(device, ctx, group, one).await;
        }
        let subject = match prepared {
            Ok(subject) => subject,
            Err(e) => {
                self.fail(&loaded.layer, group, &e.to_string());
                return Ok(());
            }
        };
        for (part, outcome) in measure(timer, ceilings, &subject, group, seconds).await? {
            if let Outcome::Failed { reason } = &outcome {
                let name = &loaded.layer.model.name;
                self.watch.note(&format!("{name}, {}, {}: {reason}", group.rule, part.name()));
            }
            self.push(&loaded.layer, group, part, outcome);
        }
        Ok(())
    }

    fn push(&mut self, layer: &Layer, group: &Group, part: Part, outcome: Outcome) {
        let (id, reduced) = (layer.case(group, part), layer.reduced.clone());
        self.entry().cases.push(Case { id, reduced, outcome });
        self.watch.advance();
    }

    fn fail(&mut self, layer: &Layer, group: &Group, reason: &str) {
        self.watch.note(&format!("{}, {}: {reason}", layer.model.name, group.rule));
        for &part in &group.parts {
            self.push(layer, group, part, Outcome::Failed { reason: reason.into() });
        }
    }

    fn skip(&mut self, layer: &Layer, group: &Group, reason: &str) {
        for &part in &group.parts {
            self.push(layer, group, part, Outcome::Skipped { reason: reason.into() });
        }
    }

    fn skip_layer(&mut self, layer: &Layer, reason: &str) {
        for group in layer.groups() {
            self.skip(layer, &group, reason);
        }
    }

    fn out_of_time(&self) -> String {
        format!("the {:.0} s of this adapter were used up", self.plan.seconds)
    }
}

fn cases(layer: &Layer) -> usize {
    layer.groups().iter().map(|g| g.parts.len()).sum()
}

/// Inputs and compared rows: fewer where each takes long.
fn effort(quick: bool, tokens: u32) -> Effort {
    match tokens {
        _ if quick => Effort { inputs: 2, rows: 2 },
        0..=256 => Effort { inputs: 4, rows: 2 },
        _ => Effort { inputs: 2, rows: 4 },
    }
}

/// What a group takes at half the device's ceilings: every input once, and each part that runs the
/// experts six times.
fn expected_seconds(layer: &Layer, group: &Group, effort: Effort, ceilings: &Ceilings) -> f64 {
    let config = &layer.config;
    let heavy = group.parts.iter().filter(|p| matches!(p, Part::Experts | Part::Layer));
    let heavy = heavy.count();
    if heavy == 0 {
        return 0.0;
    }
    let top = group.routing.experts_per_token();
    let tokens = f64::from(group.tokens);
    let slots = tokens * f64::from(top + config.shared_experts);
    let shape = config.expert_shape(layer.weights);
    let flops = 6.0 * slots * f64::from(config.hidden) * f64::from(config.intermediate);
    let bytes = shape.device_bytes() as f64 * slots.min(f64::from(shape.experts));
    let over = |amount: f64, giga: Option<f64>| giga.map_or(0.0, |giga| amount / giga / 1e9);
    let rate = ceilings::bandwidth(ceilings);
    let run = over(flops, ceilings.multiply_add_gflop_s).max(over(bytes, rate));
    2.0 * run * (f64::from(effort.inputs) + 6.0 * heavy as f64)
}

/// Times the parts whose results were right; the others failed.
pub(crate) async fn measure(
    timer: &Timer<'_>,
    ceilings: &Ceilings,
    subject: &Subject,
    group: &Group,
    seconds: f64,
) -> Result<Vec<(Part, Outcome)>, Stop> {
    let mut outcomes = vec![];
    for &part in &group.parts {
        let outcome = match subject.time(timer, part, seconds).await {
            Err(Stop::Interrupted) if outcomes.is_empty() => return Err(Stop::Interrupted),
            Err(Stop::Interrupted) => break,
            Err(Stop::Failed(reason)) => Outcome::Failed { reason },
            Ok(timing) => {
                let work = subject.work(part);
                let bound = ceilings::bound(ceilings, part, &work, timing.times().median_ms);
                let (gpu, gpu_dropped) = match timing.gpu {
                    Ok(times) => (Some(times), None),
                    Err(why) => (None, Some(why)),
                };
                Outcome::Measured(Measured {
                    wall: timing.wall,
                    gpu,
                    gpu_dropped,
                    repeats: timing.repeats,
                    inputs: subject.inputs(),
                    weight_copies: subject.weight_copies(),
                    settled: timing.settled,
                    work,
                    bound,
                    check: subject.check(part),
                })
            }
        };
        outcomes.push((part, outcome));
    }
    Ok(outcomes)
}
