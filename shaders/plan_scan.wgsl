// Second part of a plan: offsets[i] = sum of counts[0..i], for experts and for tokens; active experts, items,
// statistics.
//   plan: in: counts where the offsets will stand; out: head, both offsets (of tokens: only where nothing is
//     cut), active experts, items of the two row classes
//   lost [dropped experts + ignored words] u32, added up
//   offsets [ranges + 1] u32, of which those that decrease or exceed the tokens are counted
//   active [ceil(tokens / 32)] bit set, where has_active: shared experts take these tokens alone
//   experts_per_token [tokens] u32, of which those above most_experts are counted; 0: there are none
//   stats [8 + experts] u32: slots, unique experts, dropped, ignored, untouched tokens, clamped offsets, cut
//     slots, 0; slots of each expert; written, or added to what is there where add_stats
// Shared experts follow the routed ones and hold every token, or every active one. Routed slots past
// `routed_slots` are cut: of the last experts, an expert's last tokens first. Shared experts' slots follow
// those that are left.
// Items: an expert with n rows gets n / tile_rows whole tiles. What is left becomes one skinny item where it
// is at most skinny_rows rows, else one more tile.
// Grid: one group.
// Pieces: plan/prefix_sums, plan/scan.

struct Params {
  tokens: u32,
  experts: u32,
  shared_experts: u32,
  routed_slots: u32, // bound
  add_stats: u32,    // 1: to what stats holds
  drop_count: u32,
  ignore_count: u32,
  range_count: u32,
  tile_rows: u32,
  skinny_rows: u32,
  expert_offsets: u32, // sections of the plan
  token_offsets: u32,
  active_experts: u32,
  skinny_offsets: u32,
  skinny_items: u32,
  tile_offsets: u32,
  tile_items: u32,
  ranks: u32,
  has_active: u32,
  most_experts: u32, // 0: no experts_per_token
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> lost: array<u32>;
@group(0) @binding(2) var<storage, read> offsets: array<u32>;
@group(0) @binding(3) var<storage, read> active_bits: array<u32>;
@group(0) @binding(4) var<storage, read> experts_per_token: array<u32>;
@group(0) @binding(5) var<storage, read_write> plan: array<u32>;
@group(0) @binding(6) var<storage, read_write> stats: array<u32>;

fn loss(i: u32) -> u32 {
  return lost[i];
}

fn range_end(i: u32) -> u32 {
  return offsets[i];
}

fn active_bits_of(w: u32) -> u32 {
  return active_bits[w];
}

fn number_of(t: u32) -> u32 {
  return experts_per_token[t];
}

@compute @workgroup_size(WG)
fn plan_scan(lane: Lane) {
  scan_counts(lane);
}
