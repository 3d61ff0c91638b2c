// Eight values of a row of x, two in a word, even depth and stride; 0 past the end of the row. Needs
// common/halves_*.
@group(0) @binding(1) var<storage, read> x: array<u32>;

fn x_base(row: u32) -> u32 { return row * (params.x_stride / 2u); }

fn x_two(base: u32, k: u32) -> vec2<f32> {
  let v = widen_two(x[base + min(k, params.depth - 2u) / 2u]);
  return select(vec2<f32>(), v, k < params.depth);
}

fn load_x(base: u32, step: u32) -> Eight {
  let k = 8u * step;
  return Eight(
    vec4<f32>(x_two(base, k), x_two(base, k + 2u)),
    vec4<f32>(x_two(base, k + 4u), x_two(base, k + 6u)));
}
