//! The experts that a rank holds, run on the rows that come from all ranks.
use crate::Result;
use crate::split::{Schedule, Split};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use wgmoe::layer::LayerConfig;
use wgmoe::ops::gather::{self, Gather};
use wgmoe::ops::grouped_matmul::{Args, GroupedMatmul, Rows, Stage};
use wgmoe::plan::HostPlan;
use wgmoe::{BoundOp, Context, ExpertWeights, PlanShape, Slice, wgpu};

/// Buffers of rows between kernels and copies.
pub(crate) fn buffer(ctx: &Context, label: &'static str, bytes: u64) -> Result<wgpu::Buffer> {
    let have = ctx.limits().max_storage_buffer_binding_size.min(ctx.limits().max_buffer_size);
    if bytes > have {
        let limit = "max_storage_buffer_binding_size";
        return Err(wgmoe::Error::Limit { name: label, limit, need: bytes, have }.into());
    }
    Ok(ctx.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size: bytes.max(16),
        usage: wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_SRC
            | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    }))
}

/// Work that was submitted, and whether the device is done with it.
#[derive(Clone, Debug)]
pub(crate) struct Submitted(Arc<AtomicBool>);

impl Submitted {
    /// All work submitted so far.
    pub(crate) fn now(queue: &wgpu::Queue) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let flag = done.clone();
        queue.on_submitted_work_done(move || flag.store(true, Ordering::Release));
        Self(done)
    }

    pub(crate) fn is_done(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The experts of one rank, bound to chunks of rows. Rounds that are under way at the same time have
/// buffers of their own; what lies between kernels is shared, since one queue runs them in turn.
#[derive(Debug)]
pub(crate) struct Owner {
    shape: PlanShape,
    desks: Vec<Desk>,
}

/// Buffers of one round.
#[derive(Debug)]
struct Desk {
    /// Rows as they come: rank after rank.
    x: wgpu::Buffer,
    plan: wgpu::Buffer,
    /// Slot of each row that came.
    slot_of: wgpu::Buffer,
    /// The experts' rows, in the order in which they came.
    y: wgpu::Buffer,
    work: BoundOp,
}

impl Owner {
    pub(crate) fn new(
        ctx: &Context,
        config: &LayerConfig,
        weights: &ExpertWeights,
        [chunk_rows, desks]: [u32; 2],
    ) -> Result<Self> {
        let experts = weights.shape();
        let shape = PlanShape::new(ctx, chunk_rows, experts.experts, chunk_rows);
        let gate_up = GroupedMatmul::new(ctx, &experts, Stage::GateUp(config.activation))?;
        let down = GroupedMatmul::new(ctx, &experts, Stage::Down)?;
        let gather = Gather::new(ctx)?;
        let rows = |width: u32| 4 * u64::from(chunk_rows) * u64::from(width);
        let h = buffer(ctx, "h of a chunk", rows(config.intermediate))?;
        let y_of_slots = buffer(ctx, "y of a chunk", rows(config.hidden))?;
        let desk = || {
            let x = buffer(ctx, "rows of a chunk", rows(config.hidden))?;
            let plan = buffer(ctx, "plan of a chunk", shape.bytes()?)?;
            let slot_of = buffer(ctx, "slots of a chunk", rows(1))?;
            let y = buffer(ctx, "rows to return", rows(config.hidden))?;
            let plan_slice = Slice::new(&plan, 0, shape.bytes()?);
            let args = |x, out, columns| Args {
                x,
                plan: plan_slice,
                weights,
                places: None,
                out,
                slots: 0..chunk_rows,
                columns,
            };
            let first = args(Rows::Tokens((&x).into()), (&h).into(), 0..config.intermediate);
            let rows_of_h = Rows::Slots((&h).into());
            let second = args(rows_of_h, (&y_of_slots).into(), 0..config.hidden);
            let dims =
                gather::Dims { tokens: chunk_rows, slots: chunk_rows, hidden: config.hidden };
            let back = gather::Args {
                x: (&y_of_slots).into(),
                token_of: (&slot_of).into(),
                out: (&y).into(),
            };
            let work = gate_up
                .bind(&shape, first)?
                .then(down.bind(&shape, second)?)
                .then(gather.bind(&dims, back)?);
            Ok::<_, crate::Error>(Desk { x, plan, slot_of, y, work })
        };
        let desks = (0..desks).map(|_| desk()).collect::<Result<_>>()?;
        Ok(Self { shape, desks })
    }

    /// Where the rows of a round go, rank after rank.
    pub(crate) fn rows(&self, round: usize) -> &wgpu::Buffer {
        &self.desks[round % self.desks.len()].x
    }

    /// Where its experts' rows are, in the same order.
    pub(crate) fn results(&self, round: usize) -> &wgpu::Buffer {
        &self.desks[round % self.desks.len()].y
    }

    /// Runs the experts on the rows of a round that have come.
    pub(crate) fn run(
        &self,
        queue: &wgpu::Queue,
        device: &wgpu::Device,
        schedule: &Schedule,
        split: &Split,
        [owner, round]: [usize; 2],
    ) -> Result<Submitted> {
        let desk = &self.desks[round % self.desks.len()];
        let plan = HostPlan::of_rows(&self.shape, &schedule.rows(split, owner, round))?;
        let mut slot_of = vec![u32::MAX; self.shape.tokens as usize];
        for (slot, &row) in (0..).zip(&plan.token_of) {
            slot_of[row as usize] = slot;
        }
        let words = plan.to_words(&self.shape)?;
        queue.write_buffer(&desk.plan, 0, bytemuck::cast_slice(&words));
        queue.write_buffer(&desk.slot_of, 0, bytemuck::cast_slice(&slot_of));
        let mut encoder = device.create_command_encoder(&Default::default());
        desk.work.record(&mut encoder.begin_compute_pass(&Default::default()));
        queue.submit([encoder.finish()]);
        Ok(Submitted::now(queue))
    }
}
