// Steps of matmul_skinny with loops of their own for up to 10 and up to 12 of 16 rows. Needs add_steps. Twin
// of one_loop.wgsl.
fn add_all(start: Sums, rows: u32, steps: u32, at: Place) -> Sums {
  var sums = start;
  if rows > 12u {
    sums = add_steps(sums, 16u, steps, at);
  } else if rows > 10u {
    sums = add_steps(sums, 12u, steps, at);
  } else {
    sums = add_steps(sums, 10u, steps, at);
  }
  return sums;
}
