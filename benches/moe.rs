//! `cargo bench --bench moe`: a group for each op, and the layer. Every case is compared with the CPU twin (the largest ones
//! in sampled rows) before it is timed; work of which a filter leaves nothing is not even made. With `-- --test` each case is
//! compared and run once.
//!
//! A time is that of one submission: encoding, submitting and waiting. Below criterion's estimate of the mean stands the
//! least. Elements are (token, expert) pairs for routing and plans, floating-point operations on routed rows for matmuls, W1
//! and W2, tokens for a block. Variants of a case run in turns, so that they meet the same state of the machine.
//!
//! `WGMOE_BENCH_FULL=1` makes the block one of all 256 experts (1.6 GB on the device), not of 64. `WGMOE_BENCH_VARIANTS=1`
//! runs matmuls and layers in every variant too, not only in the one that the device gets by default.
use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group,
    criterion_main,
};
use std::cell::{Cell, OnceCell};
use std::time::{Duration, Instant};
use testkit::compare::{close, same};
use testkit::device::required;
use testkit::rules::rules;
use testkit::works::{
    BIAS, Bound, INDEX, OP2, Part, Planned, SCORES, TABLE, Work, choice, fill, gather,
    grouped_matmul, mix, plan,
};
use wgmoe::ops::{
    assign, assign_lists, capacity, combine, coreset, expert_union, scores, sequence_top,
    token_choice,
};
use wgmoe::routing::Groups;
use wgmoe::routing::schedule::{Schedule, ScheduleKind};
use wgmoe::routing::{BlockRule, Routing};
use wgmoe::{BoundOp, Context, Gpu, MoeLayer, Score, Target, Variant, WeightType, wgpu};

/// Work that was compared with its twin, to be recorded again and again.
enum Ready {
    BoundOp(BoundOp),
    Layer(Box<Bound>),
}

/// Where all works that take turns are shorter than this, each runs twice at its turn, and is timed the second time.
const SHORT: Duration = Duration::from_millis(20);

impl From<BoundOp> for Ready {
    fn from(step: BoundOp) -> Self {
        Self::BoundOp(step)
    }
}

/// The device, and a context for each variant that is timed, its name first.
struct Bench {
    gpu: Gpu,
    contexts: Vec<(String, Context)>,
    full: bool,
}

impl Bench {
    /// The GPU, or `None` with a note; `MOE_REQUIRE_GPU=1` makes absence a failure.
    fn open() -> Option<Self> {
        let gpu = match Gpu::new() {
            Ok(gpu) => gpu,
            Err(e) if required() => panic!("{e}"),
            Err(e) => {
                eprintln!("skipped: {e}");
                return None;
            }
        };
        let i = &gpu.info;
        eprintln!(
            "adapter: {} ({:?}), driver: {} {}, backend: {}",
            i.name, i.device_type, i.driver, i.driver_info, i.backend
        );
        let full = std::env::var_os("WGMOE_BENCH_VARIANTS").is_some();
        let best = Variant::best(&gpu.device);
        let mut variants = vec![best];
        variants.extend(if full { Variant::all(&gpu.device) } else { vec![Variant::PORTABLE] });
        let mut contexts: Vec<(String, Context)> = vec![];
        for v in variants {
            let layout = if v.target == Target::Serial { "cpu" } else { "gpu" };
            let name = format!("{layout}{}", if v.subgroups { " subgroups" } else { "" });
            if !contexts.iter().any(|(n, _)| *n == name) {
                contexts.push((name, Context::with_variant(&gpu.device, v).expect("a context")));
            }
        }
        Some(Self { gpu, contexts, full })
    }

    /// The variant that the device gets by default, alone: for work that takes long to compile or to run in another.
    fn best(&self) -> &[(String, Context)] {
        if self.full { &self.contexts } else { &self.contexts[..1] }
    }

    fn time(&self, work: &Ready) -> Duration {
        let start = Instant::now();
        let mut encoder = self.gpu.device.create_command_encoder(&Default::default());
        match work {
            Ready::BoundOp(step) => {
                step.record(&mut encoder.begin_compute_pass(&Default::default()))
            }
            Ready::Layer(bound) => bound.step.encode(&mut encoder),
        }
        self.gpu.queue.submit([encoder.finish()]);
        self.gpu.device.poll(wgpu::PollType::wait_indefinitely()).expect("the device");
        start.elapsed()
    }

    /// Times a case in these variants, each run in turn with the others. `prepare` makes and checks the work.
    fn case(
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

    /// Times works that are to be compared with each other: they run in turns. `prepare` makes and checks one for each id.
    fn turns(
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

    /// Where the time of a layer goes: the least of five for each part, every dispatch in a pass of its own.
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
    fn poisoned(&self, n: u32) -> wgpu::Buffer {
        self.gpu.upload(&vec![u32::MAX; n as usize])
    }

    fn download<T: bytemuck::Pod>(&self, buffer: &wgpu::Buffer) -> Vec<T> {
        self.gpu.download(buffer).expect("read back")
    }
}

/// Logits `[tokens, experts]`, and the bit set of each token's top `top`.
fn chosen(tokens: u32, experts: u32, top: usize) -> (Vec<f32>, Vec<u32>) {
    let logits = fill(SCORES, tokens * experts, 8.0);
    let assigned = token_choice::cpu(&logits, experts as usize, top, None, &|_, _| true);
    (logits, assigned)
}

fn pairs(tokens: u32, experts: u32) -> Throughput {
    Throughput::Elements(u64::from(tokens) * u64::from(experts))
}

fn columns(tokens: u32) -> u32 {
    tokens.div_ceil(32)
}

fn bench_scores(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("scores");
    for (name, tokens, experts, score) in [
        ("LLaDA2 sigmoid T32 E256", 32, 256, Score::Sigmoid),
        ("LLaDA2 sigmoid T512 E256", 512, 256, Score::Sigmoid),
        ("EC-DLM softmax T4096 E512", 4096, 512, Score::Softmax),
    ] {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, experts), |ctx, what| {
            let (logits, bias) = (fill(SCORES, tokens * experts, 8.0), fill(BIAS, experts, 0.1));
            let gpu = &bench.gpu;
            let (logits_in, bias_in) = (gpu.upload(&logits), gpu.upload(&bias));
            let [s, r] = [(); 2].map(|()| bench.poisoned(tokens * experts));
            let args = scores::Args {
                logits: (&logits_in).into(),
                bias: Some((&bias_in).into()),
                scores: (&s).into(),
                values: (&r).into(),
            };
            let op = scores::Scores::new(ctx).unwrap();
            let step =
                op.bind(&scores::Dims { tokens, experts, score, by_logits: false }, args).unwrap();
            gpu.run(&step).unwrap();
            let want = scores::cpu(&logits, experts as usize, score, false, Some(&bias));
            close(&bench.download(&s), &want.0, 1e-30, 1e-5, &format!("{what}: s")).unwrap();
            close(&bench.download(&r), &want.1, 1e-6, 1e-5, &format!("{what}: r")).unwrap();
            step.into()
        });
    }
}

fn bench_expert_choice(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("expert_choice");
    for (name, shape) in [
        ("OP1a T512 E512 C32", [512, 512, 32]),
        ("OP1b T4096 E64 C256", [4096, 64, 256]),
        ("EC-DLM T512 E512 C20", [512, 512, 20]),
    ] {
        bench.case(&mut group, name, &bench.contexts, pairs(shape[0], shape[1]), |ctx, what| {
            choice(&bench.gpu, ctx, shape).unwrap_or_else(|e| panic!("{what}: {e}")).into()
        });
    }
    group.finish();
    // How its time grows: with tokens at equal experts and an eighth of the tokens each, with experts, with the capacity.
    for (axis, shapes) in [
        ("tokens", vec![[1024, 64, 128], [4096, 64, 512], [16384, 64, 2048], [65536, 64, 8192]]),
        (
            "tokens, 512 experts",
            vec![[1024, 512, 128], [4096, 512, 512], [16384, 512, 2048], [65536, 512, 8192]],
        ),
        ("experts", vec![[4096, 16, 512], [4096, 64, 512], [4096, 256, 512], [4096, 512, 512]]),
        ("capacity", vec![[4096, 64, 8], [4096, 64, 256], [4096, 64, 2048]]),
    ] {
        let mut group = c.benchmark_group(format!("expert_choice over {axis}"));
        for shape in shapes {
            let [tokens, experts, capacity] = shape;
            let name = format!("T{tokens} E{experts} C{capacity}");
            let best = &bench.contexts[..1];
            bench.case(&mut group, &name, best, pairs(tokens, experts), |ctx, what| {
                choice(&bench.gpu, ctx, shape).unwrap_or_else(|e| panic!("{what}: {e}")).into()
            });
        }
    }
}

fn token_choice_step(
    bench: &Bench,
    ctx: &Context,
    [tokens, experts, top]: [u32; 3],
    groups: Option<Groups>,
    what: &str,
) -> Ready {
    let gpu = &bench.gpu;
    let r = fill(SCORES, tokens * experts, 1.0);
    let r_in = gpu.upload(&r);
    let assigned = bench.poisoned(experts * columns(tokens));
    let args =
        token_choice::Args { values: (&r_in).into(), coresets: None, assigned: (&assigned).into() };
    let op = token_choice::TokenChoice::new(ctx, experts, top, groups).unwrap();
    let step = op.bind(&token_choice::Dims { tokens: tokens }, args).unwrap();
    gpu.run(&step).unwrap();
    let want = token_choice::cpu(&r, experts as usize, top as usize, groups, &|_, _| true);
    same(&bench.download(&assigned), &want, what).unwrap();
    step.into()
}

fn bench_token_choice(bench: &Bench, c: &mut Criterion) {
    let groups = Some(Groups { count: 8, top: 4 });
    let mut group = c.benchmark_group("token_choice");
    for (name, shape, groups) in [
        ("LLaDA2 T32 E256 K8 of 4 of 8 groups", [32, 256, 8], groups),
        ("LLaDA2 T4096 E256 K8 of 4 of 8 groups", [4096, 256, 8], groups),
        ("SDAR T4096 E128 K8", [4096, 128, 8], None),
    ] {
        bench.case(&mut group, name, &bench.contexts, pairs(shape[0], shape[1]), |ctx, what| {
            token_choice_step(bench, ctx, shape, groups, what)
        });
    }
    group.finish();
    let mut group = c.benchmark_group("token_choice over top");
    for top in [1, 4, 8, 32] {
        let name = format!("T4096 E256 K{top}");
        bench.case(&mut group, &name, &bench.contexts[..1], pairs(4096, 256), |ctx, what| {
            token_choice_step(bench, ctx, [4096, 256, top], None, what)
        });
    }
}

fn bench_coreset(bench: &Bench, c: &mut Criterion) {
    const EXPERTS: u32 = 256;
    let mut group = c.benchmark_group("coreset");
    for (name, tokens, rule) in [
        ("mass(0.6, 8) T32 E256", 32, BlockRule::Mass { p: 0.6, floor: 8 }),
        ("capacity(48) T32 E256", 32, BlockRule::Capacity(48)),
        ("vote(38) T32 E256", 32, BlockRule::Vote(38)),
        ("union(3) T32 E256", 32, BlockRule::Union(3)),
        ("mass(0.6, 8) T4096 E256", 4096, BlockRule::Mass { p: 0.6, floor: 8 }),
    ] {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, EXPERTS), |ctx, what| {
            let gpu = &bench.gpu;
            // Positive, as sigmoid scores are.
            let r: Vec<f32> = fill(SCORES, tokens * EXPERTS, 1.0).iter().map(|v| v + 0.5).collect();
            let top = rule.own_top(8).unwrap_or(8) as usize;
            let own = token_choice::cpu(&r, EXPERTS as usize, top, None, &|_, _| true);
            let blocks = tokens / 32;
            let offsets: Vec<u32> = (0..=blocks).map(|b| b * 32).collect();
            let (r_in, own_in, offsets_in) =
                (gpu.upload(&r), gpu.upload(&own), gpu.upload(&offsets));
            let (members, block_of) =
                (bench.poisoned(blocks * EXPERTS / 32), bench.poisoned(tokens));
            let args = coreset::Args {
                values: (&r_in).into(),
                own_choice: rule.own_top(8).map(|_| (&own_in).into()),
                offsets: (&offsets_in).into(),
                voters: None,
                members: (&members).into(),
                block_of: (&block_of).into(),
            };
            let op = coreset::Coreset::new(ctx, EXPERTS, rule).unwrap();
            let step = op.bind(&coreset::Dims { tokens, blocks }, args).unwrap();
            gpu.run(&step).unwrap();
            let want = coreset::cpu(rule, &r, EXPERTS as usize, &own, &offsets, None);
            same(&bench.download(&members), &want.0, &format!("{what}: members")).unwrap();
            same(&bench.download(&block_of), &want.1, &format!("{what}: block_of")).unwrap();
            step.into()
        });
    }
}

fn bench_sequence_top(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("sequence_top");
    for (name, tokens, experts, top) in
        [("T512 E64 K8", 512, 64, 8), ("T4096 E256 K8", 4096, 256, 8)]
    {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, experts), |ctx, what| {
            let gpu = &bench.gpu;
            let r = fill(SCORES, tokens * experts, 1.0);
            let (r_in, offsets) = (gpu.upload(&r), gpu.upload(&[0, tokens]));
            let assigned = bench.poisoned(experts * columns(tokens));
            let args = sequence_top::Args {
                values: (&r_in).into(),
                offsets: (&offsets).into(),
                assigned: (&assigned).into(),
            };
            let dims = sequence_top::Dims { tokens, experts, sequences: 1, top };
            let step = sequence_top::SequenceTop::new(ctx).unwrap().bind(&dims, args).unwrap();
            gpu.run(&step).unwrap();
            let want = sequence_top::cpu(&r, experts as usize, top as usize, &[0, tokens]);
            same(&bench.download(&assigned), &want, what).unwrap();
            step.into()
        });
    }
}

fn bench_capacity(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("capacity");
    let sequences = 64;
    let throughput = Throughput::Elements(sequences.into());
    bench.case(&mut group, "EC-DLM 64 sequences", &bench.contexts, throughput, |ctx, what| {
        let gpu = &bench.gpu;
        let (tokens, experts) = (sequences * 512, 512);
        let schedule = Schedule::new(ScheduleKind::CosineReverse, 8, 32);
        let ratios: Vec<f32> = fill(SCORES, sequences, 1.0).iter().map(|v| v + 0.5).collect();
        let offsets: Vec<u32> = (0..=sequences).map(|b| b * 512).collect();
        let steps = gpu.upload(&schedule.staircase().unwrap().words());
        let (ratios_in, offsets_in) = (gpu.upload(&ratios), gpu.upload(&offsets));
        let [capacity_of, k_of] = [(); 2].map(|()| bench.poisoned(sequences));
        let args = capacity::Args {
            source: capacity::Source::Ratios {
                ratios: (&ratios_in).into(),
                steps: (&steps).into(),
            },
            offsets: (&offsets_in).into(),
            lengths: None,
            capacity_of: (&capacity_of).into(),
            k_of: (&k_of).into(),
        };
        let dims = capacity::Dims { tokens, experts, sequences };
        let step = capacity::Capacity::new(ctx).unwrap().bind(&dims, args).unwrap();
        gpu.run(&step).unwrap();
        let source = capacity::HostSource::Ratios(&schedule, &ratios);
        let want = capacity::cpu(source, tokens as usize, experts, &offsets, None);
        same(&bench.download(&capacity_of), &want.0, &format!("{what}: capacity_of")).unwrap();
        same(&bench.download(&k_of), &want.1, &format!("{what}: k_of")).unwrap();
        step.into()
    });
}

fn bench_assign(bench: &Bench, c: &mut Criterion) {
    const TOP: u32 = 8;
    let mut group = c.benchmark_group("assign");
    for (name, tokens, experts) in [("T32 E256 K8", 32, 256), ("T4096 E256 K8", 4096u32, 256u32)] {
        let throughput = Throughput::Elements(u64::from(tokens * TOP));
        bench.case(&mut group, name, &bench.contexts[..1], throughput, |ctx, what| {
            let gpu = &bench.gpu;
            // Some ids are out of range, some repeated.
            let ids: Vec<u32> = (0..tokens * TOP).map(|i| mix(INDEX, i) % (experts + 4)).collect();
            let weights = fill(SCORES, tokens * TOP, 1.0);
            let (ids_in, weights_in) = (gpu.upload(&ids), gpu.upload(&weights));
            let assigned = bench.poisoned(experts * columns(tokens));
            let gates = gpu.upload(&vec![0f32; (tokens * experts) as usize]);
            let ignored = bench.poisoned(columns(tokens));
            let args = assign::Args {
                ids: (&ids_in).into(),
                weights: (&weights_in).into(),
                assigned: (&assigned).into(),
                gates: (&gates).into(),
                ignored: (&ignored).into(),
            };
            let dims = assign::Dims { tokens, experts, top: TOP };
            let step = assign::Assign::new(ctx).unwrap().bind(&dims, args).unwrap();
            gpu.run(&step).unwrap();
            let want = assign::cpu(&ids, &weights, TOP as usize, experts as usize);
            same(&bench.download(&assigned), &want.0, &format!("{what}: assigned")).unwrap();
            same(&bench.download(&gates), &want.1, &format!("{what}: gates")).unwrap();
            same(&bench.download(&ignored), &want.2, &format!("{what}: ignored")).unwrap();
            step.into()
        });
    }
}

fn bench_assign_lists(bench: &Bench, c: &mut Criterion) {
    const LENGTH: u32 = 128;
    let mut group = c.benchmark_group("assign_lists");
    for (name, tokens, experts) in [("T32 E256", 32, 256), ("T4096 E256", 4096u32, 256u32)] {
        let length = LENGTH.min(tokens);
        let entries = experts * length;
        let throughput = Throughput::Elements(entries.into());
        bench.case(&mut group, name, &bench.contexts[..1], throughput, |ctx, what| {
            let gpu = &bench.gpu;
            // Some tokens are out of range, some repeated.
            let list: Vec<u32> = (0..entries).map(|i| mix(INDEX, i) % (tokens + 4)).collect();
            let offsets: Vec<u32> = (0..=experts).map(|e| e * length).collect();
            let weights = fill(SCORES, entries, 1.0);
            let [offsets_in, list_in] = [&offsets, &list].map(|v| gpu.upload(v));
            let weights_in = gpu.upload(&weights);
            let assigned = bench.poisoned(experts * columns(tokens));
            let gates = gpu.upload(&vec![0f32; (tokens * experts) as usize]);
            let ignored = bench.poisoned(experts);
            let args = assign_lists::Args {
                offsets: (&offsets_in).into(),
                list: (&list_in).into(),
                weights: (&weights_in).into(),
                assigned: (&assigned).into(),
                gates: (&gates).into(),
                ignored: (&ignored).into(),
            };
            let dims = assign_lists::Dims { tokens, experts, entries };
            let step = assign_lists::AssignLists::new(ctx).unwrap().bind(&dims, args).unwrap();
            gpu.run(&step).unwrap();
            let want = assign_lists::cpu(&offsets, &list, &weights, tokens as usize);
            same(&bench.download(&assigned), &want.0, &format!("{what}: assigned")).unwrap();
            same(&bench.download(&gates), &want.1, &format!("{what}: gates")).unwrap();
            same(&bench.download(&ignored), &want.2, &format!("{what}: ignored")).unwrap();
            step.into()
        });
    }
}

/// The plan of an assignment.
fn planned(
    bench: &Bench,
    ctx: &Context,
    dims: [u32; 2],
    logits: &[f32],
    assigned: &[u32],
    what: &str,
) -> Planned {
    plan(&bench.gpu, ctx, dims, logits, assigned).unwrap_or_else(|e| panic!("{what}: {e}"))
}

fn bench_plan(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("plan");
    for (name, tokens, experts) in
        [("T32 E256 K8", 32, 256), ("T512 E64 K8", 512, 64), ("T4096 E256 K8", 4096, 256)]
    {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, experts), |ctx, what| {
            let (logits, assigned) = chosen(tokens, experts, 8);
            planned(bench, ctx, [tokens, experts], &logits, &assigned, what).step.into()
        });
    }
}

fn bench_gather(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("gather");
    for (name, rows, hidden) in
        [("OP3 4096 rows of 2048", 4096u32, 2048u32), ("600000 rows of 16", 600_000, 16)]
    {
        let bytes = Throughput::BytesDecimal(2 * 4 * u64::from(rows) * u64::from(hidden));
        bench.case(&mut group, name, &bench.contexts[..1], bytes, |ctx, what| {
            let x = fill(TABLE, rows * hidden, 1.0);
            let token_of: Vec<u32> = (0..rows).map(|i| mix(INDEX, i) % rows).collect();
            let x_in = bench.gpu.upload(&x);
            let step = gather(&bench.gpu, ctx, (&x_in, &x), hidden, &token_of);
            step.unwrap_or_else(|e| panic!("{what}: {e}")).into()
        });
    }
}

fn bench_matmul(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("matmul");
    group.sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(3));
    for (name, weight_type) in
        [("OP2 32x[64,2048]x[2048,512] f32", WeightType::F32), ("OP2 bf16", WeightType::Bf16)]
    {
        let flops = 2 * OP2.iter().map(|&n| u64::from(n)).product::<u64>();
        bench.case(&mut group, name, bench.best(), Throughput::Elements(flops), |ctx, what| {
            let step = grouped_matmul(&bench.gpu, ctx, weight_type);
            step.unwrap_or_else(|e| panic!("{what}: {e}")).into()
        });
    }
}

fn bench_combine(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("combine");
    for (name, tokens, experts, hidden) in [
        ("LLaDA2 T32 K8 D2048", 32, 256, 2048),
        ("W2 T512 K8 D512", 512, 64, 512),
        ("T4096 K8 D512", 4096u32, 64, 512u32),
    ] {
        let bytes = 4 * u64::from(tokens) * u64::from(hidden) * (8 + 1);
        let best = &bench.contexts[..1];
        bench.case(&mut group, name, best, Throughput::BytesDecimal(bytes), |ctx, what| {
            let gpu = &bench.gpu;
            let (logits, assigned) = chosen(tokens, experts, 8);
            let planned = planned(bench, ctx, [tokens, experts], &logits, &assigned, what);
            let y = fill(TABLE, planned.shape.slots().unwrap() * hidden, 1.0);
            let (y_in, out) = (gpu.upload(&y), bench.poisoned(tokens * hidden));
            let args = combine::Args {
                y: (&y_in).into(),
                plan: (&planned.plan).into(),
                out: (&out).into(),
                columns: 0..hidden,
                hidden,
                add: false,
            };
            let step = combine::Combine::new(ctx).unwrap().bind(&planned.shape, args).unwrap();
            gpu.run(&step).unwrap();
            let want = combine::cpu(&planned.host, &y, hidden as usize, None);
            close(&bench.download(&out), &want, 1e-6, 1e-5, what).unwrap();
            step.into()
        });
    }
}

fn bench_expert_union(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("expert_union");
    for (name, tokens, experts) in
        [("one block T32 E256", 32, 256), ("128 blocks T4096 E256", 4096u32, 256u32)]
    {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, experts), |ctx, what| {
            let gpu = &bench.gpu;
            let (_, assigned) = chosen(tokens, experts, 8);
            let blocks = tokens / 32;
            let offsets: Vec<u32> = (0..=blocks).map(|b| b * 32).collect();
            let expert_bytes = 6 << 20;
            let (assigned_in, offsets_in) = (gpu.upload(&assigned), gpu.upload(&offsets));
            let members = bench.poisoned(blocks * experts.div_ceil(32));
            let (counts, bytes) = (bench.poisoned(blocks), bench.poisoned(blocks * 2));
            let args = expert_union::Args {
                assigned: (&assigned_in).into(),
                offsets: (&offsets_in).into(),
                members: (&members).into(),
                counts: (&counts).into(),
                bytes: (&bytes).into(),
                totals: None,
            };
            let dims = expert_union::Dims { tokens, experts, blocks, expert_bytes };
            let step = expert_union::ExpertUnion::new(ctx).unwrap().bind(&dims, args).unwrap();
            gpu.run(&step).unwrap();
            let (t, e) = (tokens as usize, experts as usize);
            let want = expert_union::cpu(&assigned, t, e, &offsets, expert_bytes);
            same(&bench.download(&members), &want.0, &format!("{what}: members")).unwrap();
            same(&bench.download(&counts), &want.1, &format!("{what}: counts")).unwrap();
            same(&bench.download(&bytes), &want.2, &format!("{what}: bytes")).unwrap();
            step.into()
        });
    }
}

fn bench_layer(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("layer");
    group.sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(3));
    let gpu = &bench.gpu;
    for (name, work, weight_type, slots) in [
        ("W1 f32", Work::w1(), WeightType::F32, 32 * 8),
        ("W1 bf16", Work::w1(), WeightType::Bf16, 32 * 8),
        ("W2 f32", Work::w2(512), WeightType::F32, 64 * 64),
    ] {
        let flops = Throughput::Elements(work.flops(slots));
        bench.case(&mut group, name, bench.best(), flops, |ctx, what| {
            let weights = work.weights(gpu, ctx, weight_type).unwrap();
            layer_step(gpu, &work, &work.layer(ctx, weights).unwrap(), what)
        });
    }

    // A block of LLaDA2.0-mini under each rule, over the same weights.
    let experts = if std::env::var_os("WGMOE_BENCH_FULL").is_some() { 256 } else { 64 };
    let work = Work::block(experts);
    let what = format!("LLaDA2-mini block of 32, {experts} experts bf16");
    bench_rules(bench, &mut group, &work, WeightType::Bf16, &what, &|_| true);
    group.finish();

    // Equal slots, unequal demand.
    let mut group = c.benchmark_group("expert choice against token choice");
    group.sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(3));
    let either = |rule: &str| ["original", "expert_choice"].contains(&rule);
    let work = Work::w2(512).skewed();
    bench_rules(bench, &mut group, &work, WeightType::F32, "W2 skewed f32", &either);
    group.finish();

    // How a layer's time grows with its slots: eight a token.
    let mut group = c.benchmark_group("layer over tokens");
    group.sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(3));
    for tokens in [512, 1024, 2048, 4096] {
        let work = Work::w2(tokens);
        let slots = Throughput::Elements(u64::from(tokens) * 8);
        bench.case(
            &mut group,
            &format!("W2 f32 T{tokens}"),
            &bench.contexts[..1],
            slots,
            |ctx, what| {
                let weights = work.weights(gpu, ctx, WeightType::F32).unwrap();
                layer_step(gpu, &work, &work.layer(ctx, weights).unwrap(), what)
            },
        );
    }
}

/// One layer under several rules, which take turns.
fn bench_rules(
    bench: &Bench,
    group: &mut BenchmarkGroup<'_, WallTime>,
    work: &Work,
    weight_type: WeightType,
    what: &str,
    wanted: &dyn Fn(&str) -> bool,
) {
    let gpu = &bench.gpu;
    let mut rules = rules(work.settings.routing, work.settings.experts);
    rules.retain(|(rule, _)| wanted(rule));
    for (variant, ctx) in bench.best() {
        let name = |rule: &str| format!("{what}, {rule}");
        let ids = rules.iter().map(|(rule, _)| BenchmarkId::new(name(rule), variant)).collect();
        bench.turns(group, ids, Throughput::Elements(work.tokens.into()), || {
            let weights = work.weights(gpu, ctx, weight_type).unwrap();
            let layer = work.layer(ctx, weights).unwrap();
            let step = |(rule, routing): &(String, Routing)| {
                let what = format!("{}, {variant}", name(rule));
                layer_step(gpu, work, &layer.with_routing(*routing).unwrap(), &what)
            };
            rules.iter().map(step).collect()
        });
    }
}

/// The layer bound to the work's input, run once and compared: choice and plan whole, the output in eight tokens.
fn layer_step(gpu: &Gpu, work: &Work, layer: &MoeLayer, what: &str) -> Ready {
    let bound = work.bind(gpu, layer, None).unwrap();
    bound.run(gpu, &Part::ALL).unwrap();
    let checked = work.check_choice(gpu, &bound).and_then(|choice| {
        work.check_plan(gpu, &bound, &choice)?;
        work.check_output(gpu, layer, &bound, &choice, 8).map(|()| choice)
    });
    let choice = checked.unwrap_or_else(|e| panic!("{what}: {e}"));
    let (settings, unique) = (layer.config(), choice.unique_experts());
    let loads = choice.loads();
    eprintln!(
        "{what}: {} slots, {unique} of {} routed experts used, at most {} slots each, weights of {:.1} MB read",
        choice.slots(),
        settings.experts,
        loads.iter().max().unwrap_or(&0),
        f64::from(unique + settings.shared_experts) * layer.weights().shape().expert_bytes() as f64
            / 1e6
    );
    // What a batched matmul of equal parts would pad and drop; here nothing is padded beyond an item.
    for factor in [1.25, 1.5] {
        let rows = (factor * f64::from(choice.slots()) / loads.len() as f64).ceil() as u32;
        let kept: u32 = loads.iter().map(|&n| n.min(rows)).sum();
        eprintln!(
            "    in {rows} rows an expert (capacity {factor}): {} padded of {}, {} slots dropped",
            rows * loads.len() as u32 - kept,
            rows * loads.len() as u32,
            choice.slots() - kept
        );
    }
    Ready::Layer(Box::new(bound))
}

fn all(c: &mut Criterion) {
    let Some(bench) = Bench::open() else { return };
    bench_scores(&bench, c);
    bench_expert_choice(&bench, c);
    bench_token_choice(&bench, c);
    bench_coreset(&bench, c);
    bench_sequence_top(&bench, c);
    bench_capacity(&bench, c);
    bench_assign(&bench, c);
    bench_assign_lists(&bench, c);
    bench_plan(&bench, c);
    bench_gather(&bench, c);
    bench_matmul(&bench, c);
    bench_combine(&bench, c);
    bench_expert_union(&bench, c);
    bench_layer(&bench, c);
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .nresamples(2000);
    targets = all
}
criterion_main!(benches);
