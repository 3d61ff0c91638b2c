// The body of plan_scan.wgsl: counts of a plan to offsets, items and statistics.
// Contract: all WG lanes call, in uniform control flow; the kernel has its params, plan and stats, loss(i),
// range_end(i), active_bits_of(w), word w of the active tokens' bits, and number_of(t), experts that token t
// asks for.

// Word w of the tokens that are active: all where none are said to be.
fn active_word(w: u32) -> u32 {
  let all = 0xffffffffu >> (32u - min(params.tokens - w * 32u, 32u));
  if params.has_active == 1u {
    return all & active_bits_of(w);
  }
  return all;
}

fn is_active(t: u32) -> bool {
  return ((active_word(t / 32u) >> (t % 32u)) & 1u) == 1u;
}

// How many tokens are active, which is what a shared expert holds. Where some are not, each word's rank among
// them stands behind the ranks of the routed experts.
fn scan_active(lane: Lane) -> u32 {
  if params.has_active == 0u {
    return params.tokens;
  }
  let columns = (params.tokens + 31u) / 32u;
  let stretch = (columns + WG - 1u) / WG;
  let low = min(lane.index * stretch, columns);
  let high = min(low + stretch, columns);
  var n = 0u;
  for (var w = low; w < high; w++) {
    n += countOneBits(active_word(w));
  }
  let scan = team_scan(lane, vec4(n, 0u, 0u, 0u));
  var rank = scan.before.x;
  for (var w = low; w < high && params.shared_experts > 0u; w++) {
    plan[params.ranks + params.experts * columns + w] = rank;
    rank += countOneBits(active_word(w));
  }
  return scan.total.x;
}

// (tiles, skinny items) of an expert with `rows` rows.
fn items_of(rows: u32) -> vec2<u32> {
  let rest = rows % params.tile_rows;
  let skinny = u32(rest > 0u && rest <= params.skinny_rows);
  return vec2(rows / params.tile_rows + u32(rest > 0u) - skinny, skinny);
}

// The first slot of what comes after `before` slots, of which `cut` routed ones are not there.
fn first_slot(before: u32, cut: u32) -> u32 {
  return max(min(before, params.routed_slots), max(before, cut) - cut);
}

// A statistic, or what is added to one: a sum that leaves 32 bits stays at their end.
fn report(i: u32, n: u32) {
  var sum = n;
  if params.add_stats == 1u {
    sum += stats[i];
  }
  stats[i] = select(sum, 0xffffffffu, sum < n);
}

fn scan_counts(lane: Lane) {
  let index = lane.index;
  let all = params.experts + params.shared_experts;
  let active_tokens = scan_active(lane);

  // Experts: every lane owns a stretch of them.
  let stretch = (all + WG - 1u) / WG;
  let low = min(index * stretch, all);
  let high = min(low + stretch, all);
  var rows = 0u;
  for (var e = low; e < high; e++) {
    var n = active_tokens;
    if e < params.experts {
      n = plan[params.expert_offsets + e];
    }
    rows += n;
  }
  let scan = team_scan(lane, vec4(rows, 0u, 0u, 0u));
  // Shared experts' slots are there whatever is cut.
  let routed = scan.total.x - params.shared_experts * active_tokens;
  let cut = routed - min(routed, params.routed_slots);
  var offset = scan.before.x;
  var items = vec3<u32>(); // (tiles, skinny, active routed experts)
  for (var e = low; e < high; e++) {
    var n = active_tokens;
    if e < params.experts {
      n = plan[params.expert_offsets + e];
    }
    let begin = first_slot(offset, cut);
    plan[params.expert_offsets + e] = begin;
    offset += n;
    n = first_slot(offset, cut) - begin;
    items += vec3(items_of(n), u32(e < params.experts && n > 0u));
    if e < params.experts {
      report(8u + e, n);
    }
  }
  let total = scan.total.x - cut;
  if index == 0u {
    plan[params.expert_offsets + all] = total;
  }
  let item_scan = team_scan(lane, vec4(items, 0u));
  items = item_scan.before.xyz;
  offset = first_slot(scan.before.x, cut);
  for (var e = low; e < high; e++) {
    var end = total;
    if e + 1u < high {
      end = plan[params.expert_offsets + e + 1u];
    } else {
      end = first_slot(scan.before.x + rows, cut);
    }
    let own = items_of(end - offset);
    let used = e < params.experts && end > offset;
    if used {
      plan[params.active_experts + items.z] = e;
    }
    plan[params.tile_offsets + e] = items.x;
    plan[params.skinny_offsets + e] = items.y;
    for (var i = 0u; i < own.x; i++) {
      plan[params.tile_items + 2u * (items.x + i)] = e;
      plan[params.tile_items + 2u * (items.x + i) + 1u] = offset + i * params.tile_rows;
    }
    if own.y == 1u {
      plan[params.skinny_items + 2u * items.y] = e;
      plan[params.skinny_items + 2u * items.y + 1u] = offset + own.x * params.tile_rows;
    }
    items += vec3(own, u32(used));
    offset = end;
  }

  // Tokens. Where slots are cut, the lists of tokens are shorter: plan/fill finds them.
  let token_stretch = (params.tokens + WG - 1u) / WG;
  let token_low = min(index * token_stretch, params.tokens);
  let token_high = min(token_low + token_stretch, params.tokens);
  var of_tokens = vec2<u32>(); // (slots, untouched)
  for (var t = token_low; t < token_high; t++) {
    let n = plan[params.token_offsets + t];
    of_tokens += select(vec2(n, 0u), vec2(n + params.shared_experts, u32(n == 0u)), is_active(t));
  }
  let token_scan = team_scan(lane, vec4(of_tokens, 0u, 0u));
  offset = token_scan.before.x;
  for (var t = token_low; t < token_high; t++) {
    let n = plan[params.token_offsets + t] + select(0u, params.shared_experts, is_active(t));
    plan[params.token_offsets + t] = offset;
    offset += n;
  }

  // Losses, clamped offsets and numbers of experts.
  var lost = vec3<u32>(); // (dropped, ignored, clamped)
  for (var i = index; i < params.drop_count + params.ignore_count; i += WG) {
    let n = loss(i);
    lost += select(vec3(0u, n, 0u), vec3(n, 0u, 0u), i < params.drop_count);
  }
  for (var i = index; i < params.range_count; i += WG) {
    let at = range_end(i);
    let before = range_end(max(i, 1u) - 1u);
    lost.z += u32(at > params.tokens || at < before);
  }
  if params.most_experts > 0u {
    for (var t = token_low; t < token_high; t++) {
      lost.z += u32(number_of(t) > params.most_experts && is_active(t));
    }
  }
  let losses_scan = team_scan(lane, vec4(lost, 0u));

  if index == 0u {
    plan[params.token_offsets + params.tokens] = token_scan.total.x - cut;
    plan[params.tile_offsets + all] = item_scan.total.x;
    plan[params.skinny_offsets + all] = item_scan.total.y;
    plan[0] = total;
    plan[1] = item_scan.total.z;
    plan[2] = item_scan.total.x;
    plan[3] = item_scan.total.y;
    plan[4] = cut;
    report(0u, routed - cut);
    report(1u, item_scan.total.z);
    report(2u, losses_scan.total.x);
    report(3u, losses_scan.total.y);
    report(4u, token_scan.total.y);
    report(5u, losses_scan.total.z);
    report(6u, cut);
    report(7u, 0u);
  }
}
