// A run: what a lane loads of a column at once, all under way together. Here four words of floats.
// Needs a format of floats and weights.wgsl or weights_rows.wgsl. Twin of run_blocks.wgsl.
const RUN_DEPTH: u32 = 4u * BLOCK_DEPTH;

struct Run {
  w0: vec4<u32>,
  w1: vec4<u32>,
  w2: vec4<u32>,
  w3: vec4<u32>,
}

fn load_run(up: bool, base: u32, run: u32) -> Run {
  let chunk = 4u * run;
  return Run(
    load_weights(up, base, chunk), load_weights(up, base, chunk + 1u),
    load_weights(up, base, chunk + 2u), load_weights(up, base, chunk + 3u));
}

// The same with zeros past the end of the column.
fn load_run_tail(up: bool, base: u32, run: u32) -> Run {
  let chunk = 4u * run;
  let chunks = weight_chunks();
  let left = select(0u, chunks - chunk, chunk < chunks);
  var words: Run;
  if left > 0u { words.w0 = load_weights(up, base, chunk); }
  if left > 1u { words.w1 = load_weights(up, base, chunk + 1u); }
  if left > 2u { words.w2 = load_weights(up, base, chunk + 2u); }
  if left > 3u { words.w3 = load_weights(up, base, chunk + 3u); }
  return words;
}

fn word_of(run: Run, i: u32) -> vec4<u32> {
  switch i {
    case 0u: { return run.w0; }
    case 1u: { return run.w1; }
    case 2u: { return run.w2; }
    default: { return run.w3; }
  }
}

// Floats have none.
fn scale_of(run: Run) -> vec4<f32> {
  return vec4<f32>();
}

// Values 4 i to 4 i + 3 of a run; i is a constant wherever this is called.
fn run_four(run: Run, scale: vec4<f32>, i: u32) -> vec4<f32> {
  const FOURS = BLOCK_DEPTH / 4u;
  let word = word_of(run, i / FOURS);
  if i % FOURS == 0u {
    return unpack_low(word);
  }
  return unpack_high(word);
}
