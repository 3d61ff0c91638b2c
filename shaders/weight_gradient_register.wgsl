// out[e][n, k] = sum over the slots s of expert e, in order, of a[a_row(s), a_first + n] * b[b_row(s), k]
//   a        [rows, ..] f32; a_row(s) = token_of[s] (GATHER_A) or s
//   b        [rows, K] f32; b_row(s) = token_of[s] (GATHER_B) or s
//   plan     u32: expert_offsets, token_of; not read (DENSE: one expert, all rows)
//   out      [experts, N, K] f32 of the experts of a page, written, or added to
// Grid: ceil(N / 16) * ceil(K / (SPAN * 64)) * experts groups, rows fastest, experts slowest.
// Pieces: common/grid, gradient/outer_sizes, common/eight_values, common/wide_floats | nothing,
//   gradient/sides_scalar | gradient/sides_vec4 | gradient/sides_wide,
//   common/store_ones | common/store_eights, gradient/spread_none | gradient/spread_shuffle.
//
// For devices where a load costs many multiply-adds and workgroup memory does not pay: everything stays in
// registers. A lane has 16 rows and eight columns that are neighbours, and takes eight slots a step. Sums are
// named members, not arrays, as in lib/matmul/register/block.wgsl.

@group(0) @binding(4) var<storage, read_write> out: array<Out>;

struct Octet { r0: Eight, r1: Eight, r2: Eight, r3: Eight, r4: Eight, r5: Eight, r6: Eight, r7: Eight }

// The columns of eight slots: zeros past the expert's last, whose row stands in their place.
fn load_columns(slot: u32, end: u32, k: u32) -> Octet {
  return Octet(
    columns_of(slot, end, k), columns_of(slot + 1u, end, k), columns_of(slot + 2u, end, k),
    columns_of(slot + 3u, end, k), columns_of(slot + 4u, end, k), columns_of(slot + 5u, end, k),
    columns_of(slot + 6u, end, k), columns_of(slot + 7u, end, k));
}

fn columns_of(slot: u32, end: u32, k: u32) -> Eight {
  return kept(load_b(b_row(min(slot, end - 1u)), k), slot < end);
}

fn add(s: Eight, v: Eight, b: Octet) -> Eight {
  let lo = v.lo.x * b.r0.lo + v.lo.y * b.r1.lo + v.lo.z * b.r2.lo + v.lo.w * b.r3.lo
    + v.hi.x * b.r4.lo + v.hi.y * b.r5.lo + v.hi.z * b.r6.lo + v.hi.w * b.r7.lo;
  let hi = v.lo.x * b.r0.hi + v.lo.y * b.r1.hi + v.lo.z * b.r2.hi + v.lo.w * b.r3.hi
    + v.hi.x * b.r4.hi + v.hi.y * b.r5.hi + v.hi.z * b.r6.hi + v.hi.w * b.r7.hi;
  return Eight(s.lo + lo, s.hi + hi);
}

fn add_octet(s: ptr<function, Octet>, v: Spread, b: Octet) {
  (*s).r0 = add((*s).r0, row_of(v, 0u), b);
  (*s).r1 = add((*s).r1, row_of(v, 1u), b);
  (*s).r2 = add((*s).r2, row_of(v, 2u), b);
  (*s).r3 = add((*s).r3, row_of(v, 3u), b);
  (*s).r4 = add((*s).r4, row_of(v, 4u), b);
  (*s).r5 = add((*s).r5, row_of(v, 5u), b);
  (*s).r6 = add((*s).r6, row_of(v, 6u), b);
  (*s).r7 = add((*s).r7, row_of(v, 7u), b);
}

fn store(expert: u32, n: u32, k: u32, s: Eight) {
  if n < params.rows { store_eight((expert * params.rows + n) * params.columns, k, s); }
}

fn store_octet(expert: u32, n: u32, k: u32, s: Octet) {
  store(expert, n, k, s.r0); store(expert, n + 1u, k, s.r1);
  store(expert, n + 2u, k, s.r2); store(expert, n + 3u, k, s.r3);
  store(expert, n + 4u, k, s.r4); store(expert, n + 5u, k, s.r5);
  store(expert, n + 6u, k, s.r6); store(expert, n + 7u, k, s.r7);
}

fn stretch(expert: u32, slots: Slots, n: u32, k: u32, lane: u32) {
  var s0 = Octet();
  var s1 = Octet();
  var slot = slots.first;
  // The test stands at the loop's end: llvmpipe runs the body of a `for` once more with all lanes off.
  // (Both eights of rows loaded before either is added: no difference.)
  if slot < slots.end {
    loop {
      let b = load_columns(slot, slots.end, k);
      add_octet(&s0, load_spread(slot, slots.end, n, lane), b);
      add_octet(&s1, load_spread(slot, slots.end, n + 8u, lane), b);
      continuing { slot += 8u; break if slot >= slots.end; }
    }
  }
  store_octet(expert, n, k, s0);
  store_octet(expert, n + 8u, k, s1);
}

@compute @workgroup_size(WG)
fn weight_gradient_register(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = flat(group, groups);
  let expert = id / (params.across * params.down);
  if expert >= params.experts { return; }
  let slots = slots_of(expert);
  // An expert without slots has nothing to add.
  if slots.first >= slots.end && params.add == 1u { return; }
  let n = id % params.down * 16u;
  let first = id / params.down % params.across * (SPAN * 8u * WG);
  for (var j = 0u; j < SPAN; j++) {
    let k = first + j * 8u * WG;
    if k < params.columns { stretch(expert, slots, n, k + 8u * lane, lane); }
  }
}
