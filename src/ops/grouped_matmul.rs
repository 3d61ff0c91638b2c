//! Grouped expert matmuls: each row of a slot times the weights of the slot's expert. The gather of the rows
//! is part of the first one's loads, the activation of its epilogue. Router logits are the same with one dense expert.
//!
//! The kernels that compute it are rows of a table, in `matmul_kernels.rs`: which one runs goes by the
//! device and by the rows of an item.
pub use super::matmul_kernels::{SKINNY_ROWS, tile_rows};

use super::matmul_kernels::{ItemKind, Params, SMALL_ROWS, Specialization};
use super::or_nothing;
use crate::device::Kernel;
use crate::plan::Sections;
use crate::routing::Activation;
use crate::weights::{ExpertShape, ExpertWeights, PANEL, Page, Projection};
use crate::{BoundOp, Context, Error, FloatType, Floats, PlanShape, Result, Slice};
use std::ops::Range;
use std::sync::Arc;

/// The activation joining the two products of a row, in f64.
pub fn activate(activation: Activation, gate: f64, up: f64) -> f64 {
    up * match activation {
        Activation::Silu => gate / (1.0 + (-gate).exp()),
        Activation::Gelu => {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
            0.5 * gate * (1.0 + z.tanh())
        }
    }
}

/// The CPU twin of one row: `[N]` from `x [K]` and weights `[N, K]` as a function of the index, in
/// f64.
pub fn cpu_row(x: &[f32], weights: &dyn Fn(usize) -> f32, columns: usize) -> Vec<f64> {
    let depth = x.len();
    (0..columns)
        .map(|n| {
            x.iter()
                .enumerate()
                .map(|(k, &v)| f64::from(v) * f64::from(weights(n * depth + k)))
                .sum()
        })
        .collect()
}

/// Which of the two expert matmuls, or which half of the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// `h = activate(Wgate x, Wup x)`; rows of `x` are tokens, gathered by the plan.
    GateUp(Activation),
    /// `y = Wdown h`; rows of `h` are slots.
    Down,
    /// The gate's half of the pre-activation that training keeps, `z[s, ..F] = Wgate x`: `out` is `z`
    /// whole, `[slots, 2F]`. Rows of `x` as for [`Stage::GateUp`].
    Gate,
    /// Its other half, `z[s, F..] = Wup x`.
    Up,
}

impl Stage {
    /// The projection; of gate and up, which are of one shape, the first.
    fn projection(self) -> Projection {
        match self {
            Self::GateUp(_) | Self::Gate | Self::Up => Projection::Gate,
            Self::Down => Projection::Down,
        }
    }

    /// Whether it makes one half of `z`.
    fn is_half(self) -> bool {
        matches!(self, Self::Gate | Self::Up)
    }
}

/// Rows of slots: `[slots, width]`, from a slot on.
#[derive(Clone, Copy, Debug)]
pub struct SlotRows<'a> {
    /// The rows, of whole 32-bit words.
    pub rows: Floats<'a>,
    /// Slot of the first row.
    pub first: u32,
}

/// All slots.
impl<'a, T: Into<Floats<'a>>> From<T> for SlotRows<'a> {
    fn from(rows: T) -> Self {
        Self { rows: rows.into(), first: 0 }
    }
}

/// Where a matmul's input rows are.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// `[tokens, depth]`, rows of whole 32-bit words: the plan says which row a slot takes.
    Tokens(Floats<'a>),
    /// A row a slot.
    Slots(SlotRows<'a>),
}

impl<'a> Rows<'a> {
    fn floats(self) -> Floats<'a> {
        match self {
            Self::Tokens(x) => x,
            Self::Slots(x) => x.rows,
        }
    }
}

/// Buffers of one grouped matmul.
#[derive(Clone, Debug)]
pub struct Args<'a> {
    /// Rows of D values ([`Stage::GateUp`]) or of F f32 of slots ([`Stage::Down`]), read.
    pub x: Rows<'a>,
    /// A plan of the shape, read; in a buffer that is not written.
    pub plan: Slice<'a>,
    /// The weights.
    pub weights: &'a ExpertWeights,
    /// `[experts]` u32, shared experts included, read: which expert of `weights` holds each of the
    /// plan's, for weights that hold only some of them. Slots of experts past the end are left alone.
    /// Expert by expert where absent.
    pub places: Option<Slice<'a>>,
    /// `[slots, columns]` f32, written: rows of slots without an item are left alone.
    pub out: SlotRows<'a>,
    /// Slots to compute; all: `0..shape.slots()`.
    pub slots: Range<u32>,
    /// Columns of the output that `out` holds, from a multiple of 32 on; all: `0..F` or `0..D`, as it
    /// must be for a half of `z`.
    pub columns: Range<u32>,
}

/// A grouped expert matmul: every item of a plan times the weights of its expert, page by page.
#[derive(Clone, Debug)]
pub struct GroupedMatmul {
    ctx: Context,
    stage: Stage,
    /// For each storage type that experts have: one of each kind of item.
    kernels: Vec<(Specialization, Arc<Kernel>)>,
}

/// What one page contributes to a matmul.
struct PageOf<'a> {
    at: &'a Sections,
    index: usize,
    pages: usize,
    page: &'a Page,
}

/// Most rows of an expert's last item that are summed up in the order of skinny items, on this context's device and in
/// plans of this shape. What has more rows, and every whole tile, is summed up in that of tiles: a row's bits hang
/// on nothing else. 0 where the shape has no skinny items: then all rows are in tiles.
pub fn few_rows(ctx: &Context, shape: &PlanShape) -> u32 {
    let small = ItemKind::all(ctx, false).any(|kind| kind == ItemKind::Small);
    let most = SMALL_ROWS.min(shape.tile_rows.saturating_sub(1));
    if small && shape.skinny_rows > 0 { most.max(shape.skinny_rows) } else { shape.skinny_rows }
}

impl GroupedMatmul {
    /// Compiles the kernels for experts of this shape, one for each kind of item.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses a kernel.
    pub fn new(ctx: &Context, shape: &ExpertShape, stage: Stage) -> Result<Self> {
        let projection = stage.projection();
        let matrix = shape.matrix(projection);
        let make = |weight_type, kind| {
            let problem = Specialization::of_experts(stage, weight_type, matrix, kind);
            Ok::<_, Error>((problem, problem.kernel(ctx)?))
        };
        let mut kernels = vec![];
        for weight_type in shape.types_there(projection) {
            for kind in ItemKind::all(ctx, false) {
                kernels.push(make(weight_type, kind)?);
            }
        }
        Ok(Self { ctx: ctx.clone(), stage, kernels })
    }

    /// Every item of the plan: a dispatch for each page and kind of item.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`], weights of other experts than the plan's, columns outside the
    /// matrix, or a slice that does not fit ([`Error`]); [`Error::Device`] where wgpu refuses a kernel
    /// for f16 or bf16, which the first `bind` of such rows compiles.
    pub fn bind(&self, shape: &PlanShape, args: Args<'_>) -> Result<BoundOp> {
        let at = shape.sections()?;
        self.check(shape, &at, &args)?;
        let pages = match self.stage {
            Stage::Down => args.weights.down(),
            _ => args.weights.gate_up(),
        };
        // Few tokens make no tile item: an expert's rows are a rest, and that is a skinny one, or a
        // small one.
        let few = shape.tokens <= shape.skinny_rows && shape.tokens < shape.tile_rows;
        let is_there = |kind| match kind {
            ItemKind::Skinny => true,
            ItemKind::Small => !few && self.small_rows(shape) > 0,
            ItemKind::Tile => !few && shape.tokens > self.small_rows(shape),
        };
        let x_type = args.x.floats().float_type;
        if x_type != FloatType::F32 {
            // All kinds at once, so that no later batch waits for a compiler.
            for (problem, _) in &self.kernels {
                problem.with_x_type(x_type).kernel(&self.ctx)?;
            }
        }
        let mut step = BoundOp::default();
        for (index, page) in pages.iter().enumerate() {
            let of = PageOf { at: &at, index, pages: pages.len(), page };
            let mut kernels =
                self.kernels.iter().filter(|(p, _)| p.weight_type == page.weight_type).peekable();
            if kernels.peek().is_none() {
                let name = page.weight_type.name();
                let reason = format!("{name}, the op was made for other storage types");
                return Err(Error::invalid("weights", reason));
            }
            for kernel in kernels.filter(|(problem, _)| is_there(problem.kind)) {
                step = step.then(self.bind_page(shape, &args, &of, kernel)?);
            }
        }
        Ok(step)
    }

    /// Most rows of a small item of a plan of this shape; 0 where there are none.
    fn small_rows(&self, shape: &PlanShape) -> u32 {
        let few = few_rows(&self.ctx, shape);
        if few > shape.skinny_rows { few } else { 0 }
    }

    /// The caller's arguments, before anything is made of them.
    fn check(&self, shape: &PlanShape, at: &Sections, args: &Args<'_>) -> Result<()> {
        let experts = args.weights.shape();
        let [width, depth] = experts.matrix(self.stage.projection());
        let all = shape.all_experts();
        // Rows past those of a kernel's item would be left out.
        for (name, rows, most) in [
            ("tile_rows", shape.tile_rows, tile_rows(&self.ctx)),
            ("skinny_rows", shape.skinny_rows, SKINNY_ROWS),
        ] {
            if rows > most {
                let reason = format!("{rows}, the kernels of this device take at most {most}");
                return Err(Error::invalid(name, reason));
            }
        }
        let depth_is = match self.stage {
            Stage::Down => "intermediate",
            _ => "hidden",
        };
        for (problem, _) in &self.kernels {
            problem.check_loops(&self.ctx, depth_is, depth)?;
        }
        match args.places {
            Some(places) => places.u32s("places", &[all.into()])?,
            None if experts.experts != all => {
                let reason = format!("{} experts, the plan has {all}", experts.experts);
                return Err(Error::invalid("weights", reason));
            }
            None => {}
        }
        let Range { start, end } = args.columns;
        if start >= end || end > width || start % PANEL != 0 {
            let reason = format!("{start}..{end} of {width}, must start at a multiple of {PANEL}");
            return Err(Error::invalid("columns", reason));
        }
        let half = self.stage.is_half();
        if half && args.columns != (0..width) {
            return Err(Error::invalid("columns", format!("{start}..{end}, must be all {width}")));
        }
        args.plan.u32s("plan", &[at.words.into()])?;
        let slots = |rows: SlotRows<'_>| u64::from(args.slots.end.saturating_sub(rows.first));
        match args.x {
            Rows::Tokens(x) => x.holds_at_least("x", shape.tokens.into(), depth.into())?,
            Rows::Slots(x) => x.rows.holds_at_least("x", slots(x), depth.into())?,
        }
        // What lies between the matmuls is f32.
        let down = self.stage == Stage::Down;
        for (name, rows, f32s) in [("x", args.x.floats(), down), ("out", args.out.rows, true)] {
            if f32s && rows.float_type != FloatType::F32 {
                let reason = format!("{}, must be f32", rows.float_type.name());
                return Err(Error::invalid(name, reason));
            }
        }
        let halves = if half { 2 } else { 1 };
        args.out.rows.holds_at_least("out", slots(args.out), halves * u64::from(end - start))
    }

    /// The columns of a page that lie within `args.columns`, for the page's experts and the items of
    /// one kind.
    fn bind_page(
        &self,
        shape: &PlanShape,
        args: &Args<'_>,
        of: &PageOf<'_>,
        made: &(Specialization, Arc<Kernel>),
    ) -> Result<BoundOp> {
        let problem = made.0.with_x_type(args.x.floats().float_type);
        let PageOf { at, page, .. } = *of;
        // What the page and the output have in common.
        let begin = args.columns.start.max(page.columns.start);
        let end = args.columns.end.min(page.columns.end);
        if begin >= end || args.slots.start >= args.slots.end {
            return Ok(BoundOp::default());
        }
        let width = args.columns.end - args.columns.start;
        let out_stride = if self.stage.is_half() { 2 * width } else { width };
        let first_column = if self.stage == Stage::Up { width } else { 0 };
        let [_, depth] = args.weights.shape().matrix(self.stage.projection());
        // Experts of the plan that the page can hold.
        let all = 0..shape.all_experts();
        let experts = if args.places.is_some() { all } else { page.experts.clone() };
        let small_rows = self.small_rows(shape);
        let of_tiles = (at.tile_items, at.tile_offsets);
        let ((items, item_offsets), item_rows, bounds) = match problem.kind {
            // What an expert has left: at most one item each.
            ItemKind::Skinny => {
                let most = shape.skinny()?.min(experts.end - experts.start);
                ((at.skinny_items, at.skinny_offsets), shape.skinny_rows, 0..most)
            }
            // The last item of each expert, in as many parts as it may have.
            ItemKind::Small => {
                let parts = small_rows.div_ceil(problem.item_rows(&self.ctx));
                let most = parts.checked_mul(experts.end - experts.start);
                (of_tiles, parts, 0..most.ok_or_else(|| Error::invalid("experts", "too many"))?)
            }
            ItemKind::Tile => (of_tiles, shape.tile_rows, shape.tiles_of(args.slots.clone())?),
        };
        let (x, x_slot, token_of) = match args.x {
            // Kernels without a gather read a row a slot.
            Rows::Tokens(x) => (x, 0, at.token_of),
            Rows::Slots(x) => (x.rows, x.first, 0),
        };
        let mut params = Params {
            columns: page.columns.end - page.columns.start,
            column_begin: begin - page.columns.start,
            column_end: end - page.columns.start,
            column_base: (page.columns.start + first_column).wrapping_sub(args.columns.start),
            depth,
            x_stride: depth,
            out_stride,
            first_expert: page.experts.start,
            experts: page.experts.end - page.experts.start,
            slot_begin: args.slots.start,
            slot_end: args.slots.end,
            x_slot,
            out_slot: args.out.first,
            items,
            items_begin: item_offsets + experts.start,
            items_end: item_offsets + experts.end,
            least_item: bounds.start,
            item_rows,
            small_rows: if problem.kind == ItemKind::Skinny { 0 } else { small_rows },
            expert_offsets: at.expert_offsets,
            token_of,
            placed: args.places.is_some().into(),
            ..Params::default()
        };
        let Params { columns, column_begin, column_end, column_base, .. } = params;
        let ends = [columns, column_begin, column_end, column_base, out_stride];
        let quad_columns = problem.quad_columns && ends.iter().all(|n| n % 4 == 0);
        let kernel = Specialization { quad_columns, ..problem }.kernel_or(&self.ctx, made)?;
        let own = Slice::from(&page.buffer);
        let up = page.up.as_ref().map_or(own, Slice::from);
        let weights = if self.stage == Stage::Up { up } else { own };
        let groups = problem.groups(&self.ctx, &mut params, bounds.end - bounds.start);
        let places = or_nothing(&self.ctx, args.places);
        let slices = [x.slice, args.plan, weights, up, places, args.out.rows.slice];
        let stage = match self.stage {
            Stage::GateUp(_) => "gate_up",
            Stage::Down => "down",
            Stage::Gate => "gate",
            Stage::Up => "up",
        };
        let dispatch = kernel.dispatch(&self.ctx, &params, &slices, groups)?;
        Ok(dispatch.of_stage(stage).of_page(problem.kind.name(), of.index, of.pages).into())
    }
}

/// The CPU twin of one expert on one row: `y = Wdown activate(Wgate x, Wup x)`, each product in f64 rounded once.
/// `gate` and `up` are `[F, D]`, `down` `[D, F]`, as functions of the index.
pub fn cpu_expert(
    x: &[f32],
    intermediate: usize,
    activation: Activation,
    [gate, up, down]: [&dyn Fn(usize) -> f32; 3],
) -> Vec<f32> {
    let gate = cpu_row(x, gate, intermediate);
    let up = cpu_row(x, up, intermediate);
    let h: Vec<f32> =
        gate.iter().zip(&up).map(|(&g, &u)| activate(activation, g, u) as f32).collect();
    cpu_row(&h, down, x.len()).into_iter().map(|y| y as f32).collect()
}
