// What a lane brings of weights to a step of matmul_tile: two words of floats. Needs a format of floats and
// weights.wgsl or weights_rows.wgsl. Twin of bring_blocks.wgsl.
// Deeper steps: more workgroup memory, fewer waves.
const TILE_DEPTH: u32 = 2u * BLOCK_DEPTH;

struct Brought {
  w0: vec4<u32>,
  w1: vec4<u32>,
}

// GATED: the same word of both matrices, else two words of one.
fn bring(base: u32, lane: u32, step: u32) -> Brought {
  let odd = select(0u, lane / 64u, GATED);
  return Brought(
    load_weights(false, base, 2u * step + odd),
    load_weights(GATED, base, 2u * step + select(1u, odd, GATED)));
}

// The same with zeros past the end of the column.
fn bring_tail(base: u32, lane: u32, step: u32) -> Brought {
  let odd = select(0u, lane / 64u, GATED);
  let chunks = weight_chunks();
  var next: Brought;
  if 2u * step + odd < chunks {
    next.w0 = load_weights(false, base, 2u * step + odd);
  }
  if 2u * step + select(1u, odd, GATED) < chunks {
    next.w1 = load_weights(GATED, base, 2u * step + select(1u, odd, GATED));
  }
  return next;
}

fn put_word(chunk: u32, column: u32, further: u32, w: vec4<u32>) {
  const FOURS = BLOCK_DEPTH / 4u;
  put_four(chunk * FOURS, column, further, unpack_low(w));
  if FOURS > 1u {
    put_four(chunk * FOURS + 1u, column, further, unpack_high(w));
  }
}

fn put_brought(lane: u32, next: Brought) {
  if GATED {
    put_word(lane / 64u, lane % 64u, 0u, next.w0);
    put_word(lane / 64u, lane % 64u, 16u, next.w1);
  } else {
    put_word(0u, lane, 0u, next.w0);
    put_word(1u, lane, 0u, next.w1);
  }
}
