// What a lane brings of one matrix's weights to a step of matmul_matrix: LANE_FOURS fours of a run of a
// column. Two steps load the same run, the second from the cache. Needs run_blocks.wgsl and
// load_blocks.wgsl. Twin of carry_words.wgsl.
struct Carried {
  run: Run,
  four: u32,     // the first four values of the run that this lane brings
}

fn carry(up: bool, base: u32, part: u32, step: u32) -> Carried {
  return Carried(load_run(up, base, step / 2u), step % 2u * 4u + part * LANE_FOURS);
}

// Blocks are padded: the last step has one.
fn carry_tail(up: bool, base: u32, part: u32, step: u32) -> Carried {
  return carry(up, base, part, step);
}

fn carried_scale(words: Carried) -> vec4<f32> {
  return scale_of(words.run);
}

// Four i of those that the lane brings.
fn carried_four(words: Carried, scale: vec4<f32>, i: u32) -> vec4<f32> {
  return run_four(words.run, scale, words.four + i);
}
