// 8-bit floats (e4m3) times the scale of 128 values. A word of 2 scales (f32), half of it unused; then two
// words a run, a byte a value. NaN is in the scales alone. Needs run_blocks.wgsl.
const SCALE_WORDS: u32 = 1u;
const CODE_WORDS: u32 = 2u;
const CODE_BITS: u32 = 8u;
const RUNS_OF_SCALE: u32 = 4u;

fn code_word(place: u32, i: u32) -> u32 {
  return 1u + 2u * place + i;
}

// Times 2^8: what the exponent of an f16 is off by.
fn scale_of(run: Run) -> vec4<f32> {
  return vec4<f32>(bitcast<f32>(run.scales[run.place / 4u]) * 256.0, 0.0, 0.0, 0.0);
}

// Bytes 0 and 2 of a word, as f16: the same bits, the exponent of another bias.
fn halves_of(word: u32) -> vec2<f32> {
  return unpack2x16float(((word & 0x00800080u) << 8u) | ((word & 0x007f007fu) << 7u));
}

fn run_four(run: Run, scale: vec4<f32>, i: u32) -> vec4<f32> {
  let codes = select(run.codes, run.more_codes, i >= 4u);
  let word = codes[i % 4u];
  let even = halves_of(word);
  let odd = halves_of(word >> 8u);
  return vec4<f32>(even.x, odd.x, even.y, odd.y) * scale.x;
}
