struct Params {
  columns: u32,       // N: output columns of one matrix of this page
  column_begin: u32,  // columns of this dispatch
  column_end: u32,
  column_base: u32,   // column of out that the page's column 0 goes to, modulo 2^32
  depth: u32,         // K
  x_stride: u32,      // values from row to row of x
  out_stride: u32,    // values from row to row of out
  first_expert: u32,  // first expert of this page, or first place where experts are placed
  experts: u32,       // experts in this page
  slot_begin: u32,    // slots of this dispatch: the others of an item are left alone
  slot_end: u32,
  x_slot: u32,        // slot of the first row of x, where rows are slots
  out_slot: u32,      // slot of the first row of out
  items: u32,         // plan section: (expert, first slot) of each item
  items_begin: u32,   // words of the plan that hold the first item of this dispatch and the one past its last
  items_end: u32,
  least_item: u32,    // no item before this one holds slots of this dispatch
  item_rows: u32,     // rows of an item; of small ones: parts that an item may have
  small_rows: u32,    // most rows of small items, which other kernels leave alone; 0: there are none
  expert_offsets: u32, // plan section: first slot of each expert
  token_of: u32,      // plan section: row of x of each slot; 0: rows are slots
  placed: u32,        // 1: the page holds any experts, and places says which
  item_groups: u32,   // groups of items of one stretch of columns, for matmul_register
  item_step: u32,     // between two of them that follow one another
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> plan: array<u32>;
@group(0) @binding(5) var<storage, read> places: array<u32>;

struct Tile { expert: u32, first: u32, rows: u32 }

// The expert of a tile after which there are none: of items that are not there, or past the dispatch's slots.
const NO_MORE: u32 = 0xffffffffu;

// The part of an item that lies within the dispatch's slots.
fn clip(expert: u32, first: u32, end: u32) -> Tile {
  let low = max(first, params.slot_begin);
  let high = min(end, params.slot_end);
  return Tile(expert, low, max(high, low) - low);
}

// Where the page's weights have an expert of the plan: past `experts` where they have not.
fn place_of(expert: u32) -> u32 {
  var place = expert;
  if params.placed == 1u { place = places[expert]; }
  return place - params.first_expert;
}

fn x_row_of(slot: u32) -> u32 {
  if GATHER && params.token_of != 0u { return plan[params.token_of + slot]; }
  return slot - params.x_slot;
}
