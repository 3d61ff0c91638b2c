// A lane's block of transposed_register: sums of eight rows by eight columns that are neighbours, eight rows
// of the weights a step. Sums are named members, not arrays, as in register/block.wgsl.
const TILE_COLUMNS: u32 = WG * 8u;

// Eight columns of each of eight rows.
struct Octet { r0: Eight, r1: Eight, r2: Eight, r3: Eight, r4: Eight, r5: Eight, r6: Eight, r7: Eight }
// Eight rows of weights, two by two.
struct Pairs { p: Pair, q: Pair, r: Pair, t: Pair }

fn add(s: Eight, w: Pairs, x: Eight) -> Eight {
  let lo = x.lo.x * w.p.a.lo + x.lo.y * w.p.b.lo + x.lo.z * w.q.a.lo + x.lo.w * w.q.b.lo
    + x.hi.x * w.r.a.lo + x.hi.y * w.r.b.lo + x.hi.z * w.t.a.lo + x.hi.w * w.t.b.lo;
  let hi = x.lo.x * w.p.a.hi + x.lo.y * w.p.b.hi + x.lo.z * w.q.a.hi + x.lo.w * w.q.b.hi
    + x.hi.x * w.r.a.hi + x.hi.y * w.r.b.hi + x.hi.z * w.t.a.hi + x.hi.w * w.t.b.hi;
  return Eight(s.lo + lo, s.hi + hi);
}

fn add_octet(s: ptr<function, Octet>, w: Pairs, x: RowValues) {
  (*s).r0 = add((*s).r0, w, row_of(x, 0u));
  (*s).r1 = add((*s).r1, w, row_of(x, 1u));
  (*s).r2 = add((*s).r2, w, row_of(x, 2u));
  (*s).r3 = add((*s).r3, w, row_of(x, 3u));
  (*s).r4 = add((*s).r4, w, row_of(x, 4u));
  (*s).r5 = add((*s).r5, w, row_of(x, 5u));
  (*s).r6 = add((*s).r6, w, row_of(x, 6u));
  (*s).r7 = add((*s).r7, w, row_of(x, 7u));
}

fn load_pairs(up: bool, c: Columns, step: u32) -> Pairs {
  let n = 8u * step;
  return Pairs(
    load_two(up, c, n), load_two(up, c, n + 2u), load_two(up, c, n + 4u), load_two(up, c, n + 6u));
}

@group(0) @binding(6) var<storage, read_write> out: array<Out>;

fn store(tile: Tile, row: u32, column: u32, s: Eight) {
  if row < tile.rows { store_eight((tile.first + row) * params.out_stride, column, s); }
}

fn store_octet(tile: Tile, row: u32, column: u32, s: Octet) {
  store(tile, row, column, s.r0); store(tile, row + 1u, column, s.r1);
  store(tile, row + 2u, column, s.r2); store(tile, row + 3u, column, s.r3);
  store(tile, row + 4u, column, s.r4); store(tile, row + 5u, column, s.r5);
  store(tile, row + 6u, column, s.r6); store(tile, row + 7u, column, s.r7);
}

// Steps of eight rows of weights. Times min(rows, 1), as in register/block.wgsl.
fn steps_of(tile: Tile) -> u32 {
  return (params.rows + 7u) / 8u * min(tile.rows, 1u);
}
