// What the matrix units can do at best: products of squares in registers. Put together by units.rs, which
// names the types and sizes.
//   out [2] u32: how many lanes have seen a wrong sum, added up; subgroups of a workgroup
// Grid: (workgroups, 1, 1).

// Four sums a subgroup, so that one need not wait for another.
const ROUNDS: u32 = 1024u;
const WG: u32 = 256u;
// Every entry of a sum grows by SIDE / 16 a round.
const VALUE = Input(0.25);

@group(0) @binding(0) var<storage, read_write> out: array<atomic<u32>, 2>;
var<workgroup> input: array<Input, SIDE * SIDE>;
var<workgroup> sums: array<array<f32, SIDE * SIDE>, 4>;

@compute @workgroup_size(WG)
fn multiply_squares(
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
    for (var i = lane; i < SIDE * SIDE; i += WG) {
        input[i] = VALUE;
    }
    workgroupBarrier();
    let a = coopLoadT<InputA>(&input[0], SIDE);
    let b = coopLoad<InputB>(&input[0], SIDE);
    var s0 = Sum();
    var s1 = Sum();
    var s2 = Sum();
    var s3 = Sum();
    for (var i = 0u; i < ROUNDS; i++) {
        s0 = coopMultiplyAdd(a, b, s0);
        s1 = coopMultiplyAdd(a, b, s1);
        s2 = coopMultiplyAdd(a, b, s2);
        s3 = coopMultiplyAdd(a, b, s3);
    }
    // One subgroup after another, through the same memory.
    for (var turn = 0u; turn < subgroups; turn++) {
        workgroupBarrier();
        if subgroup == turn {
            coopStoreT(s0, &sums[0][0], SIDE);
            coopStoreT(s1, &sums[1][0], SIDE);
            coopStoreT(s2, &sums[2][0], SIDE);
            coopStoreT(s3, &sums[3][0], SIDE);
        }
        workgroupBarrier();
        var wrong = false;
        for (var i = lane; i < SIDE * SIDE; i += WG) {
            for (var j = 0u; j < 4u; j++) {
                wrong |= sums[j][i] != f32(ROUNDS * SIDE) / 16.0;
            }
        }
        if wrong {
            atomicAdd(&out[0], 1u);
        }
    }
    atomicMax(&out[1], subgroups);
}
