// The uniform of the kernels that make gradients of weights, and the slots of an expert.
struct Params {
  rows: u32,          // N: rows of one matrix of this page
  columns: u32,       // K
  a_stride: u32,      // values from row to row of a
  a_first: u32,       // value of a row of a that belongs to the page's first row
  b_stride: u32,      // values from row to row of b
  first_expert: u32,  // first expert of this page
  experts: u32,       // experts in this page
  slots: u32,         // rows of a and b, in the dense variant
  expert_offsets: u32, // plan section: first slot of each expert
  token_of: u32,      // plan section: token of each slot
  across: u32,        // groups along columns
  down: u32,          // groups along rows
  add: u32,           // 1: out is added to
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read> plan: array<u32>;

struct Slots { first: u32, end: u32 }

// The slots of an expert of the page. DENSE: all rows; the plan buffer is bound, not read.
fn slots_of(expert: u32) -> Slots {
  if DENSE { return Slots(0u, params.slots); }
  let at = params.expert_offsets + params.first_expert + expert;
  return Slots(plan[at], plan[at + 1u]);
}

// Rows of a and of b of a slot.
fn a_row(slot: u32) -> u32 {
  if GATHER_A { return plan[params.token_of + slot]; }
  return slot;
}

fn b_row(slot: u32) -> u32 {
  if GATHER_B { return plan[params.token_of + slot]; }
  return slot;
}
