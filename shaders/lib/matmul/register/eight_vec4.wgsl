// Eight values of a row of x by two loads. Needs depth % 4 == 0 and x_stride % 4 == 0.
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;

fn x_base(row: u32) -> u32 { return row * (params.x_stride / 4u); }

fn load_x(base: u32, step: u32) -> Eight {
  let last = params.depth / 4u - 1u;
  let hi = x[base + min(2u * step + 1u, last)];
  return Eight(x[base + 2u * step], select(vec4(0.0), hi, 2u * step + 1u <= last));
}
