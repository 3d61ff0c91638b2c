// One column of tokens at once: each token's own choice, the experts that each block elects, and the choice
// inside them, as token_choice.wgsl, coreset.wgsl and token_choice.wgsl do one after the other.
//   values [tokens, experts] f32, any value
//   offsets [blocks + 1] u32, clamped; voters [tokens] u32 where has_voters
//   rows [1] bit set, where has_rows: the tokens that take part; the others are as if they were not there
//   experts_per_token [tokens] u32, where has_tops: a token takes so many inside, `top` at most
//   assigned [experts] words of the bit set, written whole
//   refresh [blocks] u32, where has_refresh: a block with 0 elects nothing, and its members stay
//   members [blocks, ceil(experts / 32)] bit set, written whole
// tokens <= 32, experts <= MOST; own_top 0: the rule needs no choice of the tokens' own.
// Grid: one group.
// Pieces: common/grid, common/keys, common/offsets, common/bits, election/u64, election/votes,
//   election/elect, choice/experts_of_token.

struct Params {
  tokens: u32,
  experts: u32,
  blocks: u32,
  own_top: u32,
  top: u32,
  group_count: u32,
  group_top: u32,
  count: u32, // of the election, as the next two
  mass: u32,
  has_voters: u32,
  has_tops: u32,
  has_refresh: u32,
  has_rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> values: array<u32>;
@group(0) @binding(2) var<storage, read> offsets: array<u32>;
@group(0) @binding(3) var<storage, read> voters: array<u32>;
@group(0) @binding(4) var<storage, read> experts_per_token: array<u32>;
@group(0) @binding(5) var<storage, read> refresh: array<u32>;
@group(0) @binding(6) var<storage, read> rows: array<u32>;
@group(0) @binding(7) var<storage, read_write> assigned: array<u32>;
@group(0) @binding(8) var<storage, read_write> members: array<u32>;

fn own_word(e: u32, w: u32) -> u32 {
  return atomicLoad(&words[e]);
}

fn row_word(w: u32) -> u32 {
  if params.has_rows == 1u {
    return rows[w];
  }
  return 0xffffffffu;
}

fn is_there(t: u32) -> bool {
  return t < params.tokens && ((row_word(0u) >> t) & 1u) == 1u;
}

// Of the block that has just elected.
fn coreset_word(at: u32) -> u32 {
  return elected[at];
}

@compute @workgroup_size(WG)
fn block_choice(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  if flat(group, groups) != 0u {
    return;
  }
  for (var e = index; e < params.experts; e += WG) {
    atomicStore(&words[e], 0u);
  }
  workgroupBarrier();
  if params.own_top > 0u {
    for (var i = 0u; i < 32u; i += TEAMS) {
      let t = i + index / LANES;
      let row = Row(t * params.experts, 0u, false, is_there(t), params.own_top, 0xffffffffu);
      choose(index, t, row, Choice(params.experts, params.own_top, 1u, 1u));
    }
    workgroupBarrier();
  }

  let choice = Choice(params.experts, params.top, params.group_count, params.group_top);
  let chunks = (params.experts + 31u) / 32u;
  var inside = 0u; // tokens of the blocks so far
  for (var b = 0u; b < params.blocks; b++) {
    let range = token_range(index, b, params.tokens);
    if params.has_refresh == 1u && refresh[b] == 0u {
      for (var c = index; c < chunks; c += WG) {
        elected[c] = members[b * chunks + c];
      }
    } else {
      elect(
        index, range.x, range.y,
        Election(params.experts, params.count, params.mass, params.has_voters));
      for (var c = index; c < chunks; c += WG) {
        members[b * chunks + c] = elected[c];
      }
    }
    if range.x == range.y {
      continue;
    }
    // The block's tokens choose anew; those of blocks to come have yet to vote with what they chose.
    let block = range_bits(0u, range.x, range.y);
    inside |= block;
    for (var e = index; e < params.experts; e += WG) {
      atomicAnd(&words[e], ~block);
    }
    workgroupBarrier();
    for (var i = range.x - range.x % TEAMS; i < range.y; i += TEAMS) {
      let t = i + index / LANES;
      let live = t >= range.x && t < range.y && is_there(t);
      var row = Row(t * params.experts, 0u, true, live, params.top, 0xffffffffu);
      if row.live && params.has_tops == 1u {
        row.top = min(row.top, experts_per_token[t]);
      }
      if GROUPS > 1u {
        row.groups = choose_groups(index, row, choice);
      }
      choose(index, t, row, choice);
    }
    workgroupBarrier();
  }
  for (var e = index; e < params.experts; e += WG) {
    assigned[e] = atomicLoad(&words[e]) & inside;
  }
}
