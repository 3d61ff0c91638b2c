//! Grouped expert matmuls: each row of a slot times the weights of the slot's expert (METHODS 5). The gather of the rows
//! is part of the first one's loads, the activation of its epilogue. Router logits are the same with one dense expert.
//!
//! Three kernels compute it: [`matmul_register`](super::matmul_register) on CPU-type devices,
//! [`matmul_tile`](super::matmul_tile) and [`matmul_skinny`](super::matmul_skinny) on GPUs, by the rows of an item.
use super::not_zero;
use crate::kernel::{Binding, Kernel, Prelude, params, read, read_uniform, write};
use crate::plan::Sections;
use crate::routing::Activation;
use crate::slice::bytes_of;
use crate::weights::{Page, WeightType};
use crate::{Context, Error, PlanShape, Result, Slice, Step, Target};
use std::ops::Range;
use std::sync::Arc;

params! {
    columns: u32, column_base: u32, depth: u32, x_stride: u32, out_stride: u32, first_expert: u32, experts: u32,
    slot_begin: u32, slot_end: u32, x_slot: u32, out_slot: u32, items: u32, item_offsets: u32, expert_offsets: u32,
    token_of: u32,
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
                ctx.kernel(&super::matmul_register::SPEC, super::matmul_register::prelude(self, features))
            }
            (Target::Gpu, Class::Skinny) => {
                ctx.kernel(&super::matmul_skinny::SPEC, super::matmul_skinny::prelude(self))
            }
            (Target::Gpu, Class::Tile) => {
                ctx.kernel(&super::matmul_tile::SPEC, super::matmul_tile::prelude(self))
            }
        }
    }

    fn tile_columns(&self, ctx: &Context) -> u32 {
        match (ctx.variant().target, self.class) {
            (Target::Cpu, _) => super::matmul_register::tile_columns(self),
            (Target::Gpu, Class::Skinny) => super::matmul_skinny::tile_columns(self),
            (Target::Gpu, Class::Tile) => super::matmul_tile::tile_columns(self),
        }
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

/// The CPU twin of one row: `[N]` from `x [K]` and weights `[N, K]`, f64 sums rounded once.
///
/// # Panics
///
/// If the lengths do not fit together.
pub fn cpu_row(x: &[f32], weights: &dyn Fn(usize) -> f32, columns: usize) -> Vec<f64> {
    let depth = x.len();
    (0..columns)
        .map(|n| x.iter().enumerate().map(|(k, &v)| f64::from(v) * f64::from(weights(n * depth + k))).sum())
        .collect()
}

/// Where the items of a grouped matmul come from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Items<'a> {
    pub(crate) shape: &'a PlanShape,
    pub(crate) plan: Slice<'a>,
}

/// Buffers of one grouped matmul over one page.
#[derive(Clone, Debug)]
pub(crate) struct Args<'a> {
    pub(crate) x: Slice<'a>,
    pub(crate) items: Items<'a>,
    pub(crate) page: &'a Page,
    pub(crate) out: Slice<'a>,
    /// Slots to compute, and what slot the first rows of `x` (without gather) and `out` hold.
    pub(crate) slots: Range<u32>,
    pub(crate) x_slot: u32,
    pub(crate) out_slot: u32,
    /// Values from row to row of `out`, and the page's columns that go there, from `out`'s column 0 on.
    pub(crate) out_stride: u32,
    pub(crate) column_base: u32,
}

/// A grouped matmul of one class of items.
#[derive(Clone, Debug)]
pub(crate) struct GroupedMatmul {
    ctx: Context,
    problem: Problem,
    depth: u32,
    kernel: Arc<Kernel>,
}

impl GroupedMatmul {
    pub(crate) fn new(
        ctx: &Context,
        activation: Option<Activation>,
        [columns, depth]: [u32; 2],
        weight_type: WeightType,
        class: Class,
    ) -> Result<Self> {
        let problem = Problem {
            activation,
            gather: activation.is_some(),
            dense: false,
            weight_type,
            layout: Layout::Packed,
            depth_lanes: depth_lanes(depth),
            quad_columns: columns % 4 == 0,
            class,
        };
        Ok(Self { ctx: ctx.clone(), problem, depth, kernel: problem.kernel(ctx)? })
    }

    /// One dispatch.
    pub(crate) fn bind(&self, args: Args<'_>) -> Result<Step> {
        let at: Sections = args.items.shape.sections()?;
        let page = args.page;
        let columns = page.columns.end - page.columns.start;
        let (items, item_offsets, bound) = match self.problem.class {
            Class::Skinny => (at.skinny_items, at.skinny_offsets, args.items.shape.skinny()?),
            Class::Tile => (at.tile_items, at.tile_offsets, args.items.shape.tiles()?),
        };
        let experts = page.experts.end - page.experts.start;
        // A skinny item is what an expert has left: at most one each.
        let bound = if self.problem.class == Class::Skinny { bound.min(experts) } else { bound };
        let params = Params {
            columns,
            column_base: args.column_base,
            depth: self.depth,
            x_stride: self.depth,
            out_stride: args.out_stride,
            first_expert: page.experts.start,
            experts,
            slot_begin: args.slots.start,
            slot_end: args.slots.end,
            x_slot: args.x_slot,
            out_slot: args.out_slot,
            items,
            item_offsets,
            expert_offsets: at.expert_offsets,
            token_of: at.token_of,
        };
        let weights = Slice::from(&page.buffer);
        let up = page.up.as_ref().map_or(weights, Slice::from);
        let groups = u64::from(bound) * u64::from(columns.div_ceil(self.problem.tile_columns(&self.ctx)));
        let slices = [args.x, args.items.plan, weights, up, args.out];
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, groups)?.into())
    }
}

fn depth_lanes(depth: u32) -> u32 {
    [8, 4].into_iter().find(|n| depth % n == 0).unwrap_or(1)
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

/// Router logits `g = x Wr^T` (METHODS 1): the same matmul with one dense expert.
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
                quad_columns: experts % 4 == 0,
                class,
            };
            Ok::<_, Error>((problem, problem.kernel(ctx)?))
        };
        Ok(Self { ctx: ctx.clone(), hidden, experts, skinny: make(Class::Skinny)?, tile: make(Class::Tile)? })
    }

    /// Logits of `tokens` rows; 0 is a no-op.
    ///
    /// # Errors
    ///
    /// A slice that does not fit ([`Error`]).
    pub fn bind(&self, tokens: u32, args: LogitsArgs<'_>) -> Result<Step> {
        if tokens == 0 {
            return Ok(Step::default());
        }
        let (hidden, experts) = (self.hidden, self.experts);
        args.x.expect("x", &[tokens.into(), hidden.into()], 4)?;
        args.weights.expect("weights", &[experts.into(), hidden.into()], 4)?;
        args.logits.expect("logits", &[tokens.into(), experts.into()], 4)?;
        let ((problem, kernel), rows) =
            if tokens <= SKINNY_ROWS { (&self.skinny, SKINNY_ROWS) } else { (&self.tile, tile_rows(&self.ctx)) };
        let params = Params {
            columns: experts,
            depth: hidden,
            x_stride: hidden,
            out_stride: experts,
            experts: 1,
            slot_end: tokens,
            ..Params::default()
        };
        let columns = u64::from(experts.div_ceil(problem.tile_columns(&self.ctx)));
        let groups = columns * u64::from(tokens.div_ceil(rows));
        let slices = [args.x, self.ctx.nothing(), args.weights, args.weights, args.logits];
        Ok(kernel.dispatch(&self.ctx, &params, &slices, groups)?.into())
    }
}

/// The CPU twin of [`Logits`]: `[tokens, experts]`, f64 sums rounded once.
///
/// # Panics
///
/// If the lengths do not fit together.
pub fn cpu_logits(x: &[f32], weights: &[f32], hidden: usize) -> Vec<f32> {
    let experts = weights.len() / hidden;
    x.chunks_exact(hidden)
        .flat_map(|row| cpu_row(row, &|i| weights[i], experts))
        .map(|g| g as f32)
        .collect()
}

/// Bytes of a `[slots, columns]` scratch array.
pub(crate) fn scratch_bytes(name: &'static str, slots: u32, columns: u32) -> Result<u64> {
    bytes_of(name, &[slots.into(), columns.into()], 4)
}
