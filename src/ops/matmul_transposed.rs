//! Grouped matmuls by transposed weights: what the backward pass sends back through the experts.
//!
//! | stage | computes | rows of `g` |
//! |---|---|---|
//! | [`Stage::Down`] | `dA[s] = g[token_of[s]] Wdown[e]`, `[slots, F]` | tokens, `[tokens, D]`: the gradient of the layer's output |
//! | [`Stage::GateUp`] | `dX[s] = g[s, ..F] Wgate[e] + g[s, F..] Wup[e]`, `[slots, D]` | slots, `[slots, 2F]`: the gradient of the pre-activation |
//! | [`Dense`] | `g W`, `[tokens, D]` | tokens, `[tokens, E]`: the gradient of router logits |
//!
//! Weights are read where they lie, in every storage type: frozen experts of a few bits are trained
//! through as well as those in f32. A page that holds some of the rows that a sum goes over adds to what
//! the pages before it have left in `out`, in their order.
use super::matmul_kernels::ItemKind;
use super::transposed_kernels::{Params, Problem, is_in_place};
use super::{not_zero, or_nothing};
use crate::device::Kernel;
use crate::error::expect_rows;
use crate::plan::{HostPlan, Sections};
use crate::weights::{ExpertShape, ExpertWeights, Projection, WeightType};
use crate::{BoundOp, Context, Error, FloatType, Floats, PlanShape, Result, Slice};
use std::ops::Range;
use std::sync::Arc;

/// Which of the two matmuls of the experts is gone through backwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// `y = Wdown h`: rows of `g` are tokens, gathered by the plan.
    Down,
    /// Gate and up at once: rows of `g` are slots, the gate's values before those of up.
    GateUp,
}

impl Stage {
    fn projection(self) -> Projection {
        match self {
            Self::Down => Projection::Down,
            Self::GateUp => Projection::Gate,
        }
    }

    fn is_gated(self) -> bool {
        self == Self::GateUp
    }
}

/// Row-major weights where an engine has them: `[experts, out, in]` of each projection, shared experts
/// after the routed ones.
///
/// Rows of f32 may be of any length; those of f16 and bf16 must be whole 16-byte words.
#[derive(Clone, Copy, Debug)]
pub struct RowWeights<'a> {
    /// `[experts, F, D]`.
    pub gate: Floats<'a>,
    /// `[experts, F, D]`, of the type of `gate`.
    pub up: Floats<'a>,
    /// `[experts, D, F]`.
    pub down: Floats<'a>,
}

/// Where the weights are.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// Packed, in pages.
    Packed(&'a ExpertWeights),
    /// Row-major.
    Rows(RowWeights<'a>),
}

/// Buffers of one matmul by transposed weights. All f32 but the weights.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, D]` ([`Stage::Down`]) or `[slots, 2F]` ([`Stage::GateUp`]), read.
    pub g: Slice<'a>,
    /// A plan of the shape, read; in a buffer that is not written.
    pub plan: Slice<'a>,
    /// The weights, read.
    pub weights: Weights<'a>,
    /// `[experts]` u32, shared experts included, read: which expert of `weights` holds each of the
    /// plan's. Slots of experts past the end are left alone. Expert by expert where absent.
    pub places: Option<Slice<'a>>,
    /// `[slots, out_stride]`, written in the first F or D columns: rows of slots without an item are
    /// left alone.
    pub out: Slice<'a>,
    /// Values from row to row of `out`: a multiple of 4 where F or D is one.
    pub out_stride: u32,
}

/// A grouped matmul by transposed weights: every item of a plan, page by page.
#[derive(Clone, Debug)]
pub struct MatmulTransposed {
    ctx: Context,
    stage: Stage,
    shape: ExpertShape,
    /// For each storage type that packed experts have: of skinny items, of tiles.
    kernels: Vec<(Problem, Arc<Kernel>)>,
}

/// Some experts, and some of the rows that the sums go over, in a binding of their own.
struct Part<'a> {
    experts: Range<u32>,
    rows: Range<u32>,
    weight_type: WeightType,
    packed: bool,
    /// The matrix, and up's of the same rows.
    weights: [Slice<'a>; 2],
}

impl MatmulTransposed {
    /// Compiles the kernels for packed experts of this shape. Those for row-major weights are compiled
    /// by the first `bind` of such.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses a kernel.
    pub fn new(ctx: &Context, shape: &ExpertShape, stage: Stage) -> Result<Self> {
        let mut op = Self { ctx: ctx.clone(), stage, shape: *shape, kernels: vec![] };
        for weight_type in shape.types_there(stage.projection()) {
            for kind in [ItemKind::Skinny, ItemKind::Tile] {
                let problem = op.problem(weight_type, true, kind);
                op.kernels.push((problem, problem.kernel(ctx)?));
            }
        }
        Ok(op)
    }

    fn problem(&self, weight_type: WeightType, packed: bool, kind: ItemKind) -> Problem {
        let gated = self.stage.is_gated();
        let matrix = self.shape.matrix(self.stage.projection());
        Problem::new([gated, !gated, false], (weight_type, packed), matrix, kind)
    }

    /// Every item of the plan: a dispatch for each page and kind of item.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`], weights of other experts than the plan's or of another shape than the
    /// op's, or a slice that does not fit ([`Error`]); [`Error::Device`] where wgpu refuses a kernel for
    /// row-major weights.
    pub fn bind(&self, shape: &PlanShape, args: Args<'_>) -> Result<BoundOp> {
        let at = shape.sections()?;
        let parts = self.parts(&args.weights)?;
        self.check(shape, &at, &args)?;
        // As for the other matmuls: few tokens make no tile item.
        let few = shape.tokens <= shape.skinny_rows && shape.tokens < shape.tile_rows;
        let kinds: &[ItemKind] =
            if few { &[ItemKind::Skinny] } else { &[ItemKind::Skinny, ItemKind::Tile] };
        let mut step = BoundOp::default();
        for (index, part) in parts.iter().enumerate() {
            for &kind in kinds {
                let problem = self.problem(part.weight_type, part.packed, kind);
                let made = self.kernels.iter().find(|(p, _)| *p == problem);
                let kernel = match made {
                    Some((_, kernel)) => kernel.clone(),
                    None => problem.kernel(&self.ctx)?,
                };
                let of = (index, parts.len());
                step =
                    step.then(self.bind_part((shape, &at), &args, part, of, problem, &kernel)?);
            }
        }
        Ok(step)
    }

    /// The bindings that hold the weights.
    fn parts<'a>(&self, weights: &Weights<'a>) -> Result<Vec<Part<'a>>> {
        match weights {
            Weights::Packed(weights) => {
                let pages = if self.stage.is_gated() { weights.gate_up() } else { weights.down() };
                let part = |page: &'a crate::weights::Page| {
                    let own = Slice::from(&page.buffer);
                    let up = page.up.as_ref().map_or(own, Slice::from);
                    Part {
                        experts: page.experts.clone(),
                        rows: page.columns.clone(),
                        weight_type: page.weight_type,
                        packed: true,
                        weights: [own, up],
                    }
                };
                if weights.shape() != self.shape {
                    return Err(Error::invalid("weights", "of another shape than the op's"));
                }
                Ok(pages.iter().map(part).collect())
            }
            Weights::Rows(rows) => self.parts_of_rows(rows),
        }
    }

    /// Row-major weights, cut between experts where a binding does not hold them all.
    fn parts_of_rows<'a>(&self, weights: &RowWeights<'a>) -> Result<Vec<Part<'a>>> {
        let [rows, columns] = self.shape.matrix(self.stage.projection());
        let both = match self.stage {
            Stage::Down => [weights.down; 2],
            Stage::GateUp => [weights.gate, weights.up],
        };
        let float_type = both[0].float_type;
        let weight_type = match float_type {
            FloatType::F32 => WeightType::F32,
            FloatType::F16 => WeightType::F16,
            FloatType::Bf16 => WeightType::Bf16,
        };
        if both[1].float_type != float_type {
            return Err(Error::invalid("weights", "gate and up are of two types"));
        }
        if !is_in_place(weight_type, columns) {
            let name = float_type.name();
            let reason = format!("rows of {columns} {name} are no whole 16-byte words");
            return Err(Error::invalid("weights", reason));
        }
        let experts = self.shape.experts;
        let matrix = u64::from(rows) * u64::from(columns) * float_type.bytes();
        for floats in both {
            floats.holds("weights", u64::from(experts) * u64::from(rows), columns.into())?;
        }
        let most = self.ctx.max_binding() / matrix;
        let alignment = u64::from(self.ctx.limits().min_storage_buffer_offset_alignment);
        // Experts whose first bytes are where bindings may begin.
        let each = (1..=alignment).find(|n| (n * matrix).is_multiple_of(alignment)).unwrap_or(1);
        let step = if most >= experts.into() { experts.into() } else { most / each * each };
        let step = u32::try_from(step).unwrap_or(experts);
        if step == 0 {
            let (name, limit) = ("weights", "max_storage_buffer_binding_size");
            let have = self.ctx.max_binding();
            return Err(Error::Limit { name, limit, need: each * matrix, have });
        }
        let part = |first: u32| {
            let experts = first..experts.min(first.saturating_add(step));
            let size = u64::from(experts.end - experts.start) * matrix;
            let weights = both.map(|f| Slice {
                offset: f.slice.offset + u64::from(first) * matrix,
                size,
                ..f.slice
            });
            Part { experts, rows: 0..rows, weight_type, packed: false, weights }
        };
        Ok((0..experts).step_by(step as usize).map(part).collect())
    }

    /// The caller's arguments.
    fn check(&self, shape: &PlanShape, at: &Sections, args: &Args<'_>) -> Result<()> {
        let [rows, columns] = self.shape.matrix(self.stage.projection());
        let all = shape.all_experts();
        let problems =
            [ItemKind::Skinny, ItemKind::Tile].map(|k| self.problem(WeightType::F32, true, k));
        for (name, rows, problem) in [
            ("skinny_rows", shape.skinny_rows, problems[0]),
            ("tile_rows", shape.tile_rows, problems[1]),
        ] {
            let most = problem.item_rows(&self.ctx);
            if rows > most {
                let reason = format!("{rows}, the kernels of this device take at most {most}");
                return Err(Error::invalid(name, reason));
            }
        }
        let rows_are = match self.stage {
            Stage::GateUp => "intermediate",
            Stage::Down => "hidden",
        };
        problems.iter().try_for_each(|p| p.check_loops(&self.ctx, rows_are, rows))?;
        match args.places {
            Some(places) => places.u32s("places", &[all.into()])?,
            None if self.shape.experts != all => {
                let reason = format!("{} experts, the plan has {all}", self.shape.experts);
                return Err(Error::invalid("weights", reason));
            }
            None => {}
        }
        args.plan.u32s("plan", &[at.words.into()])?;
        let slots = u64::from(shape.slots()?);
        match self.stage {
            Stage::Down => args.g.f32s("g", &[shape.tokens.into(), rows.into()])?,
            Stage::GateUp => args.g.f32s("g", &[slots, 2 * u64::from(rows)])?,
        }
        let stride = args.out_stride;
        if stride < columns || (columns.is_multiple_of(4) && !stride.is_multiple_of(4)) {
            let reason = format!("{stride} for {columns} columns");
            return Err(Error::invalid("out_stride", reason));
        }
        args.out.f32s("out", &[slots, stride.into()])
    }

    /// The experts of one binding, the items of one kind.
    fn bind_part(
        &self,
        (shape, at): (&PlanShape, &Sections),
        args: &Args<'_>,
        part: &Part<'_>,
        (index, parts): (usize, usize),
        problem: Problem,
        kernel: &Arc<Kernel>,
    ) -> Result<BoundOp> {
        let [rows, columns] = self.shape.matrix(self.stage.projection());
        // Experts of the plan that the page can hold.
        let all = 0..shape.all_experts();
        let experts = if args.places.is_some() { all } else { part.experts.clone() };
        let (items, item_offsets, item_rows, bound) = match problem.kind {
            ItemKind::Skinny => {
                let most = shape.skinny()?.min(experts.end - experts.start);
                (at.skinny_items, at.skinny_offsets, shape.skinny_rows, most)
            }
            _ => (at.tile_items, at.tile_offsets, shape.tile_rows, shape.tiles()?),
        };
        let mut params = Params {
            rows: part.rows.end - part.rows.start,
            first_row: part.rows.start,
            depth: part.rows.end,
            columns,
            x_stride: if problem.gated { 2 * rows } else { rows },
            out_stride: args.out_stride,
            first_expert: part.experts.start,
            experts: part.experts.end - part.experts.start,
            items,
            items_begin: item_offsets + experts.start,
            items_end: item_offsets + experts.end,
            item_rows,
            expert_offsets: at.expert_offsets,
            token_of: at.token_of,
            placed: args.places.is_some().into(),
            add: (part.rows.start > 0).into(),
            ..Params::default()
        };
        let groups = problem.groups(&self.ctx, &mut params, bound);
        let places = or_nothing(&self.ctx, args.places);
        let [weights, up] = part.weights;
        let slices = [args.g, args.plan, weights, up, places, args.out];
        let stage = match self.stage {
            Stage::Down => "down",
            Stage::GateUp => "gate_up",
        };
        let dispatch = kernel.dispatch(&self.ctx, &params, &slices, groups)?;
        Ok(dispatch.of_stage(stage).of_page(problem.kind.name(), index, parts).into())
    }
}

/// Buffers of one dense product.
#[derive(Clone, Copy, Debug)]
pub struct DenseArgs<'a> {
    /// `[tokens, rows]` f32, read.
    pub g: Slice<'a>,
    /// `[rows, columns]` f32, row-major, read where it lies.
    pub weights: Slice<'a>,
    /// `[tokens, columns]` f32, written whole, or added to.
    pub out: Slice<'a>,
    /// Whether `out` is added to.
    pub add: bool,
}

/// `g W` of one matrix for all rows: what router logits send back to the hidden states.
#[derive(Clone, Debug)]
pub struct Dense {
    ctx: Context,
    matrix: [u32; 2],
    problem: Problem,
    kernel: Arc<Kernel>,
}

impl Dense {
    /// Compiles the kernel for a matrix of `rows` by `columns`: a router's experts by D.
    ///
    /// # Errors
    ///
    /// Zero sizes; [`Error::Device`] where wgpu refuses the kernel.
    pub fn new(ctx: &Context, rows: u32, columns: u32) -> Result<Self> {
        not_zero(&[("rows", rows), ("columns", columns)])?;
        let matrix = [rows, columns];
        let weights = (WeightType::F32, false);
        let problem = Problem::new([false, false, true], weights, matrix, ItemKind::Tile);
        Ok(Self { ctx: ctx.clone(), matrix, problem, kernel: problem.kernel(ctx)? })
    }

    /// Products of `tokens` rows; 0 is a no-op.
    ///
    /// # Errors
    ///
    /// A slice that does not fit ([`Error`]).
    pub fn bind(&self, tokens: u32, args: DenseArgs<'_>) -> Result<BoundOp> {
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        let [rows, columns] = self.matrix;
        self.problem.check_loops(&self.ctx, "rows", rows)?;
        args.g.f32s("g", &[tokens.into(), rows.into()])?;
        args.weights.f32s("weights", &[rows.into(), columns.into()])?;
        args.out.f32s("out", &[tokens.into(), columns.into()])?;
        let item_rows = self.problem.item_rows(&self.ctx);
        let mut params = Params {
            rows,
            depth: rows,
            columns,
            x_stride: rows,
            out_stride: columns,
            experts: 1,
            slots: tokens,
            item_rows,
            add: args.add.into(),
            ..Params::default()
        };
        let groups = self.problem.groups(&self.ctx, &mut params, tokens.div_ceil(item_rows));
        let nothing = self.ctx.nothing();
        let slices = [args.g, nothing, args.weights, args.weights, nothing, args.out];
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, groups)?.of_stage("dense").into())
    }
}

/// The CPU twin of one row: `[columns]` from `g [rows]` and weights `[rows, columns]` as a function of
/// the index, in f64.
pub fn cpu_row(g: &[f32], weights: &dyn Fn(usize) -> f32, columns: usize) -> Vec<f64> {
    let sum = |k: usize| {
        let products = g.iter().enumerate();
        products.map(|(n, &g)| f64::from(g) * f64::from(weights(n * columns + k))).sum()
    };
    (0..columns).map(sum).collect()
}

/// The CPU twin: rows of a plan's slots, sums in f64 rounded once. `weights` are the matrices of each
/// expert, `[rows, columns]`: down ([`Stage::Down`]), or gate and up.
///
/// # Panics
///
/// If `columns` is 0, or if `g` is not whole rows of what the weights have.
pub fn cpu(
    plan: &HostPlan,
    stage: Stage,
    g: &[f32],
    weights: &[Vec<&[f32]>],
    columns: usize,
) -> Vec<f32> {
    let mut out = vec![];
    for (e, of_expert) in weights.iter().enumerate() {
        let rows = expect_rows("weights", of_expert[0].len(), "columns", columns);
        let width = rows * of_expert.len();
        expect_rows("g", g.len(), "rows", width);
        for s in plan.expert_offsets[e]..plan.expert_offsets[e + 1] {
            let row = match stage {
                Stage::Down => plan.token_of[s as usize] as usize,
                Stage::GateUp => s as usize,
            };
            let parts = g[row * width..][..width].chunks_exact(rows).zip(of_expert);
            let sums = parts.map(|(g, w)| cpu_row(g, &|i| w[i], columns));
            let sum = sums.reduce(|a, b| a.iter().zip(b).map(|(a, b)| a + b).collect());
            out.extend(sum.unwrap_or_default().into_iter().map(|v| v as f32));
        }
    }
    out
}
