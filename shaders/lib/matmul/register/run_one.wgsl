// A run of eight values of k: one step. With a loop of one step around it llvmpipe, which keeps the sums of a
// loop in memory, took a quarter to a half longer. Needs pair_f32.wgsl, pair_halves.wgsl or pair_rows.wgsl.
// Twin of run_four.wgsl.
const RUN_STEPS: u32 = 1u;

alias Loads = Pairs;

fn add_run(
  rows: u32, s0: ptr<function, Octet>, s1: ptr<function, Octet>,
  b: Block, step: u32, x0: RowBases, x1: RowBases,
) {
  add_rows(rows, s0, s1, load_pairs(b, step), x0, x1, step);
}
