// Eight values of a run of blocks: part j of four. Formats open a run four values at a time, by numbers that
// are constants; here the part is one of the lane, and its words are put where those of part 0 are. Needs a
// format of blocks.
fn word_by(words: vec4<u32>, j: u32) -> u32 {
  return select(select(words.x, words.y, j == 1u), select(words.z, words.w, j == 3u), j >= 2u);
}

fn part_of(run: Run, j: u32) -> Run {
  var part = run;
  if CODE_BITS == 8u {
    let words = select(run.codes, run.more_codes, j >= 2u);
    let two = select(words.xy, words.zw, j % 2u == 1u);
    part.codes = vec4(two, two);
  } else {
    part.codes = vec4(word_by(run.codes, j));
  }
  if CODE_BITS == 6u {
    let twos = select(run.more_codes.xy, run.more_codes.zw, run.place % 2u == 1u);
    part.more_codes = vec4(select(twos.x, twos.y, j >= 2u) >> (4u * (j % 2u)));
  }
  return part;
}

fn part_scale(run: Run, j: u32) -> vec4<f32> {
  let scale = scale_of(run);
  // A scale for each half of the run.
  if CODE_BITS == 6u { return select(scale, scale.zwxy, j >= 2u); }
  return scale;
}
