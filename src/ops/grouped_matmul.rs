//! Grouped expert matmuls: each row of a slot times the weights of the slot's expert. The gather of the rows
//! is part of the first one's loads, the activation of its epilogue. Router logits are the same with one dense expert.
//!
//! Three kernels compute it: [`matmul_register`](super::matmul_register) on CPU-type devices,
//! [`matmul_tile`](super::matmul_tile) and [`matmul_skinny`](super::matmul_skinny) on GPUs, by the rows of an item.
use super::{not_zero, or_nothing};
use crate::device::Kernel;
use crate::device::shader::{Binding, Prelude, params, read, read_uniform, write};
use crate::error::{bytes_of, expect_rows};
use crate::routing::Activation;
use crate::weights::{ExpertShape, ExpertWeights, PANEL, Projection, WeightType};
use crate::{Context, Error, PlanShape, Result, Slice, Step, Target};
use std::ops::Range;
use std::sync::Arc;

params! {
    columns: u32, column_begin: u32, column_end: u32, column_base: u32, depth: u32, x_stride: u32, out_stride: u32, first_expert: u32, experts: u32,
    slot_begin: u32, slot_end: u32, x_slot: u32, out_slot: u32, items: u32, items_begin: u32, items_end: u32,
    expert_offsets: u32, token_of: u32, placed: u32, item_groups: u32, item_step: u32,
}

impl Params {
    pub(crate) const FIELDS: &[(&str, u32)] = Self::LAYOUT;
}

/// Bindings that all three kernels share.
pub(crate) const BINDINGS: &[Binding] = &[
    read("x", 4),
    read_uniform("plan", 4),
    read("weights", 4),
    read("weights_up", 4),
    read_uniform("places", 4),
    write("out", 4),
];

/// How weights lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Layout {
    /// As [`weights`](crate::weights) packs them.
    Packed,
    /// Row-major `[out, in]`, rows of whole 16-byte words.
    Rows,
    /// Row-major f32, rows of any length.
    AnyRows,
}

/// Rows per item: which list of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Items of at most [`SKINNY_ROWS`] rows.
    Skinny,
    /// Items of up to [`tile_rows`] rows.
    Tile,
}

/// Most rows of a skinny item.
pub const SKINNY_ROWS: u32 = 8;

/// Most rows of a tile item on this context's device.
pub fn tile_rows(ctx: &Context) -> u32 {
    match ctx.variant().target {
        Target::Cpu => super::matmul_register::TILE_ROWS,
        Target::Gpu => super::matmul_tile::TILE_ROWS,
    }
}

/// What is known of a matmul when its kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Problem {
    /// The activation that joins two matrices; none: one matrix.
    pub(crate) activation: Option<Activation>,
    /// Rows of `x` are tokens of the slots, not slots.
    pub(crate) gather: bool,
    /// One expert for all rows, no plan.
    pub(crate) dense: bool,
    pub(crate) weight_type: WeightType,
    pub(crate) layout: Layout,
    /// Largest of 8, 4, 1 that divides the rows of x and of the weights.
    pub(crate) depth_lanes: u32,
    /// Whether the columns are a multiple of 4, so that four of a row of `out` are one aligned store.
    pub(crate) quad_columns: bool,
    pub(crate) class: Class,
}

impl Problem {
    /// Every combination that some layer uses.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![];
        for depth_lanes in [1, 4, 8] {
            for class in [Class::Skinny, Class::Tile] {
                let quad_columns = depth_lanes != 1;
                for weight_type in [WeightType::F32, WeightType::F16, WeightType::Bf16] {
                    for activation in [None, Some(Activation::Silu), Some(Activation::Gelu)] {
                        // The activation is a piece of its own: once is enough.
                        if activation == Some(Activation::Gelu)
                            && (depth_lanes, weight_type) != (8, WeightType::Bf16)
                        {
                            continue;
                        }
                        all.push(Self {
                            activation,
                            gather: activation.is_some(),
                            dense: false,
                            weight_type,
                            layout: Layout::Packed,
                            depth_lanes,
                            quad_columns,
                            class,
                        });
                    }
                }
                all.push(Self {
                    activation: None,
                    gather: false,
                    dense: true,
                    weight_type: WeightType::F32,
                    layout: if depth_lanes == 1 { Layout::AnyRows } else { Layout::Rows },
                    depth_lanes,
                    quad_columns,
                    class,
                });
            }
        }
        all
    }

    pub(crate) fn label(&self) -> String {
        let rows = if self.class == Class::Skinny { "skinny" } else { "tile" };
        let what = match self.activation {
            None => "plain",
            Some(Activation::Silu) => "silu",
            Some(Activation::Gelu) => "gelu",
        };
        let source = if self.dense { "dense" } else { "grouped" };
        let [weights, layout] = [format!("{:?}", self.weight_type), format!("{:?}", self.layout)];
        let columns = if self.quad_columns { "" } else { " any columns" };
        format!("{rows} {what} {source} {weights} {layout} depth of {}{columns}", self.depth_lanes)
    }

    /// The constants that all three kernels read.
    pub(crate) fn constants(&self, prelude: Prelude) -> Prelude {
        prelude.flag("GATED", self.activation.is_some()).flag("GATHER", self.gather)
    }

    pub(crate) fn tile_piece(&self) -> &'static str {
        if self.dense {
            include_str!("../../shaders/lib/matmul/tile_dense.wgsl")
        } else {
            include_str!("../../shaders/lib/matmul/tile_plan.wgsl")
        }
    }

    pub(crate) fn activation_piece(&self) -> &'static str {
        match self.activation {
            None => include_str!("../../shaders/lib/matmul/activate_none.wgsl"),
            Some(Activation::Silu) => include_str!("../../shaders/lib/matmul/activate_silu.wgsl"),
            Some(Activation::Gelu) => include_str!("../../shaders/lib/matmul/activate_gelu.wgsl"),
        }
    }

    /// Rows of an item of the register kernel.
    pub(crate) fn rows(&self) -> u32 {
        if self.class == Class::Skinny { SKINNY_ROWS } else { super::matmul_register::TILE_ROWS }
    }

    fn kernel(&self, ctx: &Context) -> Result<Arc<Kernel>> {
        match (ctx.variant().target, self.class) {
            (Target::Cpu, _) => {
                let features = super::matmul_register::Features::of(ctx);
                ctx.kernel(
                    &super::matmul_register::SPEC,
                    super::matmul_register::prelude(self, features),
                )
            }
            (Target::Gpu, Class::Skinny) => {
                ctx.kernel(&super::matmul_skinny::SPEC, super::matmul_skinny::prelude(self))
            }
            (Target::Gpu, Class::Tile) => {
                ctx.kernel(&super::matmul_tile::SPEC, super::matmul_tile::prelude(self))
            }
        }
    }

    /// Workgroups for so many items, completing the parameters.
    fn groups(&self, ctx: &Context, params: &mut Params, items: u32) -> u64 {
        let [width, height] = match (ctx.variant().target, self.class) {
            (Target::Cpu, _) => super::matmul_register::group_tile(self),
            (Target::Gpu, Class::Skinny) => [super::matmul_skinny::tile_columns(self), 1],
            (Target::Gpu, Class::Tile) => [super::matmul_tile::tile_columns(self), 1],
        };
        params.item_groups = items.div_ceil(height);
        if ctx.variant().target == Target::Cpu {
            params.item_step = super::matmul_register::item_step(params.item_groups);
        }
        let across = (params.column_end - params.column_begin).div_ceil(width);
        u64::from(across) * u64::from(params.item_groups)
    }
}

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

/// Which of the two expert matmuls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// `h = activate(Wgate x, Wup x)`; rows of `x` are tokens, gathered by the plan.
    GateUp(Activation),
    /// `y = Wdown h`; rows of `h` are slots.
    Down,
}

/// Buffers of one grouped matmul over one page of weights.
#[derive(Clone, Debug)]
pub struct Args<'a> {
    /// [`Stage::GateUp`]: `[tokens, D]` f32, or as much of slots; [`Stage::Down`]: `[rows, F]` f32, slots. Read.
    pub x: Slice<'a>,
    /// [`Stage::GateUp`]: whether the rows of `x` are tokens, to be found by the plan, and not slots from `x_slot` on.
    pub gather: bool,
    /// The plan's shape.
    pub shape: &'a PlanShape,
    /// A plan of the shape, read; in a buffer that is not written.
    pub plan: Slice<'a>,
    /// The weights.
    pub weights: &'a ExpertWeights,
    /// The page, of [`ExpertWeights::page_counts`]'s first (gate and up) or second (down).
    pub page: usize,
    /// `[experts]` u32, shared experts included, read: which expert of `weights` holds each of the plan's, for weights that
    /// hold only some of them; the slots of those past the end are left alone. Expert by expert where absent.
    pub places: Option<Slice<'a>>,
    /// `[rows, columns]` f32, slots from `out_slot` on: items of the page and class are written, other rows left alone.
    pub out: Slice<'a>,
    /// Slots to compute; all: `0..shape.slots()`.
    pub slots: Range<u32>,
    /// Columns of the output that `out` holds; all: `0..F` or `0..D`.
    pub columns: Range<u32>,
    /// Slot of the first row of `x`, where its rows are slots.
    pub x_slot: u32,
    /// Slot of the first row of `out`.
    pub out_slot: u32,
}

/// A grouped expert matmul over one class of a plan's items.
#[derive(Clone, Debug)]
pub struct GroupedMatmul {
    ctx: Context,
    stage: Stage,
    problem: Problem,
    kernel: Arc<Kernel>,
}

impl GroupedMatmul {
    /// Compiles the kernel for experts of this shape.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses the kernel.
    pub fn new(ctx: &Context, shape: &ExpertShape, stage: Stage, class: Class) -> Result<Self> {
        let (activation, projection) = match stage {
            Stage::GateUp(activation) => (Some(activation), Projection::Gate),
            Stage::Down => (None, Projection::Down),
        };
        let [columns, depth] = shape.matrix(projection);
        let problem = Problem {
            activation,
            gather: activation.is_some(),
            dense: false,
            weight_type: shape.weight_type,
            layout: Layout::Packed,
            depth_lanes: depth_lanes(depth),
            quad_columns: columns.is_multiple_of(4),
            class,
        };
        Ok(Self { ctx: ctx.clone(), stage, problem, kernel: problem.kernel(ctx)? })
    }

    /// One dispatch: the page's columns that lie within `args.columns`, for the page's experts.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`], a page that is not there, or a slice that does not fit ([`Error`]).
    pub fn bind(&self, args: Args<'_>) -> Result<Step> {
        let at = args.shape.sections()?;
        let shape = args.weights.shape();
        let (pages, projection) = match self.stage {
            Stage::GateUp(_) => (args.weights.gate_up(), Projection::Gate),
            Stage::Down => (args.weights.down(), Projection::Down),
        };
        let [width, depth] = shape.matrix(projection);
        let page = pages
            .get(args.page)
            .ok_or_else(|| Error::invalid("page", format!("{} of {}", args.page, pages.len())))?;
        let all = args.shape.all_experts();
        match args.places {
            Some(places) => places.expect("places", &[all.into()], 4)?,
            None if shape.experts != all => {
                let reason = format!("{} experts, the plan has {all}", shape.experts);
                return Err(Error::invalid("weights", reason));
            }
            None => {}
        }
        let Range { start, end } = args.columns;
        if start >= end || end > width || start % PANEL != 0 {
            let reason = format!("{start}..{end} of {width}, must start at a multiple of {PANEL}");
            return Err(Error::invalid("columns", reason));
        }
        // What the page and the output have in common, in the page's columns.
        let begin = args.columns.start.max(page.columns.start);
        let end = args.columns.end.min(page.columns.end);
        if begin >= end || args.slots.start >= args.slots.end {
            return Ok(Step::default());
        }
        let out_stride = args.columns.end - args.columns.start;
        let gather = args.gather && self.problem.gather;
        let rows =
            if gather { args.shape.tokens } else { args.slots.end.saturating_sub(args.x_slot) };
        args.plan.expect("plan", &[at.words.into()], 4)?;
        at_least("x", args.x, &[rows.into(), depth.into()])?;
        at_least(
            "out",
            args.out,
            &[args.slots.end.saturating_sub(args.out_slot).into(), out_stride.into()],
        )?;

        // Experts of the plan that the page can hold.
        let experts = if args.places.is_some() { 0..all } else { page.experts.clone() };
        let (items, item_offsets, bound) = match self.problem.class {
            // What an expert has left: at most one item each.
            Class::Skinny => {
                let most = args.shape.skinny()?.min(experts.end - experts.start);
                (at.skinny_items, at.skinny_offsets, most)
            }
            Class::Tile => (at.tile_items, at.tile_offsets, args.shape.tiles()?),
        };
        let mut params = Params {
            columns: page.columns.end - page.columns.start,
            column_begin: begin - page.columns.start,
            column_end: end - page.columns.start,
            column_base: page.columns.start.wrapping_sub(args.columns.start),
            depth,
            x_stride: depth,
            out_stride,
            first_expert: page.experts.start,
            experts: page.experts.end - page.experts.start,
            slot_begin: args.slots.start,
            slot_end: args.slots.end,
            x_slot: args.x_slot,
            out_slot: args.out_slot,
            items,
            items_begin: item_offsets + experts.start,
            items_end: item_offsets + experts.end,
            expert_offsets: at.expert_offsets,
            token_of: if gather { at.token_of } else { 0 },
            placed: args.places.is_some().into(),
            ..Params::default()
        };
        let quad = [
            params.columns,
            params.column_begin,
            params.column_end,
            params.column_base,
            out_stride,
        ]
        .iter()
        .all(|n| n % 4 == 0);
        let kernel = if quad || !self.problem.quad_columns {
            self.kernel.clone()
        } else {
            Problem { quad_columns: false, ..self.problem }.kernel(&self.ctx)?
        };
        let weights = Slice::from(&page.buffer);
        let up = page.up.as_ref().map_or(weights, Slice::from);
        let groups = self.problem.groups(&self.ctx, &mut params, bound);
        let places = or_nothing(&self.ctx, args.places);
        let slices = [args.x, args.plan, weights, up, places, args.out];
        let stage = match self.stage {
            Stage::GateUp(_) => "gate_up",
            Stage::Down => "down",
        };
        Ok(kernel.dispatch(&self.ctx, &params, &slices, groups)?.of_stage(stage).into())
    }
}

/// Checks that a slice holds a shape of f32, and perhaps more.
fn at_least(name: &'static str, slice: Slice<'_>, shape: &[u64]) -> Result<()> {
    let expected = bytes_of(name, shape, 4)?;
    if slice.size >= expected {
        Ok(())
    } else {
        Err(Error::Size { name, expected, got: slice.size })
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

fn depth_lanes(depth: u32) -> u32 {
    [8, 4].into_iter().find(|n| depth.is_multiple_of(*n)).unwrap_or(1)
}

/// Buffers of router logits.
#[derive(Clone, Copy, Debug)]
pub struct LogitsArgs<'a> {
    /// `[tokens, hidden]` f32, read.
    pub x: Slice<'a>,
    /// `[experts, hidden]` f32, row-major, read where it lies.
    pub weights: Slice<'a>,
    /// `[tokens, experts]` f32, written whole.
    pub logits: Slice<'a>,
}

/// Router logits `g = x Wr^T`: the same matmul with one dense expert.
#[derive(Clone, Debug)]
pub struct Logits {
    ctx: Context,
    hidden: u32,
    experts: u32,
    skinny: (Problem, Arc<Kernel>),
    tile: (Problem, Arc<Kernel>),
}

impl Logits {
    /// Compiles the kernel for a router of this shape.
    ///
    /// # Errors
    ///
    /// Zero sizes; [`Error::Device`] where wgpu refuses the kernel.
    pub fn new(ctx: &Context, hidden: u32, experts: u32) -> Result<Self> {
        not_zero(&[("hidden", hidden), ("experts", experts)])?;
        let depth_lanes = depth_lanes(hidden);
        let make = |class| {
            let problem = Problem {
                activation: None,
                gather: false,
                dense: true,
                weight_type: WeightType::F32,
                layout: if depth_lanes == 1 { Layout::AnyRows } else { Layout::Rows },
                depth_lanes,
                quad_columns: experts.is_multiple_of(4),
                class,
            };
            Ok::<_, Error>((problem, problem.kernel(ctx)?))
        };
        Ok(Self {
            ctx: ctx.clone(),
            hidden,
            experts,
            skinny: make(Class::Skinny)?,
            tile: make(Class::Tile)?,
        })
    }

    /// Logits of `tokens` rows; 0 is a no-op.
    ///
    /// # Errors
    ///
    /// A slice that does not fit ([`Error`]).
    pub fn bind(&self, tokens: u32, args: LogitsArgs<'_>) -> Result<Step> {
        self.bind_rows(tokens, 0..tokens, args)
    }

    /// The same for some of the rows, which alone are `args.x`.
    pub(crate) fn bind_rows(
        &self,
        tokens: u32,
        of: Range<u32>,
        args: LogitsArgs<'_>,
    ) -> Result<Step> {
        let rows = of.end - of.start;
        if rows == 0 {
            return Ok(Step::default());
        }
        let (hidden, experts) = (self.hidden, self.experts);
        args.x.expect("x", &[rows.into(), hidden.into()], 4)?;
        args.weights.expect("weights", &[experts.into(), hidden.into()], 4)?;
        args.logits.expect("logits", &[tokens.into(), experts.into()], 4)?;
        let ((problem, kernel), item_rows) = if tokens <= SKINNY_ROWS {
            (&self.skinny, SKINNY_ROWS)
        } else {
            (&self.tile, tile_rows(&self.ctx))
        };
        let mut params = Params {
            columns: experts,
            column_end: experts,
            depth: hidden,
            x_stride: hidden,
            out_stride: experts,
            experts: 1,
            slot_end: rows,
            out_slot: 0u32.wrapping_sub(of.start),
            ..Params::default()
        };
        let groups = problem.groups(&self.ctx, &mut params, rows.div_ceil(item_rows));
        let nothing = self.ctx.nothing();
        let slices = [args.x, nothing, args.weights, args.weights, nothing, args.logits];
        Ok(kernel.dispatch(&self.ctx, &params, &slices, groups)?.of_stage("logits").into())
    }
}

/// The CPU twin of [`Logits`]: `[tokens, experts]`, f64 sums rounded once.
///
/// # Panics
///
/// If `hidden` is 0, or if `x` or `weights` are not whole rows of `hidden`; the message names the
/// argument.
pub fn cpu_logits(x: &[f32], weights: &[f32], hidden: usize) -> Vec<f32> {
    expect_rows("x", x.len(), "hidden", hidden);
    let experts = expect_rows("weights", weights.len(), "hidden", hidden);
    x.chunks_exact(hidden)
        .flat_map(|row| cpu_row(row, &|i| weights[i], experts))
        .map(|g| g as f32)
        .collect()
}
