//! How the kernels on matrix units share out a tile, and what they are compiled with:
//! [`matmul_matrix`](super::matmul_matrix), [`transposed_matrix`](super::transposed_matrix) and
//! [`weight_gradient_matrix`](super::weight_gradient_matrix).
use crate::Context;
use crate::device::matrix::{MatrixShape, MatrixUnits, Precision};
use crate::device::shader::{Prelude, WORKGROUP_BYTES};
use crate::weights::WeightType;

/// Depth of a step.
pub(super) const STEP_DEPTH: u32 = 16;
/// Squares of rows of a subgroup.
const SQUARES_DOWN: u32 = 2;
/// Subgroups side by side.
const ACROSS: u32 = 2;

/// The matrix units that a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Units {
    shape: MatrixShape,
    precision: Precision,
    /// Lanes of a workgroup.
    lanes: u32,
}

/// How a workgroup shares out a tile.
pub(super) struct Tiling {
    /// Numbers that a value of a row, and that one of a column, is cut into.
    parts: [u32; 2],
    /// Squares of a subgroup, across all matrices.
    squares_across: u32,
    /// Squares of sums in workgroup memory at a time.
    slots: u32,
    /// Columns, of all matrices.
    pub(super) columns: u32,
}

/// The matrices that a tile goes through: side by side in its columns, and one after the other.
#[derive(Clone, Copy)]
pub(super) struct Matrices {
    pub(super) side_by_side: u32,
    pub(super) in_turn: u32,
}

impl Matrices {
    pub(super) const ONE: Self = Self { side_by_side: 1, in_turn: 1 };
}

impl Units {
    pub(super) fn all() -> Vec<Self> {
        let mut all = vec![];
        for shape in MatrixShape::ALL {
            for precision in [Precision::Full, Precision::Half] {
                for subgroup_size in [8, 64] {
                    all.push(Self::new(shape, precision, subgroup_size));
                }
            }
        }
        all
    }

    /// Those of a context, where its kernels use them.
    pub(super) fn in_use(ctx: &Context) -> Option<Self> {
        let (shape, precision) = ctx.matrix_in_use()?;
        Some(Self::new(shape, precision, ctx.info().subgroup_max_size))
    }

    /// For subgroups of up to so many lanes. Larger ones would still give right results, late.
    fn new(shape: MatrixShape, precision: Precision, subgroup_size: u32) -> Self {
        let lanes = match (shape.side(), subgroup_size) {
            (16, ..=32) => 128, // four subgroups of 32
            (16, _) => 256,     // four of 64
            (_, ..=8) => 64,    // eight of 8
            _ => 256,           // eight of 32
        };
        Self { shape, precision, lanes }
    }

    /// Subgroups below one another that multiply.
    fn down(self) -> u32 {
        if self.shape.side() == 16 { 2 } else { 4 }
    }

    pub(super) fn tile_rows(self) -> u32 {
        self.down() * SQUARES_DOWN * self.shape.side()
    }

    /// Fours of a tile's sums that one lane makes at most where it makes all of them without matrices.
    pub(super) fn most_plain(self) -> u64 {
        let columns = ACROSS * 4 * self.shape.side();
        (self.tile_rows() * columns / 4 / self.lanes).into()
    }

    /// A tile of columns whose values are [exact](is_exact_in_half) in f16, or are not.
    pub(super) fn tiling(self, exact: bool) -> Tiling {
        let side = self.shape.side();
        let parts = match self.precision {
            _ if self.shape.has_floats() => [1, 1],
            Precision::Half => [1, 1],
            Precision::Full if exact => [2, 1],
            Precision::Full => [2, 2],
        };
        let squares_across = if parts[1] > 1 { 2 } else { 4 };
        let columns = ACROSS * squares_across * side;
        // Rows of a square lie apart, so that a load of several does not meet one bank.
        let stride = if side > 8 { side + 8 } else { side };
        let input = if self.shape.has_floats() { 4 } else { 2 };
        let rows = self.tile_rows() * parts[0] + columns * parts[1];
        let staged = rows * STEP_DEPTH / side * stride * input;
        // Largest values and exponents of rows and columns, and two words.
        let rest = WORKGROUP_BYTES as u32 - staged - 8 * (self.tile_rows() + columns) - 32;
        let slots = [8, 4, 2].into_iter().find(|slots| slots * side * side * 4 <= rest);
        let slots = slots.expect("room for two squares of sums").min(self.down() * ACROSS);
        Tiling { parts, squares_across, slots, columns }
    }

    /// What a kernel on them begins with.
    pub(super) fn prelude(self, label: &str, exact: bool, matrices: Matrices) -> Prelude {
        let Self { shape, precision, lanes } = self;
        let Tiling { parts, squares_across, slots, .. } = self.tiling(exact);
        let side = shape.side();
        let input = if shape.has_floats() { "f32" } else { "f16" };
        // f32 inputs are as they are at either precision.
        let precision = if shape.has_floats() { Precision::Full } else { precision };
        Prelude::new(format!("{label}, {shape}, {precision:?}, {lanes} lanes"))
            .needs(MatrixUnits::FEATURES)
            .constant("WG", lanes)
            .constant("SIDE", side)
            .constant("DOWN", self.down())
            .constant("ACROSS", ACROSS)
            .constant("SQUARES_ACROSS", squares_across)
            .constant("MATRICES", matrices.side_by_side)
            .constant("PASSES", matrices.in_turn)
            .constant("X_PARTS", parts[0])
            .constant("W_PARTS", parts[1])
            .constant("SLOTS", slots)
            .alias("Input", input)
            .alias("InputA", &format!("coop_mat{side}x{side}<{input}, A>"))
            .alias("InputB", &format!("coop_mat{side}x{side}<{input}, B>"))
            .alias("Sum", &format!("coop_mat{side}x{side}<f32, C>"))
    }
}

/// Whether a type's values fit the 11 bits of an f16, under a scale of their column. Others are cut in
/// two: a byte times an f16 has 19 bits, and an f32 as the scale of a block has 24.
pub(super) fn is_exact_in_half(weight_type: WeightType) -> bool {
    matches!(weight_type, WeightType::F16 | WeightType::Bf16 | WeightType::Mxfp4)
}
