// Steps of matmul_skinny for TILE_ROWS rows, however many there are: for software drivers, which take long to
// compile each loop. Needs add_steps. Twin of loops_of_eight.wgsl and loops_of_sixteen.wgsl.
fn add_all(start: Sums, rows: u32, steps: u32, at: Place) -> Sums {
  return add_steps(start, TILE_ROWS, steps, at);
}
