// Eight values of a row of x, any depth and stride; 0 past the end of the row.
@group(0) @binding(1) var<storage, read> x: array<f32>;

fn x_base(row: u32) -> u32 { return row * params.x_stride; }

fn x_value(base: u32, k: u32) -> f32 {
  let v = x[base + min(k, params.depth - 1u)];
  return select(0.0, v, k < params.depth);
}

fn load_x(base: u32, step: u32) -> Eight {
  let k = 8u * step;
  return Eight(
    vec4(x_value(base, k), x_value(base, k + 1u), x_value(base, k + 2u), x_value(base, k + 3u)),
    vec4(x_value(base, k + 4u), x_value(base, k + 5u), x_value(base, k + 6u), x_value(base, k + 7u)));
}
