// The body of plan_scan.wgsl: counts of a plan to offsets, items and statistics.
// Contract: all WG lanes call, in uniform control flow; the kernel has its params, plan and stats, loss(i)
// and range_end(i).

// (tiles, skinny items) of an expert with `rows` rows.
fn items_of(rows: u32) -> vec2<u32> {
  let rest = rows % params.tile_rows;
  let skinny = u32(rest > 0u && rest <= params.skinny_rows);
  return vec2(rows / params.tile_rows + u32(rest > 0u) - skinny, skinny);
}

fn scan_counts(lane: Lane) {
  let index = lane.index;
  let all = params.experts + params.shared_experts;

  // Experts: every lane owns a stretch of them.
  let stretch = (all + WG - 1u) / WG;
  let low = min(index * stretch, all);
  let high = min(low + stretch, all);
  var rows = vec2<u32>(); // (all, active routed experts)
  for (var e = low; e < high; e++) {
    var n = params.tokens;
    if e < params.experts {
      n = plan[params.expert_offsets + e];
      stats[8u + e] = n;
      rows.y += u32(n > 0u);
    }
    rows.x += n;
  }
  let scan = team_scan(lane, vec4(rows, 0u, 0u));
  var offset = scan.before.x;
  var alive = scan.before.y;
  var items = vec2<u32>(); // (tiles, skinny)
  for (var e = low; e < high; e++) {
    var n = params.tokens;
    if e < params.experts {
      n = plan[params.expert_offsets + e];
      if n > 0u {
        plan[params.active_experts + alive] = e;
        alive++;
      }
    }
    let begin = min(offset, params.slots);
    plan[params.expert_offsets + e] = begin;
    offset += n;
    items += items_of(min(offset, params.slots) - begin);
  }
  let total = min(scan.total.x, params.slots);
  if index == 0u {
    plan[params.expert_offsets + all] = total;
  }
  let item_scan = team_scan(lane, vec4(items, 0u, 0u));
  items = item_scan.before.xy;
  offset = min(scan.before.x, params.slots);
  for (var e = low; e < high; e++) {
    var end = total;
    if e + 1u < high {
      end = plan[params.expert_offsets + e + 1u];
    } else {
      end = min(scan.before.x + rows.x, params.slots);
    }
    let own = items_of(end - offset);
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
    items += own;
    offset = end;
  }

  // Tokens.
  let token_stretch = (params.tokens + WG - 1u) / WG;
  let token_low = min(index * token_stretch, params.tokens);
  let token_high = min(token_low + token_stretch, params.tokens);
  var of_tokens = vec2<u32>(); // (slots, untouched)
  for (var t = token_low; t < token_high; t++) {
    let n = plan[params.token_offsets + t];
    of_tokens += vec2(n + params.shared_experts, u32(n == 0u));
  }
  let token_scan = team_scan(lane, vec4(of_tokens, 0u, 0u));
  offset = token_scan.before.x;
  for (var t = token_low; t < token_high; t++) {
    let n = plan[params.token_offsets + t] + params.shared_experts;
    plan[params.token_offsets + t] = min(offset, params.slots);
    offset += n;
  }

  // Losses, clamped offsets.
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
  let losses_scan = team_scan(lane, vec4(lost, 0u));

  if index == 0u {
    plan[params.token_offsets + params.tokens] = min(token_scan.total.x, params.slots);
    plan[params.tile_offsets + all] = item_scan.total.x;
    plan[params.skinny_offsets + all] = item_scan.total.y;
    plan[0] = total;
    plan[1] = scan.total.y;
    plan[2] = item_scan.total.x;
    plan[3] = item_scan.total.y;
    let cut = scan.total.x - total;
    stats[0] = min(token_scan.total.x - params.shared_experts * params.tokens, params.slots);
    stats[1] = scan.total.y;
    stats[2] = losses_scan.total.x;
    stats[3] = losses_scan.total.y + cut;
    stats[4] = token_scan.total.y;
    stats[5] = losses_scan.total.z;
    stats[6] = 0u;
    stats[7] = 0u;
  }
}
