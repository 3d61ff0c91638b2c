// What a lane brings of one matrix's weights to a step of matmul_matrix: words of floats, LANE_FOURS fours of
// one column from four `part * LANE_FOURS` of the step on. Needs a format of floats and weights.wgsl. Twin of
// carry_blocks.wgsl.
const STEP_WORDS: u32 = STEP_DEPTH / BLOCK_DEPTH;
const WORD_FOURS: u32 = BLOCK_DEPTH / 4u;
// Where a word holds more than a lane brings, two lanes load it.
const LANE_WORDS: u32 = max(LANE_FOURS / WORD_FOURS, 1u);

struct Carried {
  w0: vec4<u32>,
  w1: vec4<u32>,
  w2: vec4<u32>,
  w3: vec4<u32>,
  odd: bool,     // of one four of a word: the second
}

fn carry(up: bool, base: u32, part: u32, step: u32) -> Carried {
  let word = step * STEP_WORDS + part * LANE_FOURS / WORD_FOURS;
  var next: Carried;
  next.odd = LANE_FOURS < WORD_FOURS && part % 2u == 1u;
  next.w0 = load_weights(up, base, word);
  if LANE_WORDS > 1u { next.w1 = load_weights(up, base, word + 1u); }
  if LANE_WORDS > 2u {
    next.w2 = load_weights(up, base, word + 2u);
    next.w3 = load_weights(up, base, word + 3u);
  }
  return next;
}

// The same with zeros past the end of the column.
fn carry_tail(up: bool, base: u32, part: u32, step: u32) -> Carried {
  let word = step * STEP_WORDS + part * LANE_FOURS / WORD_FOURS;
  let chunks = weight_chunks();
  var next: Carried;
  next.odd = LANE_FOURS < WORD_FOURS && part % 2u == 1u;
  if word < chunks { next.w0 = load_weights(up, base, word); }
  if LANE_WORDS > 1u && word + 1u < chunks { next.w1 = load_weights(up, base, word + 1u); }
  if LANE_WORDS > 2u && word + 2u < chunks { next.w2 = load_weights(up, base, word + 2u); }
  if LANE_WORDS > 2u && word + 3u < chunks { next.w3 = load_weights(up, base, word + 3u); }
  return next;
}

// Floats have none.
fn carried_scale(words: Carried) -> vec4<f32> {
  return vec4<f32>();
}

fn carried_word(words: Carried, i: u32) -> vec4<u32> {
  switch i {
    case 0u: { return words.w0; }
    case 1u: { return words.w1; }
    case 2u: { return words.w2; }
    default: { return words.w3; }
  }
}

// Four i of those that the lane brings; i is a constant wherever this is called.
fn carried_four(words: Carried, scale: vec4<f32>, i: u32) -> vec4<f32> {
  let word = carried_word(words, i / WORD_FOURS);
  if LANE_FOURS < WORD_FOURS {
    return select(unpack_low(word), unpack_high(word), words.odd);
  }
  if i % WORD_FOURS == 0u {
    return unpack_low(word);
  }
  return unpack_high(word);
}
