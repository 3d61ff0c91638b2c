// The powers of two that kernels on matrix units scale rows and columns by. Exponents are in the form of
// those of f32. The largest value that a scale goes by becomes 2^TARGET to 2^(TARGET + 1).
const TARGET: u32 = 4u;
const ABOVE: u32 = 10u;     // how far a later value may lie above it, so that it stays below 2^15
const BELOW: u32 = 6u;      // how far the largest may lie below a scale that goes by no value at all
const RANGE: u32 = 24u;     // how far above the first step's largest a row's largest is still scaled
const NOT_FINITE: u32 = 255u;

// Small enough for 2^-e to be a normal number, and large enough for 2^e.
fn exponent_of(magnitude: u32) -> u32 {
  return clamp(magnitude >> 23u, TARGET + 1u, NOT_FINITE);
}

// The exponent to scale by. First that of what has been seen, and of 1 where nothing has. Then, where that
// did not fit, one by which the largest comes out as high as it may, which leaves the most bits to the
// others; one that stands too far above the first leaves too few, and its row goes the way of those that are
// not finite. Rows that fit keep theirs: no bit of theirs hangs on the others of a tile.
fn exponent_for(attempt: u32, magnitude: u32, before: u32) -> u32 {
  let own = exponent_of(magnitude);
  if attempt == 0u {
    return select(own, 127u, magnitude == 0u);
  }
  if fits(magnitude, before) {
    return before;
  }
  if own == NOT_FINITE || own > before + RANGE {
    return NOT_FINITE;
  }
  return max(own, TARGET + 1u + ABOVE) - ABOVE;
}

// Whether the largest magnitude lies well under this exponent.
fn fits(magnitude: u32, exponent: u32) -> bool {
  let own = exponent_of(magnitude);
  return magnitude == 0u || own == exponent
    || (own != NOT_FINITE && own <= exponent + ABOVE && own + BELOW >= exponent);
}

fn scale_down(exponent: u32) -> f32 {
  return bitcast<f32>((254u + TARGET - exponent) << 23u);
}

// 2^(row + column), of the two exponents, in two factors that are normal numbers.
fn unscaled(v: vec4<f32>, row: u32, columns: vec4<u32>) -> vec4<f32> {
  let n = vec4<u32>(row) + columns - vec4<u32>(2u * TARGET);
  let half = n / 2u;
  return v * bitcast<vec4<f32>>(half << vec4<u32>(23u)) * bitcast<vec4<f32>>((n - half) << vec4<u32>(23u));
}
