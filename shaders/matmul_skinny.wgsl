// out[s, n] = sum over k of x[row(s), k] * W[expert of s][n, k]                                  (plain)
// out[s, n] = activate(sum over k of x[row(s), k] * Wgate[e][n, k], the same sum with Wup)          (GATED)
// for 1 to TILE_ROWS (8 or 4) slots of one expert: weights are read once, 16 bytes a load, and are what it costs.
//
//   x        [rows, K] f32; row(s) = token_of[slot] (GATHER) or s
//   plan     u32: offsets, token_of, items and their offsets (lib/matmul/tile_plan.wgsl); none in the dense variant
//   weights, weights_up  [N, K] of each expert of the page, in the layout of lib/matmul/layout.wgsl
//   out      [slots, N] f32, row-major
// Grid: ceil(N / OUT_COLUMNS) * items groups, items slowest; OUT_COLUMNS = 2 * COLUMNS, GATED COLUMNS.
// A lane owns two columns of weights (gate and up of one column, or n and n + COLUMNS) and one of SPLIT parts of K.

const WG: u32 = COLUMNS * SPLIT;
const MATRICES: u32 = select(1u, 2u, GATED);
const OUT_COLUMNS: u32 = COLUMNS * 2u / MATRICES;
const RUN: u32 = 4u;                                    // vectors of each column that a lane takes a step, all under way at once
const STEP_CHUNKS: u32 = RUN * SPLIT;
const STEP_DEPTH: u32 = STEP_CHUNKS * WEIGHT_LANES;
// Rows that the workgroup brings with one load a lane: TILE_ROWS or more (then copies of the last). No branch around
// the load of x: with one, the weights waited behind it.
const X_ROWS: u32 = WG * 4u / STEP_DEPTH;
const_assert X_ROWS >= TILE_ROWS;                       // so COLUMNS >= TILE_ROWS * WEIGHT_LANES
const X_TILE: u32 = STEP_DEPTH * X_ROWS;
const SUMS: u32 = WG * TILE_ROWS;                       // two columns a lane, half of the parts

@group(0) @binding(5) var<storage, read_write> out: array<f32>;

// Two tiles of x, [k][row], in turn: one barrier a step. At the end the sums of the parts.
var<workgroup> values: array<f32, max(2u * X_TILE, SUMS)>;

struct Run {
    w0: vec4<u32>,
    w1: vec4<u32>,
    w2: vec4<u32>,
    w3: vec4<u32>,
}

// Sums of a lane: rows 0 to 3 (top) and 4 to 7 of its first (left) and second column (GATED: left gate, right up).
struct Sums {
    top_left: vec4<f32>,
    top_right: vec4<f32>,
    bottom_left: vec4<f32>,
    bottom_right: vec4<f32>,
}

fn load_run(up: bool, base: u32, chunk: u32) -> Run {
    return Run(
        load_weights(up, base, chunk), load_weights(up, base, chunk + 1u),
        load_weights(up, base, chunk + 2u), load_weights(up, base, chunk + 3u));
}

// The first `left` vectors of a run, zeros after them.
fn load_run_tail(up: bool, base: u32, chunk: u32, left: u32) -> Run {
    var run: Run;
    if left > 0u { run.w0 = load_weights(up, base, chunk); }
    if left > 1u { run.w1 = load_weights(up, base, chunk + 1u); }
    if left > 2u { run.w2 = load_weights(up, base, chunk + 2u); }
    if left > 3u { run.w3 = load_weights(up, base, chunk + 3u); }
    return run;
}

fn put_x(at: u32, v: vec4<f32>) {
    values[at] = v.x;
    values[at + X_ROWS] = v.y;
    values[at + 2u * X_ROWS] = v.z;
    values[at + 3u * X_ROWS] = v.w;
}

// Four rows at one k; compilers make one 16-byte read of them.
fn x_four(at: u32) -> vec4<f32> {
    return vec4<f32>(values[at], values[at + 1u], values[at + 2u], values[at + 3u]);
}

fn add_one(sums: Sums, at: u32, left: f32, right: f32) -> Sums {
    let top = x_four(at);
    var next = sums;
    next.top_left = fma(top, vec4<f32>(left), sums.top_left);
    next.top_right = fma(top, vec4<f32>(right), sums.top_right);
    if TILE_ROWS > 4u {
        let bottom = x_four(at + 4u);
        next.bottom_left = fma(bottom, vec4<f32>(left), sums.bottom_left);
        next.bottom_right = fma(bottom, vec4<f32>(right), sums.bottom_right);
    }
    return next;
}

fn add_four(sums: Sums, at: u32, left: vec4<f32>, right: vec4<f32>) -> Sums {
    var next = add_one(sums, at, left.x, right.x);
    next = add_one(next, at + X_ROWS, left.y, right.y);
    next = add_one(next, at + 2u * X_ROWS, left.z, right.z);
    return add_one(next, at + 3u * X_ROWS, left.w, right.w);
}

fn add_vector(sums: Sums, at: u32, left: vec4<u32>, right: vec4<u32>) -> Sums {
    var next = add_four(sums, at, unpack_low(left), unpack_low(right));
    if WEIGHT_LANES > 4u {
        next = add_four(next, at + 4u * X_ROWS, unpack_high(left), unpack_high(right));
    }
    return next;
}

fn add_run(sums: Sums, at: u32, left: Run, right: Run) -> Sums {
    var next = add_vector(sums, at, left.w0, right.w0);
    next = add_vector(next, at + WEIGHT_LANES * X_ROWS, left.w1, right.w1);
    next = add_vector(next, at + 2u * WEIGHT_LANES * X_ROWS, left.w2, right.w2);
    return add_vector(next, at + 3u * WEIGHT_LANES * X_ROWS, left.w3, right.w3);
}

fn put_sum(at: u32, plane: u32, v: vec4<f32>) {
    values[at] = v.x;
    values[at + plane] = v.y;
    values[at + 2u * plane] = v.z;
    values[at + 3u * plane] = v.w;
}

fn get_sum(at: u32, plane: u32) -> vec4<f32> {
    return vec4<f32>(values[at], values[at + plane], values[at + 2u * plane], values[at + 3u * plane]);
}

fn store_rows(tile: Tile, row: u32, column: u32, v: vec4<f32>) {
    if column < params.column_end {
        let at = (tile.first + row - params.out_slot) * params.out_stride + params.column_base + column;
        if row < tile.rows { out[at] = v.x; }
        if row + 1u < tile.rows { out[at + params.out_stride] = v.y; }
        if row + 2u < tile.rows { out[at + 2u * params.out_stride] = v.z; }
        if row + 3u < tile.rows { out[at + 3u * params.out_stride] = v.w; }
    }
}

fn finish(tile: Tile, row: u32, column: u32, left: vec4<f32>, right: vec4<f32>) {
    if GATED {
        store_rows(tile, row, column, activate(left, right));
    } else {
        store_rows(tile, row, column, left);
        store_rows(tile, row, column + COLUMNS, right);
    }
}

@compute @workgroup_size(WG)
fn matmul_skinny(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>) {
    let across = (params.column_end - params.column_begin + OUT_COLUMNS - 1u) / OUT_COLUMNS;
    let id = flat(group, groups);
    let tile = tile_at(id / across);
    if tile.rows == 0u {
        return;
    }
    let part = lane / COLUMNS;
    let column = params.column_begin + id % across * OUT_COLUMNS + lane % COLUMNS;

    // What this lane brings of x: four values of one row. Rows first along lanes: k first put 32 lanes on one bank.
    let row = lane % X_ROWS;
    let k = lane / X_ROWS * 4u;
    let x_row = x_base(x_row_of(tile.first + min(row, tile.rows - 1u)));
    let x_put = k * X_ROWS + row;
    let x_get = part * (RUN * WEIGHT_LANES * X_ROWS);

    let last_column = params.columns - 1u;
    let left_at = weight_base(tile.expert, min(column, last_column));
    let right_at = weight_base(tile.expert, min(select(column + COLUMNS, column, GATED), last_column));

    // The last step goes first: only its loads need guards, and the loop has none.
    let steps = (params.depth - 1u) / STEP_DEPTH;
    let chunks = weight_chunks();
    var sums: Sums;
    {
        let chunk = steps * STEP_CHUNKS + part * RUN;
        let count = select(0u, chunks - chunk, chunk < chunks);
        let left = load_run_tail(false, left_at, chunk, count);
        let right = load_run_tail(GATED, right_at, chunk, count);
        let at = steps % 2u * X_TILE;
        put_x(at + x_put, load_x_tail(x_row, steps * STEP_DEPTH + k));
        workgroupBarrier();
        sums = add_run(sums, at + x_get, left, right);
    }
    for (var i = steps; i > 0u; i--) {
        let step = i - 1u;
        let chunk = step * STEP_CHUNKS + part * RUN;
        let at = step % 2u * X_TILE;
        // x first: loads return in order, and x must be there before the barrier, the weights only after it.
        let brought = load_x(x_row, step * STEP_DEPTH + k);
        let left = load_run(false, left_at, chunk);
        let right = load_run(GATED, right_at, chunk);
        put_x(at + x_put, brought);
        workgroupBarrier();
        sums = add_run(sums, at + x_get, left, right);
    }

    // The parts are added in pairs, halving, always in this order.
    for (var half = SPLIT / 2u; half > 0u; half /= 2u) {
        let plane = half * COLUMNS;
        workgroupBarrier();
        if part >= half && part < 2u * half {
            let at = lane - plane;
            put_sum(at, plane, sums.top_left);
            put_sum(at + 4u * plane, plane, sums.top_right);
            if TILE_ROWS > 4u {
                put_sum(at + 8u * plane, plane, sums.bottom_left);
                put_sum(at + 12u * plane, plane, sums.bottom_right);
            }
        }
        workgroupBarrier();
        if part < half {
            sums.top_left += get_sum(lane, plane);
            sums.top_right += get_sum(lane + 4u * plane, plane);
            if TILE_ROWS > 4u {
                sums.bottom_left += get_sum(lane + 8u * plane, plane);
                sums.bottom_right += get_sum(lane + 12u * plane, plane);
            }
        }
    }
    if part == 0u {
        finish(tile, 0u, column, sums.top_left, sums.top_right);
        if TILE_ROWS > 4u {
            finish(tile, 4u, column, sums.bottom_left, sums.bottom_right);
        }
    }
}
