// What columns_across.wgsl loads at once: four neighbouring columns of one row of f32, rows of any length in
// place. Needs values_at.wgsl. Twin of unit_eights.wgsl and unit_fours.wgsl.
const UNIT_FOURS: u32 = 1u;

alias Unit = vec4<f32>;

fn unit_base(expert: u32, column: u32) -> u32 { return expert_at(expert); }

fn load_unit(up: bool, at: u32, column: u32) -> Unit {
  return four_at(up, at, column);
}

fn unit_low(v: Unit, column: u32) -> vec4<f32> { return v; }
// Never reached.
fn unit_high(v: Unit, column: u32) -> vec4<f32> { return v; }
