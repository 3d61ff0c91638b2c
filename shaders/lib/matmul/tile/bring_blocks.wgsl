// What a lane brings of weights to a step of matmul_tile: half a run of a column, or GATED a quarter of one
// of each matrix. Two steps load the same run, the second from the cache. Needs run_blocks.wgsl. Twin of
// bring_words.wgsl.
const TILE_DEPTH: u32 = 16u;

struct Brought {
  left: Run,
  right: Run,    // GATED
  four: u32,     // the first four values of the run that this lane brings
}

// Of a run what holds the fours from `four` on that a lane brings (GATED two, else four), and no more: what
// it carries across barriers takes registers. What is there stands wherever run_four may look for it.
fn load_part(up: bool, base: u32, run: u32, four: u32) -> Run {
  let block = base + run / 8u * (BLOCK_WORDS * PANEL);
  let place = run % 8u;
  var words: Run;
  words.place = place;
  if RUNS_OF_SCALE > 0u {
    words.scales = vec4<u32>(load_part_of(up, block, 0u, place / max(RUNS_OF_SCALE, 1u)));
  } else {
    words.scales = load_weights(up, block, 0u);
  }
  if SCALE_WORDS > 1u { words.more_scales = load_weights(up, block, 1u); }
  if CODE_BITS == 8u {
    let word = code_word(place, four / 4u);
    if GATED {
      let a = load_part_of(up, block, word, four % 4u);
      words.codes = vec4<u32>(a, load_part_of(up, block, word, four % 4u + 1u), 0u, 0u).xyxy;
    } else {
      words.codes = load_weights(up, block, word);
    }
    words.more_codes = words.codes;
  } else {
    let word = code_word(place, 0u);
    let a = load_part_of(up, block, word, four / 2u);
    words.codes = vec4<u32>(a);
    if !GATED {
      words.codes = vec4<u32>(a, load_part_of(up, block, word, four / 2u + 1u), 0u, 0u).xyxy;
    }
    if CODE_WORDS > 1u {
      let twos = load_part_of(up, block, code_word(place, 1u), place % 2u * 2u + four / 4u);
      words.more_codes = vec4<u32>(twos);
    }
  }
  return words;
}

fn bring(base: u32, lane: u32, step: u32) -> Brought {
  var next: Brought;
  next.four = step % 2u * 4u + select(0u, lane / 64u * 2u, GATED);
  next.left = load_part(false, base, step / 2u, next.four);
  if GATED { next.right = load_part(true, base, step / 2u, next.four); }
  return next;
}

// Blocks are padded: the last step has one.
fn bring_tail(base: u32, lane: u32, step: u32) -> Brought {
  return bring(base, lane, step);
}

fn put_brought(lane: u32, next: Brought) {
  let left = scale_of(next.left);
  if GATED {
    let right = scale_of(next.right);
    let k4 = lane / 64u * 2u;
    let column = lane % 64u;
    put_four(k4, column, 0u, run_four(next.left, left, next.four));
    put_four(k4 + 1u, column, 0u, run_four(next.left, left, next.four + 1u));
    put_four(k4, column, 16u, run_four(next.right, right, next.four));
    put_four(k4 + 1u, column, 16u, run_four(next.right, right, next.four + 1u));
  } else {
    put_four(0u, lane, 0u, run_four(next.left, left, next.four));
    put_four(1u, lane, 0u, run_four(next.left, left, next.four + 1u));
    put_four(2u, lane, 0u, run_four(next.left, left, next.four + 2u));
    put_four(3u, lane, 0u, run_four(next.left, left, next.four + 3u));
  }
}
