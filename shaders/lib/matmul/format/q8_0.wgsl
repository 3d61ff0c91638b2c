// Q8_0: `d q`. A word of 8 d (f16); then two words a run, a byte a value: q + 128. Needs run_blocks.wgsl.
const SCALE_WORDS: u32 = 1u;
const CODE_WORDS: u32 = 2u;
const CODE_BITS: u32 = 8u;
const RUNS_OF_SCALE: u32 = 2u;

fn code_word(place: u32, i: u32) -> u32 {
  return 1u + 2u * place + i;
}

fn scale_of(run: Run) -> vec4<f32> {
  let d = half_at(run.scales, run.place);
  return vec4<f32>(d, -128.0 * d, 0.0, 0.0);
}

// Exact, fused or not: every product has at most 19 bits.
fn run_four(run: Run, scale: vec4<f32>, i: u32) -> vec4<f32> {
  let codes = select(run.codes, run.more_codes, i >= 4u);
  return bytes_of(codes[i % 4u]) * scale.x + scale.y;
}
