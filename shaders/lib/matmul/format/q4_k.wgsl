// Q4_K: `d sc q - dmin m`, sc and m of a run. A word of scales: d and dmin (f16), the low four bits of each
// sc, those of each m, the high two of both; then a word a run, four bits a value. Needs run_blocks.wgsl.
const SCALE_WORDS: u32 = 1u;
const CODE_WORDS: u32 = 1u;
const CODE_BITS: u32 = 4u;
const RUNS_OF_SCALE: u32 = 0u;

fn code_word(place: u32, i: u32) -> u32 {
  return 1u + place;
}

fn scale_of(run: Run) -> vec4<f32> {
  let shift = 4u * run.place;
  let high = run.scales.w >> shift;
  let sc = ((run.scales.y >> shift) & 15u) | ((high & 3u) << 4u);
  let m = ((run.scales.z >> shift) & 15u) | ((high & 12u) << 2u);
  let d = half_of(run.scales.x);
  let dmin = half_of(run.scales.x >> 16u);
  return vec4<f32>(d * f32(sc), -dmin * f32(m), 0.0, 0.0);
}

// Rounded once, fused or not: both products are exact, of at most 21 and 17 bits.
fn run_four(run: Run, scale: vec4<f32>, i: u32) -> vec4<f32> {
  return bytes_of(nibbles_of(run.codes, i)) * scale.x + scale.y;
}
