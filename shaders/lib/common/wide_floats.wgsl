// Two f32 in 64 bits: llvmpipe pays for loads and stores by their components, not by their bytes. Needs
// SHADER_INT64 and eight_values.wgsl.
fn halves(v: u64) -> vec2<f32> { return vec2(bitcast<f32>(u32(v)), bitcast<f32>(u32(v >> 32u))); }

fn joined(v: vec2<f32>) -> u64 {
  return u64(bitcast<u32>(v.x)) | (u64(bitcast<u32>(v.y)) << 32u);
}

fn four_of(v: vec2<u64>) -> vec4<f32> { return vec4(halves(v.x), halves(v.y)); }

fn wide_of(v: vec4<f32>) -> vec2<u64> { return vec2(joined(v.xy), joined(v.zw)); }

fn values_of(v: vec4<u64>) -> Eight { return Eight(four_of(v.xy), four_of(v.zw)); }
