// out[s, h] = x[token_of[first_slot + s] - first_token, h]; where that is no row of x: 0, or left alone
// (keep). Where `planned`, token_of is a plan, and slots past those it holds (its first word) are 0.
//   x [tokens, hidden], out [slots, hidden] of one type, copied word by word; token_of u32
// Grid: ceil(slots * lanes / WG) groups; one lane every lanes-th Vector of a row.
// Pieces: common/grid.

struct Params {
  tokens: u32,
  slots: u32,
  vectors: u32,     // of a row
  lanes: u32,       // of a row
  first_token: u32, // that of x's first row
  first_slot: u32,  // place of out's first row in token_of
  keep: u32,
  planned: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<Vector>;
@group(0) @binding(2) var<storage, read> token_of: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<Vector>;

@compute @workgroup_size(WG)
fn gather(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let lane = flat(group, groups) * WG + index;
  let s = lane / params.lanes;
  if s >= params.slots {
    return;
  }
  let to = s * params.vectors;
  var t = token_of[params.first_slot + s] - params.first_token;
  if params.planned == 1u && s >= token_of[0] {
    t = params.tokens; // no row
  }
  let source = t * params.vectors;
  if t < params.tokens {
    var i = lane % params.lanes; // there are no more lanes than vectors
    loop {
      out[to + i] = x[source + i];
      continuing { i += params.lanes; break if i >= params.vectors; }
    }
  } else if params.keep == 0u {
    for (var i = lane % params.lanes; i < params.vectors; i += params.lanes) {
      out[to + i] = Vector();
    }
  }
}
