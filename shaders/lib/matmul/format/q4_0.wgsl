// Q4_0: `d (q - 8)`. A word of 8 d (f16); then a word a run, four bits a value. Needs run_blocks.wgsl.
const SCALE_WORDS: u32 = 1u;
const CODE_WORDS: u32 = 1u;
const CODE_BITS: u32 = 4u;
const RUNS_OF_SCALE: u32 = 2u;

fn code_word(place: u32, i: u32) -> u32 {
  return 1u + place;
}

fn scale_of(run: Run) -> vec4<f32> {
  let d = half_at(run.scales, run.place);
  return vec4<f32>(d, -8.0 * d, 0.0, 0.0);
}

// Exact, fused or not: every product has at most 15 bits.
fn run_four(run: Run, scale: vec4<f32>, i: u32) -> vec4<f32> {
  return bytes_of(nibbles_of(run.codes, i)) * scale.x + scale.y;
}
