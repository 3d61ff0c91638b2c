// A run of 32 values of k: weights are loaded once, and opened eight values at a time. Needs
// pair_blocks.wgsl. Twin of run_one.wgsl.
const RUN_STEPS: u32 = 4u;

struct Loads { p: Loaded, q: Loaded, r: Loaded, t: Loaded }

fn add_run(
  rows: u32, s0: ptr<function, Octet>, s1: ptr<function, Octet>,
  b: Block, run: u32, x0: RowBases, x1: RowBases,
) {
  let l = load_pairs(b, run);
  var e = 0u;
  loop {
    let w = Pairs(open(l.p, e), open(l.q, e), open(l.r, e), open(l.t, e));
    add_rows(rows, s0, s1, w, x0, x1, run * RUN_STEPS + e);
    continuing { e += 1u; break if e >= RUN_STEPS; }
  }
}
