//! What the kernels that multiply by transposed weights are compiled for:
//! [`transposed_register`](super::transposed_register) on software drivers,
//! [`transposed_tile`](super::transposed_tile) on GPUs,
//! [`transposed_matrix`](super::transposed_matrix) for many rows on matrix units.
use super::matmul_kernels::{BINDINGS, ItemKind, Layout, SKINNY_ROWS};
use super::matrix_tiling::Units;
use super::{transposed_matrix, transposed_register, transposed_tile};
use crate::device::shader::{Binding, Piece, Prelude, params, piece};
use crate::device::{Kernel, quirks};
use crate::weights::{PANEL, WeightType};
use crate::{Context, Result, Target};
use std::sync::Arc;

params! {
    rows: u32, first_row: u32, depth: u32, columns: u32, x_stride: u32, out_stride: u32, first_expert: u32, experts: u32,
    slots: u32, items: u32, items_begin: u32, items_end: u32, item_rows: u32, expert_offsets: u32, token_of: u32, placed: u32,
    item_groups: u32, item_step: u32, add: u32,
}

impl Params {
    pub(super) const FIELDS: &[(&str, u32)] = Self::LAYOUT;
}

/// Those of the other matmuls, by the same names.
pub(super) const ALL_BINDINGS: &[Binding] = BINDINGS;

/// What is known of such a matmul when its kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Problem {
    /// Sums over the rows of two matrices: gate and up.
    pub(crate) gated: bool,
    /// Rows of `x` are tokens of the slots, not slots.
    pub(crate) gather: bool,
    /// One expert for all rows, no plan.
    pub(crate) dense: bool,
    pub(crate) weight_type: WeightType,
    pub(crate) layout: Layout,
    /// Largest of 8, 4, 1 that divides the rows of a matrix: values of x side by side.
    pub(crate) row_lanes: u32,
    /// The same of the columns: values of a row of weights, and of out.
    pub(crate) column_lanes: u32,
    pub(crate) kind: ItemKind,
}

/// A kernel that serves a problem.
#[derive(Clone, Copy)]
enum Serving {
    Register,
    Tile,
    Matrix(Units),
}

/// Largest of 8, 4, 1 that divides a length.
pub(super) fn lanes(length: u32) -> u32 {
    [8, 4].into_iter().find(|n| length.is_multiple_of(*n)).unwrap_or(1)
}

impl Problem {
    /// By packed weights `[rows, columns]`, or by rows in place.
    pub(super) fn new(
        [gated, gather, dense]: [bool; 3],
        (weight_type, packed): (WeightType, bool),
        [rows, columns]: [u32; 2],
        kind: ItemKind,
    ) -> Self {
        let [row_lanes, column_lanes] = [lanes(rows), lanes(columns)];
        let layout = match packed {
            true => Layout::Packed,
            false if column_lanes == 1 => Layout::AnyRows,
            false => Layout::Rows,
        };
        Self { gated, gather, dense, weight_type, layout, row_lanes, column_lanes, kind }
    }

    /// Every problem there is: of a matrix only what divides its sides is known.
    pub(super) fn all() -> Vec<Self> {
        let mut all = vec![];
        let kinds = [ItemKind::Skinny, ItemKind::Tile];
        let lengths = [1, 4, 8];
        let matrices = lengths.into_iter().flat_map(|rows| lengths.map(|columns| [rows, columns]));
        for (matrix, kind) in matrices.flat_map(|m| kinds.map(|kind| (m, kind))) {
            for (weight_type, packed) in
                WeightType::ALL.iter().flat_map(|&t| [true, false].map(|packed| (t, packed)))
            {
                if packed || is_in_place(weight_type, matrix[1]) {
                    let of = |[gated, gather]: [bool; 2]| {
                        Self::new([gated, gather, false], (weight_type, packed), matrix, kind)
                    };
                    all.extend([[false, true], [true, false]].map(of));
                }
            }
            if kind == ItemKind::Tile {
                all.push(Self::new([false, false, true], (WeightType::F32, false), matrix, kind));
            }
        }
        all
    }

    pub(super) fn variants(prelude: impl Fn(&Self) -> Prelude) -> Vec<Prelude> {
        Prelude::distinct(Self::all().iter().map(prelude))
    }

    pub(super) fn label(&self) -> String {
        let of = match (self.dense, self.gated) {
            (true, _) => "dense",
            (_, true) => "two matrices",
            (_, false) => "one matrix",
        };
        let Self { row_lanes, column_lanes, .. } = self;
        let [weights, layout] = [format!("{:?}", self.weight_type), format!("{:?}", self.layout)];
        format!(
            "{} {of} {weights} {layout} rows of {row_lanes}, columns of {column_lanes}",
            self.kind.name()
        )
    }

    /// For kernels whose loads are of four values at most.
    pub(super) fn of_fours(&self) -> Self {
        let [row_lanes, column_lanes] = [self.row_lanes, self.column_lanes].map(|n| n.min(4));
        Self { row_lanes, column_lanes, ..*self }
    }

    /// What kernels begin with that keep tiles in workgroup memory: constants, items, and where rows and weights are
    /// read.
    pub(super) fn reads(&self, prelude: Prelude) -> Prelude {
        let [run, part] = self.blocks();
        let packed = self.layout != Layout::AnyRows;
        self.constants(prelude)
            .piece(piece!("common/grid"))
            .piece(piece!("matmul/transposed/sizes"))
            .piece(self.items())
            .piece(if self.row_lanes == 4 {
                piece!("matmul/x_vec4")
            } else {
                piece!("matmul/x_scalar")
            })
            .piece(self.weight_type.unpack())
            .maybe_piece(run)
            .maybe_piece(part)
            .piece(self.places())
            .maybe_piece(packed.then_some(piece!("matmul/weights")))
            .maybe_piece(self.eighth())
    }

    /// The constants that all kernels read.
    pub(super) fn constants(&self, prelude: Prelude) -> Prelude {
        prelude
            .flag("GATED", self.gated)
            .flag("GATHER", self.gather)
            .constant("PANEL", if self.layout == Layout::Packed { PANEL } else { 1 })
            .constant("BLOCK_DEPTH", self.weight_type.device_depth())
            .constant("BLOCK_WORDS", self.weight_type.device_words())
    }

    pub(super) fn items(&self) -> Piece {
        if self.dense {
            piece!("matmul/transposed/items_dense")
        } else {
            piece!("matmul/transposed/items_planned")
        }
    }

    pub(super) fn blocks(&self) -> [Option<Piece>; 2] {
        let has = self.weight_type.has_blocks();
        [piece!("matmul/run_blocks"), piece!("matmul/transposed/part")].map(|p| has.then_some(p))
    }

    /// Loads of eight columns at once, where a word has as many.
    pub(super) fn eighth(&self) -> Option<Piece> {
        let weight_type = self.weight_type;
        match (weight_type.has_blocks(), weight_type.device_depth()) {
            (true, _) => Some(piece!("matmul/transposed/eighth_blocks")),
            (_, 4) => None,
            (false, _) => Some(piece!("matmul/transposed/eighth_halves")),
        }
    }

    pub(super) fn places(&self) -> Piece {
        if self.layout == Layout::AnyRows {
            piece!("matmul/transposed/values_at")
        } else {
            piece!("matmul/transposed/words_at")
        }
    }

    fn serving(&self, ctx: &Context) -> Serving {
        match (Units::in_use(ctx), ctx.variant().target) {
            (Some(units), _) if transposed_matrix::serves(self) => Serving::Matrix(units),
            (_, Target::Serial) => Serving::Register,
            (_, Target::Wide) => Serving::Tile,
        }
    }

    /// Compiles the kernel that serves it.
    pub(super) fn kernel(&self, ctx: &Context) -> Result<Arc<Kernel>> {
        match self.serving(ctx) {
            Serving::Register => {
                ctx.kernel(&transposed_register::SPEC, transposed_register::prelude_of(ctx, self))
            }
            Serving::Tile => ctx.kernel(&transposed_tile::SPEC, transposed_tile::prelude(self)),
            Serving::Matrix(units) => {
                ctx.kernel(&transposed_matrix::SPEC, transposed_matrix::prelude(self, units))
            }
        }
    }

    /// Most rows of an item that the kernel takes.
    pub(super) fn item_rows(&self, ctx: &Context) -> u32 {
        match (self.kind, self.serving(ctx)) {
            (ItemKind::Skinny, _) => SKINNY_ROWS,
            (_, Serving::Register) => super::matmul_register::TILE_ROWS,
            (_, Serving::Tile) => super::matmul_tile::TILE_ROWS,
            (_, Serving::Matrix(units)) => units.tile_rows(),
        }
    }

    /// Fails where the loops of one invocation are too long for a software driver: `name` is the
    /// argument of `rows`.
    pub(super) fn check_loops(&self, ctx: &Context, name: &'static str, rows: u32) -> Result<()> {
        let iterations = match self.serving(ctx) {
            Serving::Register => transposed_register::iterations(self, rows),
            Serving::Tile => transposed_tile::iterations(rows),
            Serving::Matrix(units) => transposed_matrix::iterations(self, units, rows),
        };
        quirks::check_loops(ctx, name, rows, iterations)
    }

    /// Workgroups for so many items, completing the parameters.
    pub(super) fn groups(&self, ctx: &Context, params: &mut Params, items: u32) -> u64 {
        let [width, height] = match self.serving(ctx) {
            Serving::Register => transposed_register::group(self),
            Serving::Tile => [transposed_tile::OUT_COLUMNS, 1],
            Serving::Matrix(units) => [transposed_matrix::out_columns(self, units), 1],
        };
        params.item_groups = items.div_ceil(height);
        params.item_step = super::matmul_register::item_step(params.item_groups);
        u64::from(params.columns.div_ceil(width)) * u64::from(params.item_groups)
    }
}

/// Whether rows of so many values of a type are read where an engine has them: whole 16-byte words, or
/// f32.
pub(super) fn is_in_place(weight_type: WeightType, columns: u32) -> bool {
    weight_type == WeightType::F32
        || (!weight_type.has_blocks() && columns.is_multiple_of(weight_type.device_depth()))
}
