// What a device can do at best, one entry point a ceiling. Every result can be foretold, and is compared.
//   data [items] vec4<f32>, read; out vec4<f32>, written; params: x, y of the multiply-adds; items; lanes in all
// Grid: (ceil(lanes / 64), 1, 1); a lane goes over items lane, lane + lanes, ...

struct Params { x: f32, y: f32, items: u32, lanes: u32 }
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> data: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;

// out[lane] = sum of the lane's items; four loads a round, so that one need not wait for another. items / lanes is a
// multiple of four.
@compute @workgroup_size(64)
fn read_all(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= params.lanes { return; }
    let step = params.lanes;
    var a = vec4<f32>();
    var b = a;
    var c = a;
    var d = a;
    for (var i = id.x; i < params.items; i += 4u * step) {
        a += data[i];
        b += data[i + step];
        c += data[i + 2u * step];
        d += data[i + 3u * step];
    }
    out[id.x] = a + b + c + d;
}

// out[i] = data[i]
@compute @workgroup_size(64)
fn copy_all(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= params.lanes { return; }
    let step = params.lanes;
    for (var i = id.x; i < params.items; i += 4u * step) {
        let a = data[i];
        let b = data[i + step];
        let c = data[i + 2u * step];
        let d = data[i + 3u * step];
        out[i] = a;
        out[i + step] = b;
        out[i + 2u * step] = c;
        out[i + 3u * step] = d;
    }
}

// ROUNDS times 64 multiply-adds a lane: 16 sums, four vectors, so that one need not wait for another. From 0, with
// x = y = 0.5, each goes to 1.
const ROUNDS: u32 = 512u;

@compute @workgroup_size(64)
fn multiply_add(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= params.lanes { return; }
    let x = vec4(params.x);
    let y = vec4(params.y);
    var a = vec4(f32(id.x & 1u));
    var b = a + y;
    var c = b * x;
    var d = c * x;
    for (var i = 0u; i < ROUNDS; i++) {
        a = a * x + y; b = b * x + y; c = c * x + y; d = d * x + y;
        a = a * x + y; b = b * x + y; c = c * x + y; d = d * x + y;
        a = a * x + y; b = b * x + y; c = c * x + y; d = d * x + y;
        a = a * x + y; b = b * x + y; c = c * x + y; d = d * x + y;
    }
    out[id.x] = a + b + c + d;
}

// The same with fma, which some compilers make one instruction of where they keep the others apart.
@compute @workgroup_size(64)
fn multiply_add_fused(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= params.lanes { return; }
    let x = vec4(params.x);
    let y = vec4(params.y);
    var a = vec4(f32(id.x & 1u));
    var b = a + y;
    var c = b * x;
    var d = c * x;
    for (var i = 0u; i < ROUNDS; i++) {
        a = fma(a, x, y); b = fma(b, x, y); c = fma(c, x, y); d = fma(d, x, y);
        a = fma(a, x, y); b = fma(b, x, y); c = fma(c, x, y); d = fma(d, x, y);
        a = fma(a, x, y); b = fma(b, x, y); c = fma(c, x, y); d = fma(d, x, y);
        a = fma(a, x, y); b = fma(b, x, y); c = fma(c, x, y); d = fma(d, x, y);
    }
    out[id.x] = a + b + c + d;
}

// out[0].x += 1: nothing to do but to wait for the dispatch before.
@compute @workgroup_size(1)
fn empty() {
    out[0].x += 1.0;
}
