// Tokens of range b of `offsets` ([ranges + 1], any value): made monotone by a running maximum, and at most
// `tokens`.
// Contract: all WG lanes call, in uniform control flow; all get the result, which is uniform.
var<workgroup> offset_maxima: array<u32, WG>;
var<workgroup> offset_range: vec2<u32>;

fn token_range(index: u32, b: u32, tokens: u32) -> vec2<u32> {
  var highest = 0u;
  for (var i = index; i <= b; i += WG) {
    highest = max(highest, min(offsets[i], tokens));
  }
  offset_maxima[index] = highest;
  workgroupBarrier();
  if index == 0u {
    for (var i = 1u; i < min(WG, b + 1u); i++) {
      highest = max(highest, offset_maxima[i]);
    }
    offset_range = vec2(highest, max(highest, min(offsets[b + 1u], tokens)));
  }
  return workgroupUniformLoad(&offset_range);
}
