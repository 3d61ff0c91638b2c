// Eight values of y and residual in a 64-bit vector; a Vector is a mat2x4<f32>, which can be added and
// scaled. Needs common/wide_floats.wgsl. Twin of rows.wgsl.
fn opened(v: Row) -> Vector {
  return Vector(four_of(v.xy), four_of(v.zw));
}
