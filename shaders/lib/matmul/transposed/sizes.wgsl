// The uniform of the kernels that multiply by transposed weights, and what all of them read.
struct Params {
  rows: u32,          // N: rows of one matrix of this page, which the sums go over
  first_row: u32,     // the matrix's row that is the page's first, a multiple of 32
  depth: u32,         // the one past the page's last: values of x from there on are another page's
  columns: u32,       // K: columns of a matrix, and of out
  x_stride: u32,      // values from row to row of x
  out_stride: u32,    // values from row to row of out
  first_expert: u32,  // first expert of this page, or first place where experts are placed
  experts: u32,       // experts in this page
  slots: u32,         // rows of x, in the dense variant
  items: u32,         // plan section: (expert, first slot) of each item
  items_begin: u32,   // words of the plan that hold the first item of this dispatch and the one past its last
  items_end: u32,
  item_rows: u32,     // most rows of an item
  expert_offsets: u32, // plan section: first slot of each expert
  token_of: u32,      // plan section: row of x of each slot (GATHER)
  placed: u32,        // 1: the page holds any experts, and places says which
  item_groups: u32,   // groups of items of one stretch of columns, for transposed_register
  item_step: u32,     // between two of them that follow one another
  add: u32,           // 1: out holds the sums of the pages before
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> plan: array<u32>;
@group(0) @binding(5) var<storage, read> places: array<u32>;

struct Tile { expert: u32, first: u32, rows: u32 }

// The expert of a tile after which there are none.
const NO_MORE: u32 = 0xffffffffu;
