//! How a case is prepared, timed and printed.
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Throughput};
use std::cell::{Cell, OnceCell};
use std::time::{Duration, Instant};
use testkit::block_on;
use testkit::device::{required, with_matrix_units};
use testkit::works::{Bound, Part};
use wgmoe::device::MatrixReport;
use wgmoe::layer::{BoundBackward, BoundLayer};
use wgmoe::{BoundOp, Context, ContextOptions, Gpu, MatrixUnits, Target, Variant, wgpu};

/// Work that was compared with its twin, to be recorded again and again.
pub(super) enum Ready {
    BoundOp(BoundOp),
    Layer(Box<Bound>),
    /// The passes of a training step that are timed.
    Training(Vec<Pass>),
}

/// A pass of a training step.
#[derive(Clone)]
pub(super) enum Pass {
    Forward(Box<BoundLayer>),
    Backward(BoundBackward),
}

/// Where all works that take turns are shorter than this, each runs twice at its turn, and is timed
/// the second time.
pub(super) const SHORT: Duration = Duration::from_millis(20);

impl From<BoundOp> for Ready {
    fn from(step: BoundOp) -> Self {
        Self::BoundOp(step)
    }
}

/// The device, and a context for each variant that is timed, its name first.
pub(super) struct Bench {
    adapter: wgpu::Adapter,
    pub(super) gpu: Gpu,
    pub(super) contexts: Vec<(String, Context)>,
    /// Every variant, not the best and the portable one alone.
    every_variant: bool,
    /// Works of the sizes that models have, which take minutes.
    pub(super) full: bool,
}

impl Bench {
    /// The GPU, or `None` with a note; `MOE_REQUIRE_GPU=1` makes absence a failure.
    pub(super) fn open() -> Option<Self> {
        let opened = block_on(async {
            let adapter = Gpu::choose(None).await?;
            let gpu = with_matrix_units(&adapter).await?;
            Ok((adapter, gpu))
        });
        let (adapter, gpu) = match opened {
            Ok(opened) => opened,
            Err(e) if required() => panic!("{e}"),
            Err::<_, wgmoe::Error>(e) => {
                eprintln!("skipped: {e}");
                return None;
            }
        };
        let i = &gpu.info;
        eprintln!(
            "adapter: {} ({:?}), driver: {} {}, backend: {}",
            i.name, i.device_type, i.driver, i.driver_info, i.backend
        );
        let asked = |name| std::env::var_os(name).is_some();
        let every_variant = asked("WGMOE_BENCH_VARIANTS");
        let best = Variant::best(&gpu.device);
        let mut variants = vec![best];
        variants.extend(if every_variant {
            Variant::all(&gpu.device)
        } else {
            vec![Variant { tile: best.tile, small_items: best.small_items, ..Variant::PORTABLE }]
        });
        let mut contexts: Vec<(String, Context)> = vec![];
        for v in variants {
            let layout = if v.target == Target::Serial { "cpu" } else { "gpu" };
            let subgroups = if v.subgroups { " subgroups" } else { "" };
            let tile = if v.tile == best.tile { "" } else { &format!(" {:?} tiles", v.tile) };
            let small = if v.small_items == best.small_items { "" } else { " no small items" };
            let name = format!("{layout}{subgroups}{tile}{small}");
            if !contexts.iter().any(|(n, _)| *n == name) {
                contexts.push((name, Context::with_variant(&gpu.device, v).expect("a context")));
            }
        }
        Some(Self { adapter, gpu, contexts, every_variant, full: asked("WGMOE_BENCH_FULL") })
    }

    /// The variant that the device gets by default, alone: for work that takes long to compile or
    /// to run in another.
    pub(super) fn best(&self) -> &[(String, Context)] {
        if self.every_variant { &self.contexts } else { &self.contexts[..1] }
    }

    /// A context with matrix units in place of tiles, where the device has some.
    pub(super) fn matrix_units(&self) -> Option<(String, Context)> {
        let variant = Variant { target: Target::Wide, ..Variant::best(&self.gpu.device) };
        let options = ContextOptions::default()
            .with_variant(variant)
            .with_matrix_units(MatrixUnits::new(&self.adapter, &self.gpu.queue));
        let ctx = Context::with_options(&self.gpu.device, options).expect("a context");
        let used = matches!(ctx.matrix(), MatrixReport::InUse { .. });
        used.then(|| ("matrix units".into(), ctx))
    }

    fn time(&self, work: &Ready) -> Duration {
        let start = Instant::now();
        let mut encoder = self.gpu.device.create_command_encoder(&Default::default());
        match work {
            Ready::BoundOp(step) => {
                step.record(&mut encoder.begin_compute_pass(&Default::default()))
            }
            Ready::Layer(bound) => bound.step.encode(&mut encoder),
            Ready::Training(passes) => passes.iter().for_each(|pass| match pass {
                Pass::Forward(forward) => forward.encode(&mut encoder),
                Pass::Backward(backward) => backward.encode(&mut encoder).expect("a forward pass"),
            }),
        }
        self.gpu.queue.submit([encoder.finish()]);
        self.gpu.device.poll(wgpu::PollType::wait_indefinitely()).expect("the device");
        start.elapsed()
    }

    /// Times a case in these variants, each run in turn with the others. `prepare` makes and checks
    /// the work.
    pub(super) fn case(
        &self,
        group: &mut BenchmarkGroup<'_, WallTime>,
        name: &str,
        contexts: &[(String, Context)],
        throughput: Throughput,
        prepare: impl Fn(&Context, &str) -> Ready,
    ) {
        let ids = contexts.iter().map(|(variant, _)| BenchmarkId::new(name, variant)).collect();
        self.turns(group, ids, throughput, || {
            contexts.iter().map(|(v, ctx)| prepare(ctx, &format!("{name}, {v}"))).collect()
        });
    }

    /// Times works that are to be compared with each other: they run in turns. `prepare` makes and
    /// checks one for each id.
    pub(super) fn turns(
        &self,
        group: &mut BenchmarkGroup<'_, WallTime>,
        ids: Vec<BenchmarkId>,
        throughput: Throughput,
        prepare: impl Fn() -> Vec<Ready>,
    ) {
        let ready = OnceCell::new();
        let short = OnceCell::new();
        group.throughput(throughput);
        for (i, id) in ids.into_iter().enumerate() {
            let fastest = Cell::new((Duration::MAX, 0));
            let first = Cell::new(true);
            group.bench_function(id, |b| {
                let ready: &Vec<Ready> = ready.get_or_init(&prepare);
                b.iter_custom(|n| {
                    if first.replace(false) {
                        // All of a test, or the first of the warm-up.
                        return self.time(&ready[i]) * n as u32;
                    }
                    let short = *short.get_or_init(|| {
                        ready.len() > 1 && ready.iter().all(|work| self.time(work) < SHORT)
                    });
                    let mut sum = Duration::ZERO;
                    for _ in 0..n {
                        for (j, work) in ready.iter().enumerate() {
                            if short {
                                // The others have emptied the caches of it.
                                self.time(work);
                            }
                            let time = self.time(work);
                            if i == j {
                                sum += time;
                                let (least, runs) = fastest.get();
                                fastest.set((time.min(least), runs + 1));
                            }
                        }
                    }
                    sum
                });
            });
            let (least, runs) = fastest.get();
            if runs > 1 {
                println!("{:24}least:  {least:.2?} of {runs} runs", "");
                if let Some(Ready::Layer(bound)) = ready.get().and_then(|ready| ready.get(i)) {
                    self.print_parts(bound);
                }
            }
        }
    }

    /// Where the time of a layer goes: the least of five for each part, every dispatch in a pass of
    /// its own.
    fn print_parts(&self, bound: &Bound) {
        let mut least = [f64::MAX; Part::ALL.len()];
        for _ in 0..5 {
            let Some(times) = self.gpu.profile(bound.step.dispatches()).expect("the device") else {
                return;
            };
            for (part, least) in Part::ALL.iter().zip(&mut least) {
                let own = bound.step.dispatches().zip(&times).filter(|(d, _)| Part::of(d) == *part);
                *least = least.min(own.map(|(_, (_, ms))| ms).sum());
            }
        }
        let [router, routing, plan, experts, combine] = least;
        println!(
            "{:24}parts:  router {router:.2} ms, routing {routing:.2}, plan {plan:.2}, experts {experts:.2}, combine {combine:.2}; \
             routing and plan {:.2} % of the experts",
            "",
            100.0 * (routing + plan) / experts
        );
    }

    /// A buffer of `n` words that no kernel would write: as f32, NaN.
    pub(super) fn poisoned(&self, n: u32) -> wgpu::Buffer {
        self.gpu.upload(&vec![u32::MAX; n as usize])
    }

    pub(super) fn download<T: bytemuck::Pod>(&self, buffer: &wgpu::Buffer) -> Vec<T> {
        self.gpu.download(buffer).expect("read back")
    }
}

pub(super) fn pairs(tokens: u32, experts: u32) -> Throughput {
    Throughput::Elements(u64::from(tokens) * u64::from(experts))
}

pub(super) fn columns(tokens: u32) -> u32 {
    tokens.div_ceil(32)
}
