// Eight values of a row of x by one 64-bit vector load. Needs SHADER_INT64, depth % 8 == 0 and x_stride % 8
// == 0. llvmpipe pays for a load by its components, not by its bytes: half the price of two vec4<f32> loads.
@group(0) @binding(1) var<storage, read> x: array<vec4<u64>>;

fn halves(v: u64) -> vec2<f32> { return vec2(bitcast<f32>(u32(v)), bitcast<f32>(u32(v >> 32u))); }

// index of the row's first vector
fn x_base(row: u32) -> u32 { return row * (params.x_stride / 8u); }

fn load_x(base: u32, step: u32) -> Eight {
  let v = x[base + step];
  return Eight(vec4(halves(v.x), halves(v.y)), vec4(halves(v.z), halves(v.w)));
}
