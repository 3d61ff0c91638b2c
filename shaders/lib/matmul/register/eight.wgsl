// What one step of k takes of two neighbouring columns, eight values of each. Needs common/eight_values.wgsl.
struct Pair { a: Eight, b: Eight }

// First words of two neighbouring columns.
struct Columns { a: u32, b: u32 }

// A 16-byte word of weights of each.
struct Words { a: vec4<u32>, b: vec4<u32> }

fn eight_of(lo: vec4<u32>, hi: vec4<u32>) -> Eight {
  return Eight(bitcast<vec4<f32>>(lo), bitcast<vec4<f32>>(hi));
}
