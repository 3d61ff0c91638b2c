// Eight values of a row of x by one 64-bit vector load: half the price of two vec4<f32> loads. Needs
// common/wide_floats.wgsl, depth % 8 == 0 and x_stride % 8 == 0.
@group(0) @binding(1) var<storage, read> x: array<vec4<u64>>;

// index of the row's first vector
fn x_base(row: u32) -> u32 { return row * (params.x_stride / 8u); }

fn load_x(base: u32, step: u32) -> Eight { return values_of(x[base + step]); }
