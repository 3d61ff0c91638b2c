//! The grouped matmul for many rows on matrix units, at the precision of f32. See
//! [`grouped_matmul`](super::grouped_matmul), and [`MatrixUnits`] for when it
//! is chosen.
use super::matmul_kernels::{BINDINGS, ItemKind, MatmulKernel, Params, Specialization};
use super::matmul_pieces as pieces;
use crate::Context;
use crate::device::matrix::{MatrixShape, MatrixUnits, Precision};
use crate::device::shader::{Prelude, Spec, WORKGROUP_BYTES, piece};
use crate::weights::WeightType;

/// See `shaders/matmul_matrix.wgsl`.
pub const SPEC: Spec = Spec {
    name: "matmul_matrix",
    body: include_str!("../../shaders/matmul_matrix.wgsl"),
    params: Params::FIELDS,
    bindings: BINDINGS,
    variants: || {
        let all = Specialization::all();
        let tiles = all.iter().filter(|p| p.kind == ItemKind::Tile && !p.dense);
        Prelude::distinct(
            tiles.flat_map(|problem| Units::all().into_iter().map(|units| units.prelude(problem))),
        )
    },
};

/// Its row of the table.
pub(crate) const KERNEL: MatmulKernel = MatmulKernel {
    spec: &SPEC,
    // The router's logits stay with the other kernels: choices hang on them.
    serves: |ctx, work| ctx.matrix_in_use().is_some() && work.kind == ItemKind::Tile && !work.dense,
    tile_rows: |ctx| Units::of(ctx).tile_rows(),
    prelude: |ctx, problem| Units::of(ctx).prelude(problem),
    group: |ctx, problem| [Units::of(ctx).tile(problem).out_columns(problem), 1],
    item_step: |_| 0,
    iterations,
};

/// Depth of a step.
const STEP_DEPTH: u32 = 16;
/// Squares of rows of a subgroup.
const SQUARES_DOWN: u32 = 2;
/// Subgroups side by side.
const ACROSS: u32 = 2;

/// Two attempts; then, where nothing is finite, four columns in turn of each of at most 32 fours of
/// the output.
fn iterations(problem: &Specialization, depth: u32) -> u64 {
    let steps = u64::from(depth.div_ceil(STEP_DEPTH));
    let matrices = if problem.activation.is_some() { 2 } else { 1 };
    2 * (steps + 16) + 64 + 32 * 4 * matrices * (steps + 2)
}

/// The matrix units that a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Units {
    shape: MatrixShape,
    precision: Precision,
    /// Lanes of a workgroup.
    lanes: u32,
}

/// How a workgroup shares out a tile.
struct Tiling {
    /// Numbers that a value of x, and that a weight, is cut into.
    parts: [u32; 2],
    /// Subgroups below one another.
    down: u32,
    /// Squares of a subgroup, across both matrices.
    squares_across: u32,
    /// Squares of sums in workgroup memory at a time.
    slots: u32,
    columns: u32,
}

impl Tiling {
    /// Columns of the output.
    fn out_columns(&self, problem: &Specialization) -> u32 {
        if problem.activation.is_some() { self.columns / 2 } else { self.columns }
    }
}

impl Units {
    fn all() -> Vec<Self> {
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

    /// Of a context whose kernels use them.
    fn of(ctx: &Context) -> Self {
        let (shape, precision) = ctx.matrix_in_use().expect("matrix units in use");
        Self::new(shape, precision, ctx.info().subgroup_max_size)
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

    fn tile_rows(self) -> u32 {
        self.down() * SQUARES_DOWN * self.shape.side()
    }

    fn tile(self, problem: &Specialization) -> Tiling {
        let side = self.shape.side();
        let parts = match self.precision {
            _ if self.shape.has_floats() => [1, 1],
            Precision::Half => [1, 1],
            Precision::Full if is_exact_in_half(problem.weight_type) => [2, 1],
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
        Tiling { parts, down: self.down(), squares_across, slots, columns }
    }

    fn prelude(self, problem: &Specialization) -> Prelude {
        let problem = &problem.with_lanes(4);
        let Self { shape, precision, lanes } = self;
        let Tiling { parts, down, squares_across, slots, .. } = self.tile(problem);
        let side = shape.side();
        let input = if shape.has_floats() { "f32" } else { "f16" };
        // f32 inputs are as they are at either precision.
        let precision = if shape.has_floats() { Precision::Full } else { precision };
        let label = format!("{}, {shape}, {precision:?}, {lanes} lanes", problem.label());
        let prelude = Prelude::new(label)
            .needs(MatrixUnits::FEATURES)
            .constant("WG", lanes)
            .constant("SIDE", side)
            .constant("DOWN", down)
            .constant("ACROSS", ACROSS)
            .constant("SQUARES_ACROSS", squares_across)
            .constant("X_PARTS", parts[0])
            .constant("W_PARTS", parts[1])
            .constant("SLOTS", slots)
            .alias("Input", input)
            .alias("InputA", &format!("coop_mat{side}x{side}<{input}, A>"))
            .alias("InputB", &format!("coop_mat{side}x{side}<{input}, B>"))
            .alias("Sum", &format!("coop_mat{side}x{side}<f32, C>"));
        let blocks = problem.weight_type.has_blocks();
        problem
            .constants(prelude)
            .piece(piece!("common/grid"))
            .piece(piece!("matmul/params"))
            .piece(pieces::tile(problem))
            .maybe_piece(pieces::halves(problem))
            .piece(pieces::x(problem))
            .piece(pieces::unpack(problem))
            .maybe_piece(pieces::blocks(problem))
            .maybe_piece(pieces::load_blocks(problem))
            .piece(if blocks {
                piece!("matmul/matrix/carry_blocks")
            } else {
                piece!("matmul/matrix/carry_words")
            })
            .piece(piece!("matmul/matrix/exponent"))
            .piece(piece!("matmul/matrix/put"))
            .piece(piece!("matmul/matrix/square"))
            .piece(piece!("matmul/matrix/again"))
            .piece(pieces::activation(problem))
            .piece(pieces::layout(problem))
            .piece(pieces::weights(problem))
            .piece(pieces::out(problem))
    }
}

/// Whether a type's values fit the 11 bits of an f16, under a scale of their column. Others are cut in
/// two: a byte times an f16 has 19 bits, and an f32 as the scale of a block has 24.
fn is_exact_in_half(weight_type: WeightType) -> bool {
    matches!(weight_type, WeightType::F16 | WeightType::Bf16 | WeightType::Mxfp4)
}
