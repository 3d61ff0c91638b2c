//! The table of matmul kernels, and what each is compiled for.
//!
//! | kernel | for |
//! |---|---|
//! | [`matmul_register`](super::matmul_register) | software drivers: all in registers |
//! | [`matmul_skinny`](super::matmul_skinny) | items of a few rows: weights go straight to registers |
//! | [`matmul_matrix`](super::matmul_matrix) | items of many rows, on matrix units |
//! | [`matmul_tile`](super::matmul_tile) | items of many rows: tiles in workgroup memory |
//!
//! To add a kernel, add its file, its WGSL and a row here.
use super::grouped_matmul::Stage;
use super::{matmul_matrix, matmul_register, matmul_skinny, matmul_tile};
use crate::device::shader::{Binding, Prelude, Spec, params, read, read_uniform, write};
use crate::device::{Kernel, quirks};
use crate::routing::Activation;
use crate::weights::{PANEL, WeightType};
use crate::{Context, FloatType, Result};
use std::sync::Arc;

params! {
    columns: u32, column_begin: u32, column_end: u32, column_base: u32, depth: u32, x_stride: u32, out_stride: u32, first_expert: u32, experts: u32,
    slot_begin: u32, slot_end: u32, x_slot: u32, out_slot: u32, items: u32, items_begin: u32, items_end: u32, least_item: u32,
    item_rows: u32, small_rows: u32, expert_offsets: u32, token_of: u32, placed: u32, item_groups: u32, item_step: u32,
}

impl Params {
    pub(crate) const FIELDS: &[(&str, u32)] = Self::LAYOUT;
}

/// Bindings that all kernels share.
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

/// Rows per item: which list of the plan, and which of its items.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ItemKind {
    /// Items of at most [`SKINNY_ROWS`] rows.
    Skinny,
    /// Of the tiles' list the last item of each expert, where it is no whole tile and has at most
    /// [`SMALL_ROWS`] rows: in parts of [`SMALL_PART_ROWS`]. None where the shape has no skinny items.
    Small,
    /// Items of up to [`tile_rows`] rows; where there are small ones, those that are not.
    Tile,
}

impl ItemKind {
    /// Those that a context's kernels tell apart, fewest rows first.
    pub(super) fn all(ctx: &Context, dense: bool) -> impl Iterator<Item = Self> {
        let serves = move |&kind: &Self| kernel_of(ctx, Work { kind, dense }).is_some();
        [Self::Skinny, Self::Small, Self::Tile].into_iter().filter(serves)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Skinny => "skinny",
            Self::Small => "small",
            Self::Tile => "tile",
        }
    }
}

/// Most rows of a skinny item.
pub const SKINNY_ROWS: u32 = 8;

/// Most rows of a small item. By instructions, three parts cost as much as a tile of 48 rows.
pub(crate) const SMALL_ROWS: u32 = 32;

/// Rows that one workgroup takes of it: 32 would spill on Apple's M1.
pub(super) const SMALL_PART_ROWS: u32 = 16;

/// A row of the table of kernels.
pub(crate) struct MatmulKernel {
    pub(crate) spec: &'static Spec,
    /// Whether it serves work in a context.
    pub(crate) serves: fn(&Context, Work) -> bool,
    /// Most rows of a tile item; that of a skinny one is [`SKINNY_ROWS`].
    pub(crate) tile_rows: fn(&Context) -> u32,
    pub(crate) prelude: fn(&Context, &Specialization) -> Prelude,
    /// Columns and items that one workgroup makes.
    pub(crate) group: fn(&Context, &Specialization) -> [u32; 2],
    /// The step between so many groups of items that follow one another.
    pub(crate) item_step: fn(u32) -> u32,
    /// Iterations that the loops of one invocation take at a depth, at most.
    pub(crate) iterations: fn(&Specialization, u32) -> u64,
}

/// The kernels: the first that serves is taken.
const KERNELS: &[&MatmulKernel] = &[
    &matmul_matrix::KERNEL,
    &matmul_register::KERNEL,
    &matmul_skinny::KERNEL,
    &matmul_tile::KERNEL,
];

/// What a kernel is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) kind: ItemKind,
    /// One expert for all rows, no plan: router logits.
    pub(crate) dense: bool,
}

fn kernel_of(ctx: &Context, work: Work) -> Option<&'static MatmulKernel> {
    KERNELS.iter().find(|kernel| (kernel.serves)(ctx, work)).copied()
}

fn kernel_for(ctx: &Context, work: Work) -> &'static MatmulKernel {
    kernel_of(ctx, work).expect("a kernel for every target and kind of item")
}

/// Most rows of a tile item of experts on this context's device.
pub fn tile_rows(ctx: &Context) -> u32 {
    (kernel_for(ctx, Work { kind: ItemKind::Tile, dense: false }).tile_rows)(ctx)
}

/// What is known of a matmul when its kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Specialization {
    /// The activation that joins two matrices; none: one matrix.
    pub(crate) activation: Option<Activation>,
    /// Rows of `x` are tokens of the slots, not slots.
    pub(crate) gather: bool,
    /// One expert for all rows, no plan.
    pub(crate) dense: bool,
    pub(crate) x_type: FloatType,
    pub(crate) weight_type: WeightType,
    pub(crate) layout: Layout,
    /// Largest of 8, 4, 1 that divides the rows of x and of the weights.
    pub(crate) depth_lanes: u32,
    /// Whether the columns are a multiple of 4, so that four of a row of `out` are one aligned store.
    pub(crate) quad_columns: bool,
    pub(crate) kind: ItemKind,
}

impl Specialization {
    /// The experts' matmul of a stage, by a matrix `[columns, depth]`.
    pub(super) fn of_experts(
        stage: Stage,
        weight_type: WeightType,
        [columns, depth]: [u32; 2],
        kind: ItemKind,
    ) -> Self {
        let activation = match stage {
            Stage::GateUp(activation) => Some(activation),
            Stage::Down | Stage::Gate | Stage::Up => None,
        };
        Self {
            activation,
            gather: stage != Stage::Down,
            dense: false,
            x_type: FloatType::F32,
            weight_type,
            layout: Layout::Packed,
            depth_lanes: depth_lanes_in(weight_type, depth),
            quad_columns: columns.is_multiple_of(4),
            kind,
        }
    }

    /// Router logits, by a matrix `[columns, depth]`.
    pub(super) fn of_logits([columns, depth]: [u32; 2], kind: ItemKind) -> Self {
        let depth_lanes = depth_lanes(depth);
        Self {
            activation: None,
            gather: false,
            dense: true,
            x_type: FloatType::F32,
            weight_type: WeightType::F32,
            layout: if depth_lanes == 1 { Layout::AnyRows } else { Layout::Rows },
            depth_lanes,
            quad_columns: columns.is_multiple_of(4),
            kind,
        }
    }

    /// Every problem there is: the same functions make it that serve at run time. Of a matrix only what divides its sides is
    /// known, so that a few stand for all.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![];
        let of_any_x = |problem: Self| FloatType::ALL.map(|x_type| problem.with_x_type(x_type));
        for matrix in [[1, 1], [4, 1], [1, 4], [4, 4], [1, 32], [4, 32]] {
            for kind in [ItemKind::Skinny, ItemKind::Small, ItemKind::Tile] {
                for stage in [
                    Stage::Down,
                    Stage::Gate,
                    Stage::GateUp(Activation::Silu),
                    Stage::GateUp(Activation::Gelu),
                ] {
                    for &weight_type in WeightType::ALL {
                        let problem = Self::of_experts(stage, weight_type, matrix, kind);
                        match stage {
                            Stage::Down => all.push(problem),
                            _ => all.extend(of_any_x(problem)),
                        }
                    }
                }
                all.extend(of_any_x(Self::of_logits(matrix, kind)));
            }
        }
        all
    }

    /// As a kernel sees it whose loads of x are of at most `lanes` values.
    pub(crate) fn with_lanes(self, lanes: u32) -> Self {
        Self { depth_lanes: self.depth_lanes.min(lanes), ..self }
    }

    /// As a kernel sees it that loads f16 and bf16 by eights or by twos.
    pub(crate) fn with_lanes_of_halves(self) -> Self {
        let few = self.x_type != FloatType::F32 && self.depth_lanes < 8;
        Self { depth_lanes: if few { 1 } else { self.depth_lanes }, ..self }
    }

    /// The same by rows of x of another type.
    pub(super) fn with_x_type(self, x_type: FloatType) -> Self {
        Self { x_type, ..self }
    }

    /// As a kernel sees it that stores one value at a time.
    pub(crate) fn with_any_stores(self) -> Self {
        Self { quad_columns: false, ..self }
    }

    pub(crate) fn label(&self) -> String {
        let rows = self.kind.name();
        let what = match self.activation {
            None => "plain",
            Some(Activation::Silu) => "silu",
            Some(Activation::Gelu) => "gelu",
        };
        let source = match (self.dense, self.gather && self.activation.is_none()) {
            (true, _) => "dense",
            (_, true) => "gathered",
            (_, false) => "grouped",
        };
        let [weights, layout] = [format!("{:?}", self.weight_type), format!("{:?}", self.layout)];
        let columns = if self.quad_columns { ", columns of 4" } else { "" };
        let x = match self.x_type {
            FloatType::F32 => String::new(),
            halves => format!(" by {}", halves.name()),
        };
        let lanes = self.depth_lanes;
        format!("{rows} {what} {source} {weights}{x} {layout} depth of {lanes}{columns}")
    }

    /// The constants that all kernels read.
    pub(crate) fn constants(&self, prelude: Prelude) -> Prelude {
        prelude
            .flag("GATED", self.activation.is_some())
            .flag("GATHER", self.gather)
            .constant("PANEL", if self.layout == Layout::Packed { PANEL } else { 1 })
            .constant("BLOCK_DEPTH", self.weight_type.device_depth())
            .constant("BLOCK_WORDS", self.weight_type.device_words())
    }

    fn row(&self, ctx: &Context) -> &'static MatmulKernel {
        kernel_for(ctx, Work { kind: self.kind, dense: self.dense })
    }

    /// Most rows of what one workgroup takes of an item.
    pub(super) fn item_rows(&self, ctx: &Context) -> u32 {
        match self.kind {
            ItemKind::Skinny => SKINNY_ROWS,
            ItemKind::Small => SMALL_PART_ROWS,
            ItemKind::Tile => (self.row(ctx).tile_rows)(ctx),
        }
    }

    /// Compiles the kernel that serves it.
    pub(super) fn kernel(&self, ctx: &Context) -> Result<Arc<Kernel>> {
        let row = self.row(ctx);
        ctx.kernel(row.spec, (row.prelude)(ctx, self))
    }

    /// The kernel that serves it: one that is made already, where it is of the same problem.
    pub(super) fn kernel_or(
        &self,
        ctx: &Context,
        made: &(Self, Arc<Kernel>),
    ) -> Result<Arc<Kernel>> {
        if *self == made.0 { Ok(made.1.clone()) } else { self.kernel(ctx) }
    }

    /// Fails where the loops of one invocation are too long for a software driver at a depth, which
    /// is the caller's argument `name`.
    pub(super) fn check_loops(&self, ctx: &Context, name: &'static str, depth: u32) -> Result<()> {
        let row = self.row(ctx);
        quirks::check_loops(ctx, name, depth, (row.iterations)(self, depth))
    }

    /// Workgroups for so many items, completing the parameters.
    pub(super) fn groups(&self, ctx: &Context, params: &mut Params, items: u32) -> u64 {
        let row = self.row(ctx);
        let [width, height] = (row.group)(ctx, self);
        params.item_groups = items.div_ceil(height);
        params.item_step = (row.item_step)(params.item_groups);
        let across = (params.column_end - params.column_begin).div_ceil(width);
        u64::from(across) * u64::from(params.item_groups)
    }
}

/// Largest of 8, 4, 1 that divides the rows of x and of weights of a type. 1 where a run of a block may
/// reach past the row: kernels then test each value of x.
fn depth_lanes_in(weight_type: WeightType, depth: u32) -> u32 {
    if weight_type.has_blocks() && !depth.is_multiple_of(32) { 1 } else { depth_lanes(depth) }
}

fn depth_lanes(depth: u32) -> u32 {
    [8, 4].into_iter().find(|n| depth.is_multiple_of(*n)).unwrap_or(1)
}
