// Values of y and residual as they are. Twin of rows_wide.wgsl.
fn opened(v: Row) -> Vector {
  return v;
}
