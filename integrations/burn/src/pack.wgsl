// Row-major matrices `[experts, rows, depth]` to a page of packed ones: panels of 32 rows; within a panel, the four values from
// depth `4 c` on of row `n` are word `c * 32 + n`. What pads the last panel and the last word is zero.

struct Params {
    // Of a whole matrix.
    rows: u32,
    depth: u32,
    // Of the page: its first row, its number of rows and of words, and how many workgroups a row of them has.
    page_rows: u32,
    words: u32,
    across: u32,
    // Values before the page's first.
    skip: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> weights: array<f32>;
@group(0) @binding(2) var<storage, read_write> packed: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let word = (group.y * params.across + group.x) * 64u + lane;
    if (word >= params.words) {
        return;
    }
    let depth_words = (params.depth + 3u) / 4u;
    let panel_words = 32u * depth_words;
    let panels = (params.page_rows + 31u) / 32u;
    let panel = word / panel_words;
    let expert = panel / panels;
    let row = panel % panels * 32u + word % 32u;
    let column = word % panel_words / 32u * 4u;
    var value = vec4<f32>();
    if (row < params.page_rows) {
        let first = params.skip + (expert * params.rows + row) * params.depth + column;
        for (var i = 0u; i < min(4u, params.depth - column); i++) {
            value[i] = weights[first + i];
        }
    }
    packed[word] = value;
}
