// What a lane brings of weights to a step of matmul_tile: half a run of a column, or GATED a quarter of one
// of each matrix. Two steps load the same run, the second from the cache. Needs run_blocks.wgsl. Twin of
// bring_words.wgsl.
const TILE_DEPTH: u32 = 16u;

struct Brought {
  left: Run,
  right: Run,    // GATED
  four: u32,     // the first four values of the run that this lane brings
}

fn bring(base: u32, lane: u32, step: u32) -> Brought {
  var next: Brought;
  next.left = load_run(false, base, step / 2u);
  if GATED { next.right = load_run(true, base, step / 2u); }
  next.four = step % 2u * 4u + select(0u, lane / 64u * 2u, GATED);
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
    put_four(k4, column, run_four(next.left, left, next.four));
    put_four(k4 + 1u, column, run_four(next.left, left, next.four + 1u));
    put_four(k4, column + 64u, run_four(next.right, right, next.four));
    put_four(k4 + 1u, column + 64u, run_four(next.right, right, next.four + 1u));
  } else {
    put_four(0u, lane, run_four(next.left, left, next.four));
    put_four(1u, lane, run_four(next.left, left, next.four + 1u));
    put_four(2u, lane, run_four(next.left, left, next.four + 2u));
    put_four(3u, lane, run_four(next.left, left, next.four + 3u));
  }
}
