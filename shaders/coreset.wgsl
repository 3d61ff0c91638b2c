// members[block] = the experts that the block elects by RULE, v[e] being the sum of values[t, e] over the
// block's tokens t with bit t of own[e]:
//   MASS: by v[e], highest first, the shortest prefix of more than mass / 2^24 of the sum of all v, at least
//     `count`; mass >= 2^24: every expert with a vote, and at least `count` in all; a sum of 0 or less:
//     `count`
//   VOTE: the `count` highest v
//   CAPACITY: the `count` highest maxima over the block's tokens of values[t, e]; NaN ranks below -inf
//   UNION: every e with a bit of one of the block's tokens
// Ties go to the lower expert. Votes are integers (lib/election/votes.wgsl): no order of tokens or lanes
// matters. The first MAX_BLOCK tokens of a block have a say, the others follow.
//   values [tokens, experts] f32, any value; own [experts, ceil(tokens / 32)] bit set
//   offsets [blocks + 1] u32, clamped
//   voters [tokens] u32 where has_voters: tokens with 0 have no say; a block where none has one elects every
//     expert
//   rows [ceil(tokens / 32)] bit set, where has_rows: the tokens that take part; the others are as if they
//     were not there
//   refresh [blocks] u32, where has_refresh: a block with 0 elects nothing, and its members stay
//   members [blocks, ceil(experts / 32)] bit set, written whole; a block without tokens elects none
//   block_of [tokens] u32, written whole: block of a token, or 0xffffffff
// Grid: blocks groups; a lane owns experts index, index + WG, ...
// Pieces: common/grid, common/keys, common/offsets, common/bits, election/u64, election/votes,
//   election/elect.

struct Params {
  tokens: u32,
  experts: u32,
  blocks: u32,
  count: u32,
  mass: u32,
  has_voters: u32,
  has_rows: u32,
  has_refresh: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> values: array<u32>;
@group(0) @binding(2) var<storage, read> own_choice: array<u32>;
@group(0) @binding(3) var<storage, read> offsets: array<u32>;
@group(0) @binding(4) var<storage, read> voters: array<u32>;
@group(0) @binding(5) var<storage, read> rows: array<u32>;
@group(0) @binding(6) var<storage, read> refresh: array<u32>;
@group(0) @binding(7) var<storage, read_write> members: array<u32>;
@group(0) @binding(8) var<storage, read_write> block_of: array<u32>;

fn own_word(e: u32, w: u32) -> u32 {
  return own_choice[e * ((params.tokens + 31u) / 32u) + w];
}

fn row_word(w: u32) -> u32 {
  if params.has_rows == 1u {
    return rows[w];
  }
  return 0xffffffffu;
}

@compute @workgroup_size(WG)
fn coreset(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let block = flat(group, groups);
  if block >= params.blocks {
    return;
  }
  let range = token_range(index, block, params.tokens);
  for (var t = range.x + index; t < range.y; t += WG) {
    block_of[t] = block;
  }
  // The first and the last block also write what lies before and behind all of them.
  if block == 0u {
    for (var t = index; t < range.x; t += WG) {
      block_of[t] = 0xffffffffu;
    }
  }
  if block + 1u == params.blocks {
    for (var t = range.y + index; t < params.tokens; t += WG) {
      block_of[t] = 0xffffffffu;
    }
  }
  if params.has_refresh == 1u && refresh[block] == 0u {
    return;
  }
  elect(index, range.x, range.y, Election(params.experts, params.count, params.mass, params.has_voters));
  let chunks = (params.experts + 31u) / 32u;
  for (var c = index; c < chunks; c += WG) {
    members[block * chunks + c] = elected[c];
  }
}
