//! The routing of one rank's tokens, and the choice of experts over the whole batch.
use crate::owner::buffer;
use crate::split::Split;
use crate::world::{State, tag};
use crate::{Error, Result, World};
use std::ops::Range;
use wgmoe::layer::{Batch, BoundLayer, BoundPart, MoeRouting, Tensor};
use wgmoe::ops::expert_choice::{self, DropArgs, DropDims, ExpertChoice};
use wgmoe::routing::{Routing, schedule};
use wgmoe::{BoundOp, Context, PlanShape, Slice, wgpu};

/// The device and its queue.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) ctx: Context,
    pub(crate) queue: wgpu::Queue,
}

impl Device {
    pub(crate) fn encoder(&self) -> wgpu::CommandEncoder {
        self.ctx.device().create_command_encoder(&Default::default())
    }

    pub(crate) fn poll(&self) -> Result<()> {
        let poll = self.ctx.device().poll(wgpu::PollType::Poll);
        poll.map_err(|e| wgmoe::Error::Device(e.to_string()))?;
        Ok(())
    }
}

/// A range of a buffer that the host reads.
#[derive(Debug)]
pub(crate) struct Readback {
    staging: wgpu::Buffer,
}

impl Readback {
    pub(crate) fn new(device: &Device, words: u64) -> Self {
        let staging = device.ctx.device().create_buffer(&wgpu::BufferDescriptor {
            label: Some("read back"),
            size: (words * 4).max(4),
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        Self { staging }
    }

    /// Records the copy of a whole range at a word of the staging.
    pub(crate) fn encode(&self, encoder: &mut wgpu::CommandEncoder, of: Slice<'_>, at: u64) {
        encoder.copy_buffer_to_buffer(of.buffer, of.offset, &self.staging, at * 4, of.size);
    }

    /// The words, once the device is done with what was submitted. The other ranks are served
    /// meanwhile.
    pub(crate) fn words(&self, world: &World, device: &Device) -> Result<Vec<u32>> {
        let (send, receive) = std::sync::mpsc::channel();
        self.staging.map_async(wgpu::MapMode::Read, .., move |result| {
            let _ = send.send(result.map_err(|e| e.to_string()));
        });
        let mut result = None;
        world.wait("the device of this rank", || {
            device.poll()?;
            result = receive.try_recv().ok();
            // The device itself is no rank: a step of it may take as long as it takes.
            let on = vec![];
            Ok(if result.is_some() { State::Done } else { State::Waiting { progress: false, on } })
        })?;
        if let Some(Err(e)) = result {
            return Err(wgmoe::Error::ReadBack(e).into());
        }
        let view = self.staging.get_mapped_range(..);
        let view = view.map_err(|e| wgmoe::Error::ReadBack(e.to_string()))?;
        let words = bytemuck::pod_collect_to_vec(&view);
        drop(view);
        self.staging.unmap();
        Ok(words)
    }
}

/// Which tokens of the batch each rank has: the first of each, and their number.
#[derive(Clone, Debug)]
pub(crate) struct Tokens {
    pub(crate) first: Vec<u32>,
}

impl Tokens {
    pub(crate) fn new(counts: &[u32]) -> Result<Self> {
        let mut first = vec![0u32];
        for n in counts {
            let many = || Error::invalid("tokens", "all ranks' do not fit 32 bits");
            first.push(first[first.len() - 1].checked_add(*n).ok_or_else(many)?);
        }
        Ok(Self { first })
    }

    pub(crate) fn all(&self) -> u32 {
        self.first[self.first.len() - 1]
    }

    pub(crate) fn of(&self, rank: usize) -> Range<u32> {
        self.first[rank]..self.first[rank + 1]
    }

    pub(crate) fn count(&self, rank: usize) -> u32 {
        self.of(rank).len() as u32
    }
}

/// The routing of one rank's tokens.
pub(crate) enum Route {
    /// Each token, block or sequence for itself.
    Apart { bound: Box<BoundLayer>, counts: Counts },
    /// Experts over the whole batch.
    Whole(Box<Whole>),
}

/// How many slots each expert has on this rank.
pub(crate) enum Counts {
    /// As the capacities say, which the host has.
    Known(Vec<u32>),
    /// On the device: a readback of `[E + 1]` offsets.
    Read(Readback),
}

impl Route {
    /// Where rules choose apart.
    pub(crate) fn apart(
        device: &Device,
        routing: &MoeRouting,
        batch: &Batch<'_>,
        known: Option<Vec<u32>>,
    ) -> Result<Self> {
        let experts = u64::from(routing.config().experts);
        let counts = match known {
            Some(counts) => Counts::Known(counts),
            None => Counts::Read(Readback::new(device, experts + 1)),
        };
        Ok(Self::Apart { bound: Box::new(routing.bind(batch)?), counts })
    }

    /// What the combination reads: shape and plan.
    pub(crate) fn plan(&self) -> Option<(PlanShape, Slice<'_>)> {
        match self {
            Self::Apart { bound, .. } => bound.plan(),
            Self::Whole(whole) => whole.part.after().plan(),
        }
    }

    /// Routes the tokens, and says how many slots each expert has here.
    pub(crate) fn run(&self, world: &World, device: &Device) -> Result<Vec<u32>> {
        let (bound, counts) = match self {
            Self::Whole(whole) => return whole.run(world, device),
            Self::Apart { bound, counts } => (bound, counts),
        };
        let mut encoder = device.encoder();
        bound.encode(&mut encoder);
        let Some((shape, plan)) = bound.plan() else {
            return Ok(match counts {
                Counts::Known(counts) => vec![0; counts.len()],
                Counts::Read(readback) => vec![0; (readback.staging.size() / 4 - 1) as usize],
            });
        };
        match counts {
            Counts::Known(counts) => {
                device.queue.submit([encoder.finish()]);
                Ok(counts.clone())
            }
            Counts::Read(readback) => {
                let at = plan.offset + 4 * u64::from(shape.sections()?.expert_offsets);
                let bytes = 4 * (u64::from(shape.experts) + 1);
                readback.encode(&mut encoder, Slice::new(plan.buffer, at, bytes), 0);
                device.queue.submit([encoder.finish()]);
                let offsets = readback.words(world, device)?;
                Ok(offsets.windows(2).map(|w| w[1] - w[0]).collect())
            }
        }
    }
}

/// The choice of experts over the whole batch: each rank chooses for its own experts, of the values
/// that all ranks' tokens have for them.
pub(crate) struct Whole {
    part: BoundPart,
    split: Split,
    tokens: Tokens,
    rank: usize,
    /// Whether experts choose among their own tokens only: a capacity factor.
    drops: bool,
    read: Readback,
    choice: Option<Choosing>,
}

/// The choice for the experts of this rank.
struct Choosing {
    /// `[T, E of this rank]`.
    values: wgpu::Buffer,
    /// `[E of this rank, ceil(T / 32)]`.
    assigned: wgpu::Buffer,
    work: BoundOp,
    read: Readback,
    _tensors: Vec<Tensor>,
}

impl Whole {
    /// Of a rule by which experts choose over the batch. `tokens` count padding too, `active` does not.
    pub(crate) fn new(
        device: &Device,
        routing: &MoeRouting,
        batch: &Batch<'_>,
        split: &Split,
        (tokens, active, rank): (&Tokens, u32, usize),
    ) -> Result<Self> {
        let experts = split.experts();
        let part = routing.bind_part(&batch.as_part_of(tokens.all()))?;
        let (drops, capacity) = match routing.config().routing {
            Routing::ExpertChoice(rule) => {
                let k = rule.experts_per_token;
                (false, schedule::capacity(tokens.all(), k, experts))
            }
            Routing::TokenChoice(rule) => (true, rule.capacity(active, experts).unwrap_or(active)),
            _ => return Err(Error::invalid("routing", "no expert chooses under this rule")),
        };
        let own = split.experts_of(rank).len() as u32;
        let choice = if own > 0 && tokens.all() > 0 {
            Some(Choosing::new(device, [tokens.all(), own, capacity], drops)?)
        } else {
            None
        };
        let words = |s: Option<Slice<'_>>| s.map_or(0, |s| s.size / 4);
        let read = words(part.values()) + words(part.assigned());
        let (split, tokens) = (split.clone(), tokens.clone());
        let read = Readback::new(device, read);
        Ok(Self { part, split, tokens, rank, drops, read, choice })
    }

    fn run(&self, world: &World, device: &Device) -> Result<Vec<u32>> {
        let experts = self.split.experts() as usize;
        let own = self.split.experts_of(self.rank).len();
        let (values, assigned) = self.values(world, device)?;
        // The columns of each owner's experts, and the bits of their own tokens.
        let mine = self.tokens.count(self.rank) as usize;
        let columns = mine.div_ceil(32);
        let mut to = vec![];
        let mut lens = vec![];
        for r in 0..self.split.ranks() {
            let of = self.split.experts_of(r);
            let of = of.start as usize..of.end as usize;
            let mut words = vec![];
            for row in values.chunks_exact(experts) {
                words.extend_from_slice(&row[of.clone()]);
            }
            let theirs = self.tokens.count(r) as usize;
            let mut len = theirs * own;
            if self.drops {
                words.extend_from_slice(&assigned[of.start * columns..of.end * columns]);
                len += theirs.div_ceil(32) * own;
            }
            to.push(bytemuck::cast_slice(&words).to_vec());
            lens.push(4 * len);
        }
        let came = world.all_to_all("selection values", tag::VALUES, to, &lens)?;
        let chosen = match &self.choice {
            Some(choice) => self.choose(choice, world, device, &came)?,
            None => vec![],
        };
        let bits = self.exchange(world, &chosen)?;
        if let Some(assigned) = self.part.assigned() {
            device.queue.write_buffer(
                assigned.buffer,
                assigned.offset,
                bytemuck::cast_slice(&bits),
            );
            let mut encoder = device.encoder();
            self.part.after().encode(&mut encoder);
            device.queue.submit([encoder.finish()]);
        }
        let count = |e: usize| bits[e * columns..(e + 1) * columns].iter().map(|w| w.count_ones());
        Ok((0..experts).map(|e| count(e).sum()).collect())
    }

    /// The values of this rank's tokens, as bits, and their own choice where they have one.
    fn values(&self, world: &World, device: &Device) -> Result<(Vec<u32>, Vec<u32>)> {
        let (Some(values), Some(assigned)) = (self.part.values(), self.part.assigned()) else {
            return Ok((vec![], vec![]));
        };
        let mut encoder = device.encoder();
        self.part.encode_values(&mut encoder);
        self.read.encode(&mut encoder, values, 0);
        if self.drops {
            self.read.encode(&mut encoder, assigned, values.size / 4);
        }
        device.queue.submit([encoder.finish()]);
        let mut words = self.read.words(world, device)?;
        let assigned = words.split_off((values.size / 4) as usize);
        Ok((words, assigned))
    }

    /// The choice of this rank's experts, `[E, ceil(T / 32)]`.
    fn choose(
        &self,
        choice: &Choosing,
        world: &World,
        device: &Device,
        came: &[Vec<u8>],
    ) -> Result<Vec<u32>> {
        let own = self.split.experts_of(self.rank).len();
        let all = self.tokens.all() as usize;
        let mut values: Vec<u32> = vec![];
        let mut assigned = vec![0u32; own * all.div_ceil(32)];
        for (r, came) in came.iter().enumerate() {
            let words: Vec<u32> = bytemuck::pod_collect_to_vec(came);
            let (theirs, bits) = words.split_at(self.tokens.count(r) as usize * own);
            values.extend_from_slice(theirs);
            if self.drops {
                put_bits(&mut assigned, all, bits, self.tokens.of(r));
            }
        }
        device.queue.write_buffer(&choice.values, 0, bytemuck::cast_slice(&values));
        if self.drops {
            device.queue.write_buffer(&choice.assigned, 0, bytemuck::cast_slice(&assigned));
        }
        let mut encoder = device.encoder();
        choice.work.record(&mut encoder.begin_compute_pass(&Default::default()));
        let bytes = 4 * assigned.len() as u64;
        choice.read.encode(&mut encoder, Slice::new(&choice.assigned, 0, bytes), 0);
        device.queue.submit([encoder.finish()]);
        choice.read.words(world, device)
    }

    /// Each rank's choice to the ranks whose tokens were chosen: `[E, ceil(T / 32)]` of this one's.
    fn exchange(&self, world: &World, chosen: &[u32]) -> Result<Vec<u32>> {
        let all = self.tokens.all() as usize;
        let columns = (self.tokens.count(self.rank) as usize).div_ceil(32);
        let mut to = vec![];
        let mut lens = vec![];
        for r in 0..self.split.ranks() {
            let words = take_bits(chosen, all, self.tokens.of(r));
            to.push(bytemuck::cast_slice(&words).to_vec());
            lens.push(4 * columns * self.split.experts_of(r).len());
        }
        let came = world.all_to_all("the experts' choice", tag::CHOICE, to, &lens)?;
        Ok(came.iter().flat_map(|c| bytemuck::pod_collect_to_vec::<u8, u32>(c)).collect())
    }
}

impl Choosing {
    fn new(device: &Device, [tokens, experts, capacity]: [u32; 3], drops: bool) -> Result<Self> {
        let ctx = &device.ctx;
        let op = ExpertChoice::new(ctx)?;
        let columns = u64::from(tokens.div_ceil(32));
        let pairs = 4 * u64::from(tokens) * u64::from(experts);
        let values = buffer(ctx, "values of all ranks", pairs)?;
        let assigned = buffer(ctx, "choice over the batch", 4 * columns * u64::from(experts))?;
        let offsets = Tensor::new(ctx, "offsets", &[0, tokens])?;
        let capacity = Tensor::new(ctx, "capacity", &[capacity])?;
        let dropped = Tensor::new(ctx, "dropped", &vec![0u32; experts as usize])?;
        let values_slice = Slice::new(&values, 0, pairs);
        let bits = Slice::new(&assigned, 0, 4 * columns * u64::from(experts));
        let work = if drops {
            let args = DropArgs {
                gates: values_slice,
                offsets: offsets.slice(),
                capacity: capacity.slice(),
                assigned: bits,
                dropped: dropped.slice(),
            };
            op.bind_drop(&DropDims { tokens, experts }, args)?
        } else {
            let args = expert_choice::Args {
                values: values_slice,
                offsets: offsets.slice(),
                lengths: None,
                capacity: capacity.slice(),
                assigned: bits,
            };
            op.bind(&expert_choice::Dims { tokens, experts, sequences: 1 }, args)?
        };
        let read = Readback::new(device, columns * u64::from(experts));
        let tensors = vec![offsets, capacity, dropped];
        Ok(Self { values, assigned, work, read, _tensors: tensors })
    }
}

/// Some tokens of a bit set `[E, ceil(all / 32)]`, as a bit set of their own.
fn take_bits(words: &[u32], all: usize, of: Range<u32>) -> Vec<u32> {
    let columns = all.div_ceil(32).max(1);
    let mut taken = vec![];
    for row in words.chunks_exact(columns) {
        let mut own = vec![0; of.len().div_ceil(32)];
        for (i, t) in of.clone().enumerate() {
            let bit = row[t as usize / 32] >> (t % 32) & 1;
            own[i / 32] |= bit << (i % 32);
        }
        taken.extend(own);
    }
    taken
}

/// The inverse: sets the bits of some tokens.
fn put_bits(words: &mut [u32], all: usize, own: &[u32], of: Range<u32>) {
    let columns = of.len().div_ceil(32);
    if columns == 0 {
        return;
    }
    for (row, own) in words.chunks_exact_mut(all.div_ceil(32)).zip(own.chunks_exact(columns)) {
        for (i, t) in of.clone().enumerate() {
            let bit = own[i / 32] >> (i % 32) & 1;
            row[t as usize / 32] |= bit << (t % 32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgmoe::plan::bits;

    #[test]
    fn bits_of_some_tokens() {
        let lists = [vec![0, 31, 32, 40, 69], vec![], vec![33, 64, 65]];
        let all = bits::from_lists(70, &lists);
        let mut again = vec![0; all.len()];
        for of in [0..33, 33..33, 33..70] {
            let own = take_bits(&all, 70, of.clone());
            let of_part = |l: &Vec<u32>| -> Vec<u32> {
                l.iter().filter(|t| of.contains(t)).map(|t| t - of.start).collect()
            };
            let want: Vec<_> = lists.iter().map(of_part).collect();
            assert_eq!(own, bits::from_lists(of.len(), &want));
            put_bits(&mut again, 70, &own, of);
        }
        assert_eq!(again, all);
    }
}
