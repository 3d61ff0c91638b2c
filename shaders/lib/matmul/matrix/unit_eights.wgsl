// What columns_across.wgsl loads at once: a word of eight neighbouring columns of one row of weights. Needs
// eighth_halves.wgsl or eighth_blocks.wgsl. Twin of unit_fours.wgsl and unit_any.wgsl.
const UNIT_FOURS: u32 = 2u;

alias Unit = Eighth;

fn unit_base(expert: u32, column: u32) -> u32 { return eighth_base(expert, column); }

fn load_unit(up: bool, at: u32, column: u32) -> Unit {
  return load_eighth(up, at, column);
}

fn unit_low(v: Unit, column: u32) -> vec4<f32> { return low_of(v, column); }
fn unit_high(v: Unit, column: u32) -> vec4<f32> { return high_of(v, column); }
