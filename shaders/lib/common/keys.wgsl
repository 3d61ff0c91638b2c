// Order-preserving keys: f32 bits -> u32, so that every comparison is an integer one.
// higher value, higher key; +0 == -0; NaN = 1, below -inf; 0 is left for "not eligible".
fn key(bits: u32) -> u32 {
  // No early return: some compilers (SwiftShader's) need memory without end to inline many of those.
  let magnitude = bits & 0x7fffffffu;
  let b = select(bits, 0u, magnitude == 0u);
  let number = select(b | 0x80000000u, ~b, (b >> 31u) == 1u);
  return select(number, 1u, magnitude > 0x7f800000u);
}

// The f32 of a key, as bits; a NaN for that of NaN.
fn bits_of_key(k: u32) -> u32 {
  return select(~k, k & 0x7fffffffu, (k >> 31u) == 1u);
}

fn is_nan(bits: u32) -> bool {
  return (bits & 0x7fffffffu) > 0x7f800000u;
}

fn is_finite(bits: u32) -> bool {
  return (bits & 0x7f800000u) != 0x7f800000u;
}

// A subnormal f32 given as bits, in units of the smallest one.
fn units(bits: u32) -> i32 {
  let magnitude = i32(bits & 0x7fffffu);
  return select(magnitude, -magnitude, (bits >> 31u) == 1u);
}

// a + b for any two f32 given as bits; WGSL's own sum is only defined for finite ones, and may take
// subnormals for 0.
fn add_bits(a: u32, b: u32) -> u32 {
  if ((a | b) & 0x7f800000u) == 0u {
    let sum = units(a) + units(b);
    return u32(abs(sum)) | select(0u, 0x80000000u, sum < 0);
  }
  if is_finite(a) && is_finite(b) {
    return bitcast<u32>(bitcast<f32>(a) + bitcast<f32>(b));
  }
  if is_nan(a) || is_nan(b) || (!is_finite(a) && !is_finite(b) && a != b) {
    return 0x7fc00000u;
  }
  return select(a, b, is_finite(a));
}
