// Sizes and workgroup memory of the kernels on matrix units. A tile is made of squares of SIDE: TILE_ROWS by
// COLUMNS, of MATRICES matrices side by side. DOWN x ACROSS subgroups multiply, each 2 x SQUARES_ACROSS
// squares. More subgroups than those, where they are smaller than WG was made for, only bring.
const STEP_DEPTH: u32 = 16u;
const K_SQUARES: u32 = STEP_DEPTH / SIDE;
const TILE_ROWS: u32 = DOWN * 2u * SIDE;
const COLUMNS: u32 = ACROSS * SQUARES_ACROSS * SIDE;
const OUT_COLUMNS: u32 = COLUMNS / MATRICES;
const OUT_SQUARES: u32 = SQUARES_ACROSS / MATRICES;    // of a subgroup, across one matrix

// A row of a square, in fours, and a gap that spreads the rows of one load over the banks.
const ROW_FOURS: u32 = SIDE / 4u;
const STRIDE_FOURS: u32 = ROW_FOURS + select(0u, 2u, SIDE > 8u);
const STRIDE: u32 = 4u * STRIDE_FOURS;

alias Four = array<array<Input, 2>, 2>;
alias Square = array<array<Four, STRIDE_FOURS>, SIDE>;

// [part][rows / SIDE][k / SIDE][row][k / 4][k % 4], and the same with columns in place of rows. Dimensions of
// their own: an index that is constant once inlined needs no bounds check.
var<workgroup> x_tile: array<array<array<Square, K_SQUARES>, TILE_ROWS / SIDE>, X_PARTS>;
var<workgroup> w_tile: array<array<array<Square, K_SQUARES>, COLUMNS / SIDE>, W_PARTS>;
// Sums on their way out, SLOTS squares at a time.
var<workgroup> sums: array<array<array<array<f32, 4>, ROW_FOURS>, SIDE>, SLOTS>;
// The largest magnitude seen of each row and each column, as bits; and the exponent that scales it.
var<workgroup> row_largest: array<atomic<u32>, TILE_ROWS>;
var<workgroup> column_largest: array<atomic<u32>, COLUMNS>;
var<workgroup> row_exponent: array<u32, TILE_ROWS>;
var<workgroup> column_exponent: array<u32, COLUMNS>;
var<workgroup> misfits: atomic<u32>;
var<workgroup> verdict: u32;
