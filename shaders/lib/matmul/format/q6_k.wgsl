// Q6_K: `d sc (q - 32)`, sc of half a run. A word of 16 sc (i8) and one of d (f32); then 8 words of the low
// four bits, one a run, and 4 of the high two, one for two runs. Needs run_blocks.wgsl.
const SCALE_WORDS: u32 = 2u;
const CODE_WORDS: u32 = 2u;
const CODE_BITS: u32 = 6u;
const RUNS_OF_SCALE: u32 = 2u;

fn code_word(place: u32, i: u32) -> u32 {
  return select(2u + place, 10u + place / 2u, i == 1u);
}

// Of the first and of the second half of the run.
fn scale_of(run: Run) -> vec4<f32> {
  let pair = bitcast<i32>(run.scales[run.place / 2u] >> (16u * (run.place % 2u)));
  let sc = vec2<f32>((vec2<i32>(pair) << vec2<u32>(24u, 16u)) >> vec2<u32>(24u));
  let d = bitcast<f32>(run.more_scales.x) * sc;
  return vec4<f32>(d.x, -32.0 * d.x, d.y, -32.0 * d.y);
}

// Exact, fused or not: every product has at most 24 bits.
fn run_four(run: Run, scale: vec4<f32>, i: u32) -> vec4<f32> {
  let twos = select(run.more_codes.xy, run.more_codes.zw, run.place % 2u == 1u);
  let high = (twos[i / 4u] >> (2u * (i % 4u))) & 0x03030303u;
  let by = select(scale.xy, scale.zw, i >= 4u);
  return bytes_of(nibbles_of(run.codes, i) | (high << 4u)) * by.x + by.y;
}
