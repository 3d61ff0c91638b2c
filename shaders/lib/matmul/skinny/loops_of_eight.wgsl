// Steps of matmul_skinny with a loop of its own for up to 4 of 8 rows. Needs add_steps. Twin of
// one_loop.wgsl.
fn add_all(start: Sums, rows: u32, steps: u32, at: Place) -> Sums {
  var sums = start;
  if rows > 4u {
    sums = add_steps(sums, 8u, steps, at);
  } else {
    sums = add_steps(sums, 4u, steps, at);
  }
  return sums;
}
