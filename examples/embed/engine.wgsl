// The engine's own kernels: `b = norm(a)`, a lane a token; `c = a + b`, a lane a value.
@group(0) @binding(0) var<storage, read_write> a: array<f32>;
@group(0) @binding(1) var<storage, read_write> b: array<f32>;
@group(0) @binding(2) var<storage, read_write> c: array<f32>;

@compute @workgroup_size(64)
fn norm(@builtin(global_invocation_id) id: vec3<u32>) {
    let first = id.x * 64u;
    if first >= arrayLength(&a) { return; }
    var sum = 1e-6;
    for (var i = first; i < first + 64u; i++) { sum += a[i] * a[i] / 64.0; }
    for (var i = first; i < first + 64u; i++) { b[i] = a[i] / sqrt(sum); }
}

@compute @workgroup_size(64)
fn add(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < arrayLength(&a) { c[id.x] = a[id.x] + b[id.x]; }
}
