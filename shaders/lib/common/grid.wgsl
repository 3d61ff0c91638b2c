// Grids are folded into three dimensions, so that 65,535 is no limit; the overshoot is turned away by the
// kernel.
fn flat(group: vec3<u32>, groups: vec3<u32>) -> u32 {
  return group.x + groups.x * (group.y + groups.y * group.z);
}
