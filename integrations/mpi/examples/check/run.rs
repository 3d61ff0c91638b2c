//! Runs cases on all ranks, and on one device on rank 0.
use crate::cases::{self, Case};
use crate::naive::Naive;
use std::cell::RefCell;
use std::rc::Rc;
use testkit::compare::{close, difference, largest};
use wgmoe_mpi::wgmoe::layer::{
    self, Batch as LayerBatch, Blocks, HostBatch, HostBlocks, HostSequences, MoeLayer,
    Sequences as LayerSequences,
};
use wgmoe_mpi::wgmoe::weights::Projection;
use wgmoe_mpi::wgmoe::{Context, ExpertWeights, Gpu, Variant};
use wgmoe_mpi::{
    Batch, Error, ExpertParallel, Options, RankWeights, Result, Sequences, Split, World,
};

/// Some experts of a layer on the device.
pub fn weights(
    gpu: &Gpu,
    ctx: &Context,
    case: &Case,
    experts: std::ops::Range<u32>,
) -> Result<Option<ExpertWeights>> {
    if experts.is_empty() {
        return Ok(None);
    }
    let mut shape = case.layer.config.expert_shape(case.weight_type);
    shape.experts = experts.len() as u32;
    let weights = ExpertWeights::new(ctx, shape)?;
    for (i, e) in experts.enumerate() {
        for p in Projection::ALL {
            weights.write(&gpu.queue, i as u32, p, case.layer.matrix(e, p))?;
        }
    }
    Ok(Some(weights))
}

/// A rank's ranges, as the case has them.
struct Lists {
    sequences: Option<Vec<u32>>,
    lengths: Option<Vec<u32>>,
    capacities: Option<Vec<u32>>,
    blocks: Option<Vec<u32>>,
}

impl Lists {
    fn of(case: &Case, rank: usize) -> Self {
        let tokens = case.tokens[rank];
        let sequences = case.sequences.map(|most| Case::ranges(tokens, most));
        Self {
            lengths: sequences.as_ref().and_then(|s| case.lengths(s)),
            capacities: sequences.as_ref().and_then(|s| case.capacities(s)),
            blocks: case.blocks.map(|most| Case::ranges(tokens, most)),
            sequences,
        }
    }

    /// Those of all ranks, as of one batch.
    fn all(case: &Case) -> Self {
        let of: Vec<Self> = (0..case.tokens.len()).map(|r| Self::of(case, r)).collect();
        let joined = |list: &dyn Fn(&Self) -> Option<Vec<u32>>, ends: bool| {
            let mut first = 0;
            let mut all = if ends { vec![0] } else { vec![] };
            for (own, tokens) in of.iter().zip(&case.tokens) {
                match list(own) {
                    None => return None,
                    Some(own) if ends => all.extend(own[1..].iter().map(|end| first + end)),
                    Some(own) => all.extend(own),
                }
                first += tokens;
            }
            Some(all)
        };
        Self {
            sequences: joined(&|l| l.sequences.clone(), true),
            lengths: joined(&|l| l.lengths.clone(), false),
            capacities: joined(&|l| l.capacities.clone(), false),
            blocks: joined(&|l| l.blocks.clone(), true),
        }
    }
}

/// The case on this rank: its output.
fn parallel(world: &World, gpu: &Gpu, ctx: &Context, case: &Case, naive: bool) -> Result<Vec<f32>> {
    let rank = world.rank();
    let config = case.layer.config;
    let split = Split::new(&case.experts)?;
    let own = RankWeights {
        experts: weights(gpu, ctx, case, split.experts_of(rank))?,
        shared: weights(gpu, ctx, case, config.experts..config.experts + config.shared_experts)?,
    };
    let options = Options::default().with_idle_ranks().with_chunk_rows(case.chunk_rows);
    let router = case.layer.router(ctx)?;
    let device = (ctx, &gpu.queue);
    let layer = if naive {
        let exchange = Rc::new(RefCell::new(Naive::new(gpu)));
        ExpertParallel::with_exchange(
            world,
            device,
            config,
            (&split, options),
            router,
            own,
            exchange,
        )?
    } else {
        ExpertParallel::new(world, device, config, (&split, options), router, own)?
    };
    let d = config.hidden as usize;
    let first = case.tokens[..rank].iter().sum::<u32>() as usize * d;
    let n = case.tokens[rank] as usize * d;
    let x = &case.hidden()[first..first + n];
    // At least a word: no buffer is empty.
    let hidden = gpu.upload(&[x, &[0.0]].concat());
    let poison = vec![f32::NAN; n];
    let out = gpu.upload(&[if case.add { x } else { &poison }, &[0.0]].concat());
    let slice = |b| wgmoe_mpi::wgmoe::Slice::new(b, 0, n as u64 * 4);
    let lists = Lists::of(case, rank);
    let mut batch = Batch::new(slice(&hidden), case.tokens[rank], slice(&out));
    batch.add = case.add;
    if let Some(offsets) = &lists.sequences {
        let mut sequences = Sequences::new(offsets);
        sequences.lengths = lists.lengths.as_deref();
        sequences.capacity = lists.capacities.as_deref();
        batch = batch.with_sequences(sequences);
    }
    let blocks = lists.blocks.as_ref().map(|b| (b.len() as u32 - 1, gpu.upload(b)));
    if let Some((count, offsets)) = &blocks {
        batch = batch.with_blocks(Blocks::new(*count, offsets));
    }
    let mut bound = layer.bind(&batch)?;
    // Twice: the second step meets the buffers of the first.
    bound.run()?;
    if case.add {
        gpu.queue.write_buffer(&out, 0, bytemuck::cast_slice(x));
    }
    bound.run()?;
    if n == 0 { Ok(vec![]) } else { Ok(gpu.download(slice(&out))?) }
}

/// The case on one device with all experts.
fn alone(gpu: &Gpu, ctx: &Context, case: &Case) -> Result<Vec<f32>> {
    let layer: MoeLayer = case.layer.layer_as(ctx, &gpu.queue, case.weight_type, None)?;
    let x = case.hidden();
    let hidden = gpu.upload(&x);
    let out = gpu.upload(&if case.add { x.clone() } else { vec![f32::NAN; x.len()] });
    let lists = Lists::all(case);
    let tokens = case.tokens.iter().sum();
    let mut batch = LayerBatch::new(&hidden, tokens);
    batch = if case.add { batch.added_to(&out) } else { batch.into_out(&out) };
    let upload = |l: &Option<Vec<u32>>| l.as_ref().map(|l| (l.len() as u32, gpu.upload(l)));
    let [sequences, lengths, capacities, blocks] =
        [&lists.sequences, &lists.lengths, &lists.capacities, &lists.blocks].map(upload);
    if let Some((ends, offsets)) = &sequences {
        let mut sequences = LayerSequences::new(ends - 1, offsets);
        sequences.lengths = lengths.as_ref().map(|(_, b)| b.into());
        sequences.capacity = capacities.as_ref().map(|(_, b)| b.into());
        batch = batch.with_sequences(sequences);
    }
    if let Some((ends, offsets)) = &blocks {
        batch = batch.with_blocks(Blocks::new(ends - 1, offsets));
    }
    gpu.run_layer(&layer.bind(&batch)?)?;
    Ok(gpu.download(&out)?)
}

/// The CPU twin of the case.
fn twin(case: &Case) -> Vec<f32> {
    let stored = case.layer.stored_as(case.weight_type);
    let lists = Lists::all(case);
    let batch = HostBatch {
        sequences: lists.sequences.as_ref().map(|offsets| HostSequences {
            offsets,
            lengths: lists.lengths.as_deref(),
            capacity: lists.capacities.as_deref(),
        }),
        blocks: lists.blocks.as_ref().map(|offsets| HostBlocks::new(offsets)),
        ..HostBatch::default()
    };
    let x = case.hidden();
    let matrix = |e, p| stored.matrix(e, p);
    let mut out = layer::cpu(&stored.config, &stored.host_router(), batch, &matrix, &x);
    if case.add {
        out.iter_mut().zip(&x).for_each(|(o, x)| *o += x);
    }
    out
}

/// What differs, of a case on rank 0.
fn compare(got: &[f32], want: &[f32], case: &Case) -> std::result::Result<(), String> {
    let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    if let Some(i) = difference(&bits(got), &bits(want)) {
        let d = case.layer.config.hidden as usize;
        let rows = got.chunks(d).zip(want.chunks(d)).enumerate();
        let off: Vec<usize> = rows.filter(|(_, (a, b))| bits(a) != bits(b)).map(|r| r.0).collect();
        let (got, want) = (got.get(i), want.get(i));
        return Err(format!("token {}: got {got:?}, want {want:?}; {off:?} differ", i / d));
    }
    // Logits of random numbers lie far apart: the twin's choices are the device's.
    let twin = twin(case);
    close(got, &twin, 1e-4 * largest(&twin), 1e-3, "the CPU twin")
}

/// Every case in these kinds of kernels. Rank 0 prints a line of each, and their number.
pub fn all(
    world: &World,
    gpu: &Gpu,
    variants: &[Variant],
    naive: bool,
    filter: &[&str],
) -> Result<()> {
    let mut failed = vec![];
    let mut cases = cases::all(world.ranks());
    cases.retain(|case| filter.iter().all(|part| case.name.contains(part)));
    let mut done = 0;
    for &variant in variants {
        let ctx = Context::with_variant(&gpu.device, variant)?;
        for case in &cases {
            let own = parallel(world, gpu, &ctx, case, naive)?;
            let all = gather(world, case, own);
            if let Some(got) = all {
                let outcome = compare(&got, &alone(gpu, &ctx, case)?, case);
                let name = format!("{} ({:?})", case.name, variant.target);
                match outcome {
                    Ok(()) => println!("ok: {name}"),
                    Err(e) => {
                        println!(
                            "FAILED: {name}: {e}, tokens {:?}, experts {:?}",
                            case.tokens, case.experts
                        );
                        failed.push(name);
                    }
                }
                done += 1;
            }
        }
    }
    if world.rank() == 0 {
        println!(
            "{} of {done} cases equal to one device on {} ranks",
            done - failed.len(),
            world.ranks()
        );
    }
    if failed.is_empty() { Ok(()) } else { Err(Error::Mpi(format!("{} cases", failed.len()))) }
}

/// The outputs of all ranks on rank 0.
fn gather(world: &World, case: &Case, own: Vec<f32>) -> Option<Vec<f32>> {
    use wgmoe_mpi::mpi::topology::SimpleCommunicator;
    use wgmoe_mpi::mpi::traits::*;
    let comm = SimpleCommunicator::world();
    if world.rank() > 0 {
        if !own.is_empty() {
            comm.process_at_rank(0).send(&own[..]);
        }
        return None;
    }
    let mut all = own;
    for (r, &tokens) in case.tokens.iter().enumerate().skip(1) {
        if tokens > 0 {
            all.extend(comm.process_at_rank(r as i32).receive_vec::<f32>().0);
        }
    }
    Some(all)
}
