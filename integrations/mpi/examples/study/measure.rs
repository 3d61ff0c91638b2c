//! Runs every rule on the ranks there are.
use crate::{Measure, Rank, Row, Run};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use std::ops::Range;
use testkit::synthetic::{Pool, hidden_states, router};
use wgmoe_mpi::mpi;
use wgmoe_mpi::mpi::traits::*;
use wgmoe_mpi::wgmoe::layer::{LayerConfig, Router, Tensor};
use wgmoe_mpi::wgmoe::routing::schedule::{self, Schedule, ScheduleKind};
use wgmoe_mpi::wgmoe::routing::{BlockRule, ExpertChoice, GateRule, TokenChoice};
use wgmoe_mpi::wgmoe::weights::Projection;
use wgmoe_mpi::wgmoe::{Context, ExpertWeights, Gpu, Routing, WeightType};
use wgmoe_mpi::{Batch, ExpertParallel, Options as Settings, RankWeights, Sequences, Split, Step};
use wgmoe_mpi::{Times, World};

/// Tokens of a sequence, and of a block.
const SEQUENCE: u32 = 128;
const BLOCK: u32 = 32;

/// A rule, and what a batch brings for it.
struct Rule {
    name: &'static str,
    routing: Routing,
    sequences: bool,
    /// Capacities by mask ratio.
    schedule: Option<Schedule>,
    equal: bool,
}

/// Every rule of the study, of about as many slots each.
fn rules(options: &Measure) -> Vec<Rule> {
    let (k, experts) = (options.top, options.experts);
    let tokens = TokenChoice::new(k).with_gate(GateRule::Softmax);
    let choice = ExpertChoice::new(k);
    let rule =
        |name, routing, equal| Rule { name, routing, sequences: false, schedule: None, equal };
    let blocks = BlockRule::mass(0.6).with_floor((experts / 16).max(1));
    vec![
        rule("token choice, dropless", tokens.into(), false),
        rule("token choice, capacity 1.5", tokens.with_capacity_factor(1.5).into(), false),
        rule("token choice, capacity 1.25", tokens.with_capacity_factor(1.25).into(), false),
        rule("token choice, capacity 1.0", tokens.with_capacity_factor(1.0).into(), false),
        rule("dMoE, mass 0.6", tokens.with_coreset(blocks).into(), false),
        rule("expert choice, batch", choice.into(), true),
        Rule { sequences: true, ..rule("expert choice, sequences", choice.into(), true) },
        Rule {
            sequences: true,
            schedule: Some(Schedule::new(ScheduleKind::LinearReverse, k / 2, k + k / 2)),
            ..rule("expert choice, dynamic", choice.with_max(2 * k).into(), true)
        },
    ]
}

/// What all ranks make alike, from one seed.
struct Host {
    router: Vec<f32>,
    hidden: Vec<f32>,
    pool: Pool,
    ratios: Vec<f32>,
}

impl Host {
    fn new(options: &Measure, config: &LayerConfig) -> Self {
        let rng = &mut StdRng::seed_from_u64(20);
        let mut router = router(rng, config);
        // Value 0 of every hidden state is 1: what stands there shifts an expert's logit everywhere.
        for w in router.iter_mut().step_by(config.hidden as usize) {
            *w += options.skew * rng.sample::<f32, _>(StandardNormal);
        }
        let hidden = hidden_states(rng, options.tokens, BLOCK, config.hidden);
        let sequences = options.tokens.div_ceil(SEQUENCE);
        let ratios = (0..sequences).map(|_| rng.random_range(0.0..1.0)).collect();
        Self { router, hidden, pool: Pool::new(rng, config, WeightType::F32), ratios }
    }

    fn weights(
        &self,
        (gpu, ctx): (&Gpu, &Context),
        config: &LayerConfig,
        experts: Range<u32>,
    ) -> wgmoe_mpi::Result<ExpertWeights> {
        let mut shape = config.expert_shape(WeightType::F32);
        shape.experts = experts.len() as u32;
        let weights = ExpertWeights::new(ctx, shape)?;
        for (i, e) in (0..).zip(experts) {
            for p in Projection::ALL {
                weights.write(&gpu.queue, i, p, self.pool.matrix(e, p))?;
            }
        }
        Ok(weights)
    }
}

pub fn run(options: &Measure) -> Result<(), Box<dyn std::error::Error>> {
    let threads = mpi::Threading::Funneled; // of the drivers', which make no call of MPI
    let (universe, _) = mpi::initialize_with_threading(threads).ok_or("MPI is in use")?;
    let comm = universe.world();
    let world = World::with_limit(&comm, std::time::Duration::from_secs(300))?;
    let gpu = Gpu::new()?;
    let ctx = Context::new(&gpu.device)?;
    let mut rows = vec![];
    for rule in rules(options) {
        let (rank, tokens_per_expert) = measure(&world, (&gpu, &ctx), options, &rule)?;
        let split = Split::even(options.experts, world.ranks());
        let own = serde_json::to_vec(&rank)?;
        if world.rank() > 0 {
            comm.process_at_rank(0).send(&own[..]);
            continue;
        }
        let mut ranks = vec![rank];
        for r in 1..comm.size() {
            let (bytes, _) = comm.process_at_rank(r).receive_vec::<u8>();
            ranks.push(serde_json::from_slice(&bytes)?);
        }
        let slots: u32 = tokens_per_expert.iter().sum();
        let drops = rule.name.contains("capacity");
        let dropped = if drops { options.tokens * options.top - slots } else { 0 };
        let slowest_over_mean = split.slowest_over_mean(&tokens_per_expert);
        let (name, equal) = (rule.name.to_string(), rule.equal);
        eprintln!("{} ranks: {name}: {slots} slots, {slowest_over_mean:.3}", world.ranks());
        let row = Row { rule: name, ranks, tokens_per_expert, dropped, slowest_over_mean, equal };
        rows.push(row);
    }
    if world.rank() == 0 {
        let (adapter, ranks) = (gpu.info.name.clone(), world.ranks());
        let run = Run { adapter, ranks, options: options.clone(), rules: rows };
        std::fs::write(&options.o, serde_json::to_string_pretty(&run)?)?;
    }
    Ok(())
}

/// One rule on this rank, and the slots of each expert over all.
fn measure(
    world: &World,
    (gpu, ctx): (&Gpu, &Context),
    options: &Measure,
    rule: &Rule,
) -> Result<(Rank, Vec<u32>), Box<dyn std::error::Error>> {
    let Measure { hidden, intermediate, experts, tokens, .. } = *options;
    let config = LayerConfig::new(hidden, intermediate, experts, rule.routing);
    let host = Host::new(options, &config);
    let split = Split::even(experts, world.ranks());
    let own = host.weights((gpu, ctx), &config, split.experts_of(world.rank()))?;
    let weights = RankWeights { experts: Some(own), shared: None };
    let router = Router::new(Tensor::new(ctx, "router", &host.router)?);
    let device = (ctx, &gpu.queue);
    // Once with the parts apart, once as it runs.
    let make = |settings| {
        let (router, weights) = (router.clone(), weights.clone());
        ExpertParallel::new(world, device, config, (&split, settings), router, weights)
    };
    let layers = [make(Settings::default().with_timed())?, make(Settings::default())?];
    // Whole sequences for each rank.
    let sequences = Split::even(tokens.div_ceil(SEQUENCE), world.ranks());
    let mine = sequences.experts_of(world.rank());
    let at = |s: u32| (s * SEQUENCE).min(tokens);
    let (first, end) = (at(mine.start), at(mine.end));
    let width = hidden as usize;
    let x = gpu.upload(&host.hidden[first as usize * width..end as usize * width]);
    let out = gpu.upload(&vec![0f32; (end - first) as usize * width]);
    let offsets: Vec<u32> = (mine.start..=mine.end).map(|s| at(s) - first).collect();
    let capacity = rule.schedule.map(|schedule| -> Vec<u32> {
        let k = |s: u32| schedule.k(host.ratios[s as usize]);
        let of = |s: u32| schedule::capacity(at(s + 1) - at(s), k(s), experts);
        mine.clone().map(of).collect()
    });
    let mut batch = Batch::new(&x, end - first, &out);
    if rule.sequences {
        let mut sequences = Sequences::new(&offsets);
        sequences.capacity = capacity.as_deref();
        batch = batch.with_sequences(sequences);
    }
    let mut steps = [vec![], vec![]];
    for (layer, steps) in layers.iter().zip(&mut steps) {
        let mut bound = layer.bind(&batch)?;
        for _ in 0..=options.steps {
            let start = std::time::Instant::now();
            let step: Step = bound.run()?;
            gpu.wait()?;
            steps.push((step, start.elapsed()));
        }
    }
    let least = |times: &mut dyn Iterator<Item = std::time::Duration>| {
        times.map(|t| t.as_secs_f64() * 1e3).fold(f64::INFINITY, f64::min)
    };
    let part = |time: fn(&Times) -> std::time::Duration| {
        least(&mut steps[0][1..].iter().map(|(step, _)| time(&step.times)))
    };
    let (step, _) = &steps[0][0];
    let rank = Rank {
        slots: step.slots,
        sent_bytes: step.sent_bytes,
        returned_bytes: step.returned_bytes,
        messages: step.messages,
        rounds: step.rounds,
        route_ms: part(|t| t.route),
        send_ms: part(|t| t.send),
        compute_ms: part(|t| t.compute),
        return_ms: part(|t| t.back),
        step_ms: least(&mut steps[1][1..].iter().map(|(_, time)| *time)),
    };
    Ok((rank, step.tokens_per_expert.clone()))
}
