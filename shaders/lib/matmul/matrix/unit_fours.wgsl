// What columns_across.wgsl loads at once: a word of four neighbouring columns of one row of f32. Needs
// words_at.wgsl. Twin of unit_eights.wgsl and unit_any.wgsl.
const UNIT_FOURS: u32 = 1u;

alias Unit = vec4<f32>;

fn unit_base(expert: u32, column: u32) -> u32 {
  return expert_at(expert) + min(column / 4u, row_words() - 1u) * PANEL;
}

fn load_unit(up: bool, at: u32, column: u32) -> Unit {
  return unpack_low(load_weights(up, at, 0u));
}

fn unit_low(v: Unit, column: u32) -> vec4<f32> { return v; }
// Never reached.
fn unit_high(v: Unit, column: u32) -> vec4<f32> { return v; }
