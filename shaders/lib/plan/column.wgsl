// A column of the bit set: the 32 tokens of word `column` against all experts, turned to one row of bits a
// token. Bits past the last token count for nothing.
// Contract: all WG lanes call, in uniform control flow. experts <= 1024.
var<workgroup> column_words: array<u32, 1024>;
var<workgroup> row_words: array<u32, 1024>; // [32 tokens, ceil(experts / 32)]

// The bits of word `column` that stand for tokens.
fn token_bits(column: u32, tokens: u32) -> u32 {
  return 0xffffffffu >> (32u - min(tokens - column * 32u, 32u));
}

fn load_column(index: u32, column: u32, columns: u32, experts: u32, tokens: u32) {
  let chunks = (experts + 31u) / 32u;
  for (var e = index; e < chunks * 32u; e += WG) {
    column_words[e] = 0u;
    if e < experts {
      column_words[e] = assigned[e * columns + column] & token_bits(column, tokens);
    }
  }
  workgroupBarrier();
  for (var i = index; i < chunks * 32u; i += WG) {
    let bit = i / chunks;
    let chunk = i % chunks;
    var word = 0u;
    for (var j = 0u; j < 32u; j++) {
      word |= ((column_words[chunk * 32u + j] >> bit) & 1u) << j;
    }
    row_words[i] = word;
  }
  workgroupBarrier();
}
