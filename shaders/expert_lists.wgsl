// The tokens of each expert as lists, in token order, from the bit set.
//   assigned [experts, ceil(tokens / 32)] bit set; bits past the last token count for nothing
//   round COUNT: counts[e] = tokens of expert e
//   round JOIN, after COUNT: offsets[e] = min(counts[0] + ... + counts[e - 1], room), offsets [experts + 1];
//     list[offsets[e] + i] = token i of expert e; the rest of list [room] is 0xffffffff
//   round PAD, alone: list[e, i] = token i of expert e, list [experts, room]; 0xffffffff past its tokens;
//     counts[e] = min(tokens of expert e, room)
//   JOIN, PAD: lost[e] = tokens of expert e that found no room
// Grid: experts groups; a lane owns a stretch of the expert's words.
// Pieces: common/grid, common/bits, plan/prefix_sums.

struct Params {
  tokens: u32,
  experts: u32,
  room: u32,
  round: u32,
}

const COUNT: u32 = 0u;
const JOIN: u32 = 1u;
const PAD: u32 = 2u;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> assigned: array<u32>;
@group(0) @binding(2) var<storage, read_write> counts: array<u32>;
@group(0) @binding(3) var<storage, read_write> offsets: array<u32>;
@group(0) @binding(4) var<storage, read_write> list: array<u32>;
@group(0) @binding(5) var<storage, read_write> lost: array<u32>;

fn word_of(e: u32, w: u32, columns: u32) -> u32 {
  return assigned[e * columns + w] & bits_between(0u, min(params.tokens - w * 32u, 32u));
}

@compute @workgroup_size(WG)
fn expert_lists(
  lane: Lane,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let e = flat(group, groups);
  if e >= params.experts {
    return;
  }
  let columns = (params.tokens + 31u) / 32u;
  let stretch = (columns + WG - 1u) / WG;
  let low = min(lane.index * stretch, columns);
  let high = min(low + stretch, columns);
  var sums = vec3<u32>(); // tokens of this expert, of lower ones, of all
  for (var w = low; w < high; w++) {
    sums.x += countOneBits(word_of(e, w, columns));
  }
  if params.round == JOIN {
    for (var i = lane.index; i < params.experts; i += WG) {
      let n = counts[i];
      sums += vec3(0u, select(0u, n, i < e), n);
    }
  }
  let scan = team_scan(lane, vec4(sums, 0u));
  let n = scan.total.x;
  if params.round == COUNT {
    if lane.index == 0u {
      counts[e] = n;
    }
    return;
  }

  var first = e * params.room;
  var room = params.room;
  if params.round == JOIN {
    first = min(scan.total.y, params.room);
    room -= first;
  }
  var at = scan.before.x;
  for (var w = low; w < high; w++) {
    var word = word_of(e, w, columns);
    while word != 0u {
      if at < room {
        list[first + at] = w * 32u + firstTrailingBit(word);
      }
      at++;
      word &= word - 1u;
    }
  }
  let kept = min(n, room);
  if params.round == PAD {
    for (var i = kept + lane.index; i < room; i += WG) {
      list[first + i] = 0xffffffffu;
    }
  } else {
    // The groups share the rest of the list.
    for (var i = scan.total.z + e * WG + lane.index; i < params.room; i += params.experts * WG) {
      list[i] = 0xffffffffu;
    }
  }
  if lane.index == 0u {
    lost[e] = n - kept;
    if params.round == PAD {
      counts[e] = kept;
    } else {
      offsets[e] = first;
      if e + 1u == params.experts {
        offsets[params.experts] = min(scan.total.z, params.room);
      }
    }
  }
}
