//! A run: adapters, layers and cases in order, within a time, kept as they come.
use crate::ceilings;
use crate::device::{self, Device};
use crate::file::{Adapter, Case, Ceilings, Measured, Outcome, Part, Report};
use crate::matrix::{Group, Layer, layers};
use crate::subject::{Effort, Loaded, Subject, load};
use crate::timing::{Stop, Timer};
use indicatif::{ProgressBar, ProgressStyle};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use wgmoe::{Context, WeightType, wgpu};

/// How a run goes.
pub(crate) struct Plan<'a> {
    pub(crate) quick: bool,
    /// Seconds for each adapter.
    pub(crate) seconds: f64,
    /// Bytes of weights, where they are limited.
    pub(crate) memory: Option<u64>,
    pub(crate) out: &'a Path,
    pub(crate) commit: Option<String>,
    pub(crate) stop: &'a AtomicBool,
}

/// Seconds that a case is timed for.
const CASE_SECONDS: [f64; 2] = [0.03, 0.6];

/// Measures adapters one after another; the file is written after each group of cases.
pub(crate) fn run(adapters: &[wgpu::Adapter], plan: &Plan<'_>) -> Result<Report, String> {
    let mut report = Report::new(plan.quick, plan.commit.clone());
    // Says at once where the file cannot be written.
    report.write(plan.out)?;
    for adapter in adapters {
        report.adapters.push(device::describe(adapter));
        report.write(plan.out)?;
        let mut measuring = Measuring::new(plan, &mut report);
        let outcome = match catch_unwind(AssertUnwindSafe(|| measuring.adapter(adapter))) {
            Ok(outcome) => outcome,
            Err(panic) => Err(Stop::Failed(message(&*panic))),
        };
        measuring.bar.finish_and_clear();
        let entry = measuring.entry();
        match outcome {
            Ok(()) => {}
            Err(Stop::Failed(why)) => entry.failure = Some(why),
            Err(Stop::Interrupted) => report.interrupted = true,
        }
        report.write(plan.out)?;
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
    bar: ProgressBar,
    end: Instant,
    /// Cases that are still to come.
    left: usize,
}

impl<'a> Measuring<'a> {
    fn new(plan: &'a Plan<'a>, report: &'a mut Report) -> Self {
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(500));
        let end = Instant::now() + Duration::from_secs_f64(plan.seconds);
        Self { plan, report, bar, end, left: 0 }
    }

    fn entry(&mut self) -> &mut Adapter {
        self.report.adapters.last_mut().expect("pushed before")
    }

    /// So that a driver that crashes or hangs later takes nothing with it.
    fn save(&self) -> Result<(), Stop> {
        self.report.write(self.plan.out).map_err(Stop::Failed)
    }

    fn say(&mut self, what: &str) {
        let left = self.end.saturating_duration_since(Instant::now()).as_secs();
        let name = self.entry().name.clone();
        if self.bar.is_hidden() {
            eprintln!("{name}: {what} ...");
        } else {
            self.bar.set_message(format!(
                "at most {}:{:02} left, {name}: {what}",
                left / 60,
                left % 60
            ));
        }
    }

    fn note(&self, what: &str) {
        self.bar.suspend(|| eprintln!("{what}"));
    }

    fn adapter(&mut self, adapter: &wgpu::Adapter) -> Result<(), Stop> {
        self.say("opening");
        let device = Device::open(adapter).map_err(|e| {
            self.note(&format!("{}: {e}", adapter.get_info().name));
            Stop::Failed(e)
        })?;
        let ctx = Context::new(&device.gpu.device)?;
        let timer = Timer::new(&device, self.plan.stop);
        self.say("ceilings");
        let ceilings = ceilings::measure(&timer, if self.plan.quick { 0.3 } else { 1.0 })?;
        self.entry().ceilings = Some(ceilings.clone());
        self.save()?;
        let site = Site { device: &device, ctx: &ctx, timer: &timer, ceilings: &ceilings };
        let layers = layers(self.plan.quick);
        self.left = layers.iter().map(cases).sum();
        self.bar.set_length(self.left as u64);
        let count = layers.len();
        for (i, layer) in layers.into_iter().enumerate() {
            // What one layer leaves of its time goes to the next.
            let now = Instant::now();
            let end = now + self.end.saturating_duration_since(now) / (count - i) as u32;
            self.layer(site, layer, end)?;
            self.save()?;
            if let Some(why) = device.lost() {
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
    fn layer(&mut self, site: Site<'_>, layer: Layer, end: Instant) -> Result<(), Stop> {
        if end <= Instant::now() {
            self.skip_layer(&layer, &self.out_of_time());
            return Ok(());
        }
        let (device, quick) = (site.device, self.plan.quick);
        self.say(&format!("weights of {}", layer.model.name));
        let inputs = effort(quick, 0).inputs;
        let loaded = match load(device, site.ctx, layer.clone(), self.memory(device), inputs) {
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
                let turn = || self.group(site, &loaded, group, effort, each);
                match catch_unwind(AssertUnwindSafe(turn)) {
                    Ok(result) => result?,
                    Err(panic) => self.fail(layer, group, &message(&*panic)),
                }
                self.save()?;
            }
            left -= group.parts.len();
            if device.lost().is_some() {
                break;
            }
        }
        Ok(())
    }

    /// Prepares, checks and times the cases of a group, about `seconds` each.
    fn group(
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
        let prepared = loaded.prepare(device, ctx, group, effort).or_else(|e| {
            // Several inputs may be more than fits.
            if device.lost().is_some() { Err(e) } else { loaded.prepare(device, ctx, group, one) }
        });
        let subject = match prepared {
            Ok(subject) => subject,
            Err(e) => {
                self.fail(&loaded.layer, group, &e.to_string());
                return Ok(());
            }
        };
        for (part, outcome) in measure(timer, ceilings, &subject, group, seconds)? {
            if let Outcome::Failed { reason } = &outcome {
                let name = &loaded.layer.model.name;
                self.note(&format!("{name}, {}, {}: {reason}", group.rule, part.name()));
            }
            self.push(&loaded.layer, group, part, outcome);
        }
        Ok(())
    }

    fn push(&mut self, layer: &Layer, group: &Group, part: Part, outcome: Outcome) {
        let (id, reduced) = (layer.case(group, part), layer.reduced.clone());
        self.entry().cases.push(Case { id, reduced, outcome });
        self.left = self.left.saturating_sub(1);
        self.bar.inc(1);
    }

    fn fail(&mut self, layer: &Layer, group: &Group, reason: &str) {
        self.note(&format!("{}, {}: {reason}", layer.model.name, group.rule));
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
    let shape = config.expert_shape(WeightType::Bf16);
    let flops = 6.0 * slots * f64::from(config.hidden) * f64::from(config.intermediate);
    let bytes = shape.expert_bytes() as f64 * slots.min(f64::from(shape.experts));
    let over = |amount: f64, giga: Option<f64>| giga.map_or(0.0, |giga| amount / giga / 1e9);
    let rate = ceilings::bandwidth(ceilings);
    let run = over(flops, ceilings.multiply_add_gflop_s).max(over(bytes, rate));
    2.0 * run * (f64::from(effort.inputs) + 6.0 * heavy as f64)
}

/// Times the parts whose results were right; the others failed.
pub(crate) fn measure(
    timer: &Timer<'_>,
    ceilings: &Ceilings,
    subject: &Subject,
    group: &Group,
    seconds: f64,
) -> Result<Vec<(Part, Outcome)>, Stop> {
    let mut outcomes = vec![];
    for &part in &group.parts {
        let outcome = match subject.time(timer, part, seconds) {
            Err(Stop::Interrupted) if outcomes.is_empty() => return Err(Stop::Interrupted),
            Err(Stop::Interrupted) => break,
            Err(Stop::Failed(reason)) => Outcome::Failed { reason },
            Ok(timing) => {
                let work = subject.work(part);
                let bound = ceilings::bound(ceilings, &work, timing.times().median_ms);
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

/// Stops a run at Ctrl-C, at once at the second one.
pub(crate) fn stop_at_ctrl_c() -> Result<&'static AtomicBool, String> {
    static STOP: AtomicBool = AtomicBool::new(false);
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nstopping; what was measured is kept (Ctrl-C again: at once)");
    })
    .map_err(|e| e.to_string())?;
    Ok(&STOP)
}
