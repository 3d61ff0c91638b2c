// MXFP4: `2^(e - 128)` times one of 0, 1, 2, 3, 4, 6, 8, 12 and their negatives. A word of 8 e (u8), half of
// it unused; then a word a run, four bits a value. Needs run_blocks.wgsl.
const SCALE_WORDS: u32 = 1u;
const CODE_WORDS: u32 = 1u;
const CODE_BITS: u32 = 4u;
const RUNS_OF_SCALE: u32 = 4u;

fn code_word(place: u32, i: u32) -> u32 {
  return 1u + place;
}

// The power of two in two factors that are normal numbers.
fn scale_of(run: Run) -> vec4<f32> {
  let e = (run.scales[run.place / 4u] >> (8u * (run.place % 4u))) & 255u;
  let half = e / 2u;
  return vec4<f32>(bitcast<f32>((half + 63u) << 23u), bitcast<f32>((e - half + 63u) << 23u), 0.0, 0.0);
}

fn run_four(run: Run, scale: vec4<f32>, i: u32) -> vec4<f32> {
  let codes = (vec4<u32>(nibbles_of(run.codes, i)) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(15u);
  let magnitude = vec4<f32>((vec4<u32>(0xc8643210u) >> ((codes & vec4<u32>(7u)) * 4u)) & vec4<u32>(15u));
  return select(magnitude, -magnitude, codes >= vec4<u32>(8u)) * scale.x * scale.y;
}
