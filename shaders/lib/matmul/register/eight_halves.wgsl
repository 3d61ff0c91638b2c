// Eight values of a row of x, two in a word, by one load. Needs depth % 8 == 0, x_stride % 8 == 0 and
// common/halves_*.
@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;

fn x_base(row: u32) -> u32 { return row * (params.x_stride / 8u); }

fn load_x(base: u32, step: u32) -> Eight {
  let w = x[base + step];
  return Eight(
    vec4<f32>(widen_two(w.x), widen_two(w.y)),
    vec4<f32>(widen_two(w.z), widen_two(w.w)));
}
