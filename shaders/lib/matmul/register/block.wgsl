// A lane's block: sums of eight rows by LANE_COLUMNS columns (8; GATED: 4 of each matrix), eight values of k
// a step. Sums are named members, not arrays: an array that llvmpipe cannot index by constants costs 7 ns an
// access.
const LANE_COLUMNS: u32 = select(8u, 4u, GATED);
const TILE_COLUMNS: u32 = WG * LANE_COLUMNS;

// Eight columns of each of eight rows.
struct Octet { r0: Eight, r1: Eight, r2: Eight, r3: Eight, r4: Eight, r5: Eight, r6: Eight, r7: Eight }
struct Pairs { p: Pair, q: Pair, r: Pair, t: Pair }

fn product(w: Eight, x: Eight) -> f32 { return dot(w.lo, x.lo) + dot(w.hi, x.hi); }

fn add(s: Eight, w: Pairs, x: Eight) -> Eight {
  return Eight(
    s.lo + vec4(product(w.p.a, x), product(w.p.b, x), product(w.q.a, x), product(w.q.b, x)),
    s.hi + vec4(product(w.r.a, x), product(w.r.b, x), product(w.t.a, x), product(w.t.b, x)));
}

// The first so many rows, a constant wherever it is called: 2, 4, 8 or, with the second eight, 16.
fn add_rows(
  rows: u32, s0: ptr<function, Octet>, s1: ptr<function, Octet>,
  w: Pairs, x0: RowBases, x1: RowBases, step: u32,
) {
  let a = load_rows(x0, step);
  if rows > 8u {
    let b = load_rows(x1, step);
    add_octet(8u, s0, w, a);
    add_octet(8u, s1, w, b);
  } else {
    add_octet(rows, s0, w, a);
  }
}

fn add_octet(rows: u32, s: ptr<function, Octet>, w: Pairs, x: RowValues) {
  (*s).r0 = add((*s).r0, w, row_of(x, 0u));
  (*s).r1 = add((*s).r1, w, row_of(x, 1u));
  if rows > 2u {
    (*s).r2 = add((*s).r2, w, row_of(x, 2u));
    (*s).r3 = add((*s).r3, w, row_of(x, 3u));
  }
  if rows > 4u {
    (*s).r4 = add((*s).r4, w, row_of(x, 4u));
    (*s).r5 = add((*s).r5, w, row_of(x, 5u));
    (*s).r6 = add((*s).r6, w, row_of(x, 6u));
    (*s).r7 = add((*s).r7, w, row_of(x, 7u));
  }
}

fn store(tile: Tile, row: u32, column: u32, s: Eight) {
  if row >= tile.rows { return; }
  let slot = tile.first + row;
  if GATED {
    store_out(slot, column, activate(s.lo, s.hi));
  } else {
    store_out(slot, column, s.lo);
    store_out(slot, column + 4u * WG, s.hi);
  }
}

fn store_octet(tile: Tile, row: u32, column: u32, s: Octet) {
  store(tile, row, column, s.r0); store(tile, row + 1u, column, s.r1);
  store(tile, row + 2u, column, s.r2); store(tile, row + 3u, column, s.r3);
  store(tile, row + 4u, column, s.r4); store(tile, row + 5u, column, s.r5);
  store(tile, row + 6u, column, s.r6); store(tile, row + 7u, column, s.r7);
}

// Two neighbouring columns, clamped into the matrix.
fn columns_at(expert: u32, column: u32) -> Columns {
  let last = params.columns - 1u;
  return Columns(weight_base(expert, min(column, last)), weight_base(expert, min(column + 1u, last)));
}

// The lane's four pairs of columns: four neighbours twice of one matrix, or of gate and then of up.
struct Block { p: Columns, q: Columns, r: Columns, t: Columns }

fn block_at(expert: u32, column: u32) -> Block {
  let offset = select(4u * WG, 0u, GATED);
  return Block(
    columns_at(expert, column), columns_at(expert, column + 2u),
    columns_at(expert, column + offset), columns_at(expert, column + offset + 2u));
}

// What is loaded of them for a run of RUN_STEPS steps.
fn load_pairs(b: Block, run: u32) -> Loads {
  return Loads(
    load_pair(false, b.p, run), load_pair(false, b.q, run),
    load_pair(GATED, b.r, run), load_pair(GATED, b.t, run));
}

// Runs of eight values of k, times RUN_STEPS. Times min(rows, 1): for loop bounds made of uniforms alone
// lavapipe specialises the shader anew at each dispatch (4 ms).
fn runs_of(tile: Tile) -> u32 {
  const DEPTH = 8u * RUN_STEPS;
  return (params.depth + DEPTH - 1u) / DEPTH * min(tile.rows, 1u);
}
