// Unsigned integers of 64 bits as (low, high) words.
fn wide_add(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
  let low = a.x + b.x;
  return vec2(low, a.y + b.y + u32(low < a.x));
}

fn wide_sub(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
  return vec2(a.x - b.x, a.y - b.y - u32(a.x < b.x));
}

fn wide_less(a: vec2<u32>, b: vec2<u32>) -> bool {
  return a.y < b.y || (a.y == b.y && a.x < b.x);
}

fn wide_half(a: vec2<u32>) -> vec2<u32> {
  return vec2((a.x >> 1u) | (a.y << 31u), a.y >> 1u);
}

// floor(a * factor / 2^24) for factor < 2^24 and a < 2^56: dropping a bit after each addition rounds down as
// the whole does.
fn wide_part(a: vec2<u32>, factor: u32) -> vec2<u32> {
  var part = vec2<u32>();
  for (var i = 0u; i < 24u; i++) {
    if ((factor >> i) & 1u) == 1u {
      part = wide_add(part, a);
    }
    part = wide_half(part);
  }
  return part;
}
