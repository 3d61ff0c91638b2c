// assigned[e, t] = 1 for the `top` eligible experts of token t with the highest values; ties go to the lower
// expert
//   values [tokens, experts] f32, any value; NaN ranks below -inf
//   coreset [blocks, ceil(experts / 32)] bit set and block_of [tokens] u32, where blocks > 0: a token may
//     have the experts of its block's coreset; block_of at least `blocks`: none
//   experts_per_token [tokens] u32, where has_tops: a token takes so many instead, `top` at most
//   rows [ceil(tokens / 32)] bit set, where has_rows: the tokens that take part; the others take none
//   assigned [experts, ceil(tokens / 32)] bit set, written whole
// Groups (group_count > 1): a group's value is the sum of its two highest eligible values. Its experts stay
// eligible if it is among the group_top best; with fewer than two eligible experts, never. A group of one
// is valued by its one expert.
// Grid: ceil(tokens / 32) groups; a group owns a column of words, LANES lanes work on a token.
// Pieces: common/grid, common/keys, common/bits, choice/experts_of_token.

struct Params {
  tokens: u32,
  experts: u32,
  top: u32,
  group_count: u32,
  group_top: u32,
  blocks: u32, // of the coresets; 0: none, all experts are eligible
  has_rows: u32,
  has_tops: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> values: array<u32>;
@group(0) @binding(2) var<storage, read> coreset: array<u32>;
@group(0) @binding(3) var<storage, read> block_of: array<u32>;
@group(0) @binding(4) var<storage, read> rows: array<u32>;
@group(0) @binding(5) var<storage, read> experts_per_token: array<u32>;
@group(0) @binding(6) var<storage, read_write> assigned: array<u32>;

fn coreset_word(at: u32) -> u32 {
  return coreset[at];
}

@compute @workgroup_size(WG)
fn token_choice(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let column = flat(group, groups);
  let columns = (params.tokens + 31u) / 32u;
  if column >= columns {
    return;
  }
  for (var e = index; e < params.experts; e += WG) {
    atomicStore(&words[e], 0u);
  }
  workgroupBarrier();
  let bit = index / LANES;
  let t = column * 32u + bit;
  var row = Row(t * params.experts, 0u, params.blocks > 0u, t < params.tokens, params.top, 0xffffffffu);
  if row.live && params.has_rows == 1u {
    row.live = ((rows[column] >> bit) & 1u) == 1u;
  }
  if row.live && params.has_tops == 1u {
    row.top = min(row.top, experts_per_token[t]);
  }
  if row.live && row.limited {
    let block = block_of[t];
    row.live = block < params.blocks;
    row.coreset = select(0u, block, row.live) * ((params.experts + 31u) / 32u);
  }
  let choice = Choice(params.experts, params.top, params.group_count, params.group_top);
  if GROUPS > 1u {
    row.groups = choose_groups(index, row, choice);
  }
  choose(index, bit, row, choice);
  workgroupBarrier();
  for (var e = index; e < params.experts; e += WG) {
    assigned[e * columns + column] = atomicLoad(&words[e]);
  }
}
