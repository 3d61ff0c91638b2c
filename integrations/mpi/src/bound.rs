//! A layer bound to one rank's tokens, and its step.
use crate::batch::{Batch, Sequences};
use crate::exchange::Part;
use crate::layer::ExpertParallel;
use crate::owner::{Submitted, buffer};
use crate::route::{Route, Tokens, Whole};
use crate::shared::Shared;
use crate::split::Schedule;
use crate::step::{Clock, Doing, Step};
use crate::world::{State, tag};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::ops::Range;
use wgmoe::layer::{Batch as LayerBatch, Sequences as LayerSequences, Tensor};
use wgmoe::ops::combine;
use wgmoe::ops::gather::PlanArgs;
use wgmoe::routing::{Routing, TokenChoice, schedule};
use wgmoe::{BoundOp, Slice, wgpu};

/// A layer bound to one rank's tokens. Running it makes staging buffers at first, and keeps them.
pub struct BoundParallel<'a> {
    layer: &'a ExpertParallel,
    tokens: Tokens,
    route: Route,
    /// What follows the routing; none for zero tokens.
    local: Option<Local>,
    /// What the host's lists lie in on the device.
    _lists: Vec<Tensor>,
}

/// The work on a rank's own tokens.
struct Local {
    /// `[slots, D]`: the rows of the slots, and later what the experts made of each.
    rows: wgpu::Buffer,
    gather: BoundOp,
    combine: BoundOp,
    shared: Option<Shared>,
}

/// The bytes of a round, by the other rank.
struct Parts {
    /// Of this rank's slots, by who holds their experts.
    slots: Vec<(usize, Range<u64>)>,
    /// Of the rows of this rank's chunk, by whose tokens they are.
    rows: Vec<(usize, Range<u64>)>,
}

/// A round under way.
struct Round {
    number: usize,
    /// Rows to the experts.
    out: u64,
    computed: Option<Submitted>,
    /// Back to the tokens.
    back: Option<u64>,
}

impl<'a> BoundParallel<'a> {
    pub(crate) fn new(layer: &'a ExpertParallel, batch: &Batch<'_>) -> Result<Self> {
        let (world, rank) = (&layer.world, layer.world.rank());
        let sequences = batch.sequences.as_ref();
        if let Some(s) = sequences {
            check(s, batch.tokens)?;
        }
        let real = sequences.map_or(batch.tokens, |s| s.real().iter().sum());
        let own: Vec<u8> = [batch.tokens, real].iter().flat_map(|n| n.to_le_bytes()).collect();
        let all = world.all_gather("the tokens of a batch", tag::TOKENS, own)?;
        let pairs: Vec<[u32; 2]> =
            all.iter().flat_map(|b| bytemuck::pod_collect_to_vec(b)).collect();
        let tokens = Tokens::new(&pairs.iter().map(|p| p[0]).collect::<Vec<_>>())?;
        let active = pairs.iter().map(|p| p[1]).sum();
        world.agree(&[
            ("sequences", sequences.is_some().to_string()),
            ("lengths", sequences.is_some_and(|s| s.lengths.is_some()).to_string()),
        ])?;
        if !layer.options.idle_ranks {
            world.none_idle("zero tokens", |r| tokens.count(r) == 0)?;
        }
        let mut lists = vec![];
        let own = [tokens.of(rank).start, batch.tokens, tokens.all()];
        let route = bind_route(layer, batch, (&tokens, active), &mut lists)?;
        let local = match route.plan() {
            Some(_) => Some(Local::new(layer, batch, &route, own)?),
            None => None,
        };
        // What failed on one rank ends all.
        world.agree(&[("bound", "yes".into())])?;
        Ok(Self { layer, tokens, route, local, _lists: lists })
    }

    /// Runs the layer: submits to the queue, exchanges rows, and returns once the last work is
    /// submitted; `out` is there for what is submitted after it. Called by all ranks.
    ///
    /// Reads back `[E + 1]` u32 of the plan, from which ranks know what to post. Where capacities say
    /// how many tokens experts take, nothing is read back.
    ///
    /// # Errors
    ///
    /// [`Error::Rank`] for what failed on another rank, [`Error::Silent`] for ranks that do not come
    /// within the time limit, [`Error::Mpi`], and what the device refuses.
    pub fn run(&mut self) -> Result<Step> {
        let layer = self.layer;
        layer.world.telling(|| self.step())
    }

    /// First of this rank's tokens in the whole batch, and one past its last.
    pub fn tokens(&self) -> Range<u32> {
        self.tokens.of(self.layer.world.rank())
    }

    fn step(&self) -> Result<Step> {
        let layer = self.layer;
        let (world, device) = (&layer.world, &layer.device);
        let mut clock = Clock::new();
        let mut encoder = device.encoder();
        // Shared experts need no routing: the device has something to do while counts are read.
        if let Some(shared) = self.local.as_ref().and_then(|l| l.shared.as_ref()) {
            shared.encode(&mut encoder);
        }
        device.queue.submit([encoder.finish()]);
        let own = self.route.run(world, device)?;
        let bytes = bytemuck::cast_slice(&own).to_vec();
        let all = world.all_gather("rows of each expert", tag::COUNTS, bytes)?;
        let counts: Vec<Vec<u32>> = all.iter().map(|b| bytemuck::pod_collect_to_vec(b)).collect();
        let Self { local, .. } = self;
        let chunk_rows = layer.options.chunk_rows;
        let schedule = Schedule::new(counts, &layer.split, layer.tile_rows, chunk_rows);
        if let Some(local) = local {
            let mut encoder = device.encoder();
            local.gather.record(&mut encoder.begin_compute_pass(&Default::default()));
            device.queue.submit([encoder.finish()]);
        }
        self.settle()?;
        clock.now(Doing::Route);
        let mut step = Step::new(&schedule, &layer.split, world.rank());
        self.exchange(&schedule, &mut step, &mut clock)?;
        if let Some(local) = local {
            let mut encoder = device.encoder();
            if let Some(shared) = &local.shared {
                let routed = schedule.slots_of(world.rank());
                shared.encode_copies(&mut encoder, &local.rows, routed);
            }
            local.combine.record(&mut encoder.begin_compute_pass(&Default::default()));
            device.queue.submit([encoder.finish()]);
        }
        self.settle()?;
        clock.now(Doing::Return);
        step.times = clock.times;
        Ok(step)
    }

    /// Waits for the device, where times by part are asked for.
    fn settle(&self) -> Result<()> {
        if self.layer.options.timed {
            let poll = self.layer.device.ctx.device().poll(wgpu::PollType::wait_indefinitely());
            poll.map_err(|e| wgmoe::Error::Device(e.to_string()))?;
        }
        Ok(())
    }

    /// Rows to the experts and back, in rounds.
    fn exchange(&self, schedule: &Schedule, step: &mut Step, clock: &mut Clock) -> Result<()> {
        let layer = self.layer;
        let rounds = schedule.rounds();
        let mut under_way: VecDeque<Round> = VecDeque::new();
        let mut next = 0;
        layer.world.wait("rows of experts", || {
            let mut progress = layer.exchange.borrow_mut().poll()?;
            layer.device.poll()?;
            while next < rounds && under_way.len() < layer.options.rounds as usize {
                let out = self.start(schedule, next, step)?;
                under_way.push_back(Round { number: next, out, computed: None, back: None });
                next += 1;
                progress = true;
            }
            for round in &mut under_way {
                progress |= self.advance(schedule, round, step, clock)?;
            }
            let exchange = layer.exchange.borrow();
            let before = under_way.len();
            // In order: a round's buffers serve again so many rounds later.
            while under_way.front().is_some_and(|r| r.back.is_some_and(|b| exchange.done(b))) {
                under_way.pop_front();
            }
            progress |= under_way.len() < before;
            clock.now(doing(&under_way, |ticket| exchange.done(ticket)));
            if under_way.is_empty() && next == rounds {
                return Ok(State::Done);
            }
            Ok(State::Waiting { progress, on: exchange.ranks() })
        })
    }

    /// Starts a round: the rows of its slots to their experts.
    fn start(&self, schedule: &Schedule, round: usize, step: &mut Step) -> Result<u64> {
        let layer = self.layer;
        let parts = self.parts(schedule, round);
        let tag = tag::ROWS + 2 * (round % tag::ROUNDS) as i32;
        let (mut out, mut into) = (vec![], vec![]);
        let rank = layer.world.rank();
        if let Some(local) = &self.local {
            out.extend(of_others(&local.rows, &parts.slots, rank, tag));
        }
        if let Some(owner) = &layer.owner {
            into.extend(of_others(owner.rows(round), &parts.rows, rank, tag));
        }
        step.sent(&out);
        let ticket = layer.exchange.borrow_mut().start(&out, &into)?;
        // This rank's own rows do not leave the device.
        self.copy_own(round, &parts, false);
        Ok(ticket)
    }

    /// Copies the rows that go from this rank to itself, or back.
    fn copy_own(&self, round: usize, parts: &Parts, back: bool) {
        let layer = self.layer;
        let rank = layer.world.rank();
        let own = |of: &[(usize, Range<u64>)]| {
            of.iter().find(|(r, _)| *r == rank).map(|(_, bytes)| bytes.clone())
        };
        let (Some(slots), Some(rows)) = (own(&parts.slots), own(&parts.rows)) else { return };
        let (Some(local), Some(owner)) = (&self.local, &layer.owner) else { return };
        let ((from, at), (to, into)) = if back {
            ((owner.results(round), rows), (&local.rows, slots))
        } else {
            ((&local.rows, slots), (owner.rows(round), rows))
        };
        let mut encoder = layer.device.encoder();
        encoder.copy_buffer_to_buffer(from, at.start, to, into.start, at.end - at.start);
        layer.device.queue.submit([encoder.finish()]);
    }

    /// The bytes of a round.
    fn parts(&self, schedule: &Schedule, round: usize) -> Parts {
        let layer = self.layer;
        let width = 4 * u64::from(layer.config.hidden);
        let own = layer.world.rank();
        let bytes =
            |slots: Range<u32>| u64::from(slots.start) * width..u64::from(slots.end) * width;
        let mut slots = vec![];
        let mut rows = vec![];
        let mut first = 0;
        for rank in 0..layer.world.ranks() {
            let segment = schedule.segment(own, rank, round);
            if !segment.is_empty() {
                slots.push((rank, bytes(segment)));
            }
            let n = schedule.segment(rank, own, round).len() as u32;
            if n > 0 {
                rows.push((rank, bytes(first..first + n)));
                first += n;
            }
        }
        Parts { slots, rows }
    }

    /// Takes a round a step further: whether there was one to take.
    fn advance(
        &self,
        schedule: &Schedule,
        round: &mut Round,
        step: &mut Step,
        clock: &mut Clock,
    ) -> Result<bool> {
        let layer = self.layer;
        if round.back.is_some() || !layer.exchange.borrow().done(round.out) {
            return Ok(false);
        }
        let parts = self.parts(schedule, round.number);
        let at = [layer.world.rank(), round.number];
        let tag = tag::ROWS + 2 * (round.number % tag::ROUNDS) as i32 + 1;
        let (mut out, mut into) = (vec![], vec![]);
        if let Some(owner) = layer.owner.as_ref().filter(|_| !parts.rows.is_empty()) {
            let (queue, device) = (&layer.device.queue, layer.device.ctx.device());
            self.settle()?;
            clock.now(Doing::Send);
            round.computed = Some(owner.run(queue, device, schedule, &layer.split, at)?);
            self.settle()?;
            clock.now(Doing::Compute);
            out.extend(of_others(owner.results(round.number), &parts.rows, at[0], tag));
        }
        if let Some(local) = &self.local {
            into.extend(of_others(&local.rows, &parts.slots, at[0], tag));
        }
        step.returned(&out);
        round.back = Some(layer.exchange.borrow_mut().start(&out, &into)?);
        self.copy_own(round.number, &parts, true);
        Ok(true)
    }
}

/// What this rank is waiting for, of rounds under way.
fn doing(under_way: &VecDeque<Round>, done: impl Fn(u64) -> bool) -> Doing {
    if under_way.iter().any(|r| r.computed.as_ref().is_some_and(|c| !c.is_done())) {
        Doing::Compute
    } else if under_way.iter().any(|r| !done(r.out)) {
        Doing::Send
    } else {
        Doing::Return
    }
}

impl Local {
    fn new(
        layer: &ExpertParallel,
        batch: &Batch<'_>,
        route: &Route,
        [first, tokens, whole]: [u32; 3],
    ) -> Result<Self> {
        let (ctx, config) = (&layer.device.ctx, &layer.config);
        let (shape, plan) = route.plan().ok_or_else(|| Error::invalid("tokens", "zero"))?;
        let hidden = config.hidden;
        let bytes = 4 * u64::from(shape.slots()?) * u64::from(hidden);
        let rows = buffer(ctx, "tokens", bytes)?;
        let all = Slice::new(&rows, 0, bytes);
        let args = PlanArgs { x: batch.hidden.into(), plan, out: all, hidden };
        let gather = layer.gather.bind_plan(&shape, args)?;
        let add = batch.add;
        let args =
            combine::Args { y: all, plan, out: batch.out.into(), columns: 0..hidden, hidden, add };
        let combine = layer.combine.bind(&shape, args)?;
        let shared = match &layer.weights.shared {
            Some(weights) if config.shared_experts > 0 => {
                let own = [first, tokens, whole];
                Some(Shared::new(ctx, config, weights, batch.hidden, own)?)
            }
            _ => None,
        };
        Ok(Self { rows, gather, combine, shared })
    }
}

/// The routing by the layer's rule.
fn bind_route(
    layer: &ExpertParallel,
    batch: &Batch<'_>,
    (tokens, active): (&Tokens, u32),
    lists: &mut Vec<Tensor>,
) -> Result<Route> {
    let (device, routing, rank) = (&layer.device, &layer.routing, layer.world.rank());
    let config = routing.config();
    let mut of_layer = LayerBatch::new(batch.hidden, batch.tokens).as_part_of(tokens.all());
    of_layer.blocks = batch.blocks;
    let expert_choice = matches!(config.routing, Routing::ExpertChoice(_));
    let drops = matches!(
        config.routing,
        Routing::TokenChoice(TokenChoice { capacity_factor: Some(_), .. })
    );
    let Some(sequences) = &batch.sequences else {
        if expert_choice || drops {
            let whole =
                Whole::new(device, routing, &of_layer, &layer.split, (tokens, active, rank))?;
            return Ok(Route::Whole(Box::new(whole)));
        }
        if matches!(config.routing, Routing::SequenceTop(_)) && layer.world.ranks() > 1 {
            let reason = "missing: this rule chooses from each sequence, and none crosses ranks";
            return Err(Error::invalid("sequences", reason));
        }
        return Route::apart(device, routing, &of_layer, None);
    };
    let mut list = |name, values: &[u32]| -> Result<Tensor> {
        let tensor = Tensor::new(&device.ctx, name, values)?;
        lists.push(tensor.clone());
        Ok(tensor)
    };
    let known = known(routing.config(), sequences)?;
    let offsets = list("offsets", sequences.offsets)?;
    let lengths = sequences.lengths.map(|l| list("lengths", l)).transpose()?;
    let capacity = known.as_ref().map(|k| list("capacity", &k.capacity)).transpose()?;
    let count = (sequences.offsets.len() - 1) as u32;
    let mut on_device = LayerSequences::new(count, &offsets);
    on_device.lengths = lengths.as_ref().map(Tensor::slice);
    on_device.capacity = capacity.as_ref().map(Tensor::slice);
    of_layer = of_layer.with_sequences(on_device);
    if drops {
        let whole = Whole::new(device, routing, &of_layer, &layer.split, (tokens, active, rank))?;
        return Ok(Route::Whole(Box::new(whole)));
    }
    Route::apart(device, routing, &of_layer, known.map(|k| k.counts))
}

/// What the host knows of expert choice.
struct Known {
    capacity: Vec<u32>,
    counts: Vec<u32>,
}

/// Capacities, and how many tokens each expert takes by them.
fn known(config: &wgmoe::LayerConfig, sequences: &Sequences<'_>) -> Result<Option<Known>> {
    let Routing::ExpertChoice(rule) = config.routing else {
        if sequences.capacity.is_some() {
            return Err(Error::invalid("capacity", "only expert choice has capacities"));
        }
        return Ok(None);
    };
    let real = sequences.real();
    let of = |&n: &u32| schedule::capacity(n, rule.experts_per_token, config.experts);
    let capacity: Vec<u32> = match sequences.capacity {
        Some(capacity) => capacity.to_vec(),
        None => real.iter().map(of).collect(),
    };
    let takes = |(&c, &n): (&u32, &u32)| if n == 0 { 0 } else { c.clamp(1, n) };
    let each: u64 = capacity.iter().zip(&real).map(takes).map(u64::from).sum();
    let k = rule.max_experts_per_token;
    let (tokens, count) = (sequences.offsets[real.len()], real.len() as u32);
    let bound = schedule::slot_bound_of_any(tokens.max(1), count, config.experts, k)?;
    let slots = each * u64::from(config.experts);
    if slots > u64::from(bound) {
        let reason = format!("{slots} slots, `max_experts_per_token` of {k} has room for {bound}");
        return Err(Error::invalid("capacity", reason));
    }
    Ok(Some(Known { capacity, counts: vec![each as u32; config.experts as usize] }))
}

/// The parts of a buffer that go to other ranks or come from them, of ranges by rank.
fn of_others<'a>(
    buffer: &'a wgpu::Buffer,
    ranges: &[(usize, Range<u64>)],
    own: usize,
    tag: i32,
) -> impl Iterator<Item = Part<'a>> {
    let others = ranges.iter().filter(move |(rank, _)| *rank != own);
    others.map(move |(rank, bytes)| Part { buffer, bytes: bytes.clone(), rank: *rank, tag })
}

/// Checks sequences against the tokens.
fn check(sequences: &Sequences<'_>, tokens: u32) -> Result<()> {
    let offsets = sequences.offsets;
    let grows = offsets.windows(2).all(|w| w[0] <= w[1]);
    if offsets.len() < 2 || offsets[0] != 0 || !grows || offsets[offsets.len() - 1] > tokens {
        let reason = format!("{offsets:?}, expected 0 to at most {tokens}, not decreasing");
        return Err(Error::invalid("offsets", reason));
    }
    for (name, list) in [("lengths", sequences.lengths), ("capacity", sequences.capacity)] {
        if let Some(list) = list.filter(|l| l.len() != offsets.len() - 1) {
            let reason = format!("{}, for {} sequences", list.len(), offsets.len() - 1);
            return Err(Error::invalid(name, reason));
        }
    }
    Ok(())
}
