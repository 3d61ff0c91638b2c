// A run: what a lane loads of a column at once, all under way together. Here 32 values of a block of 256:
// its words of scales and those of its codes. Needs a format of blocks, which says where they are, and for
// how many runs four bytes of the first word of scales stand (RUNS_OF_SCALE; 0: a run needs the whole word).
// Twin of run_words.wgsl.
const RUN_DEPTH: u32 = 32u;

struct Run {
  scales: vec4<u32>,
  more_scales: vec4<u32>,   // where SCALE_WORDS is 2
  codes: vec4<u32>,
  more_codes: vec4<u32>,    // where CODE_WORDS is 2
  place: u32,               // of the run in its block, 0 to 7
}

// The four bytes of a word.
fn bytes_of(word: u32) -> vec4<f32> {
  return vec4<f32>((vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(255u));
}

// Codes 4 i to 4 i + 3 of four bits each, as bytes.
fn nibbles_of(codes: vec4<u32>, i: u32) -> u32 {
  return (codes[i / 2u] >> (4u * (i % 2u))) & 0x0f0f0f0fu;
}

// The f16 in the low half of a word. By integers: scales are often subnormal, which a driver may flush where
// it widens halves of itself.
fn half_of(word: u32) -> f32 {
  let magnitude = word & 0x7fffu;
  let special = select(0u, 0x38000000u, magnitude >= 0x7c00u);
  let normal = bitcast<f32>((magnitude << 13u) + 0x38000000u + special);
  let value = select(normal, f32(magnitude) * 5.9604644775390625e-8, magnitude < 0x400u);
  return select(value, -value, (word & 0x8000u) != 0u);
}

// The f16 at a place of eight.
fn half_at(words: vec4<u32>, place: u32) -> f32 {
  return half_of(words[place / 2u] >> (16u * (place % 2u)));
}
