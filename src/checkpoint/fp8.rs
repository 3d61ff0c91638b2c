//! Scales of 8-bit floats in safetensors files. They lie in a tensor beside: `X_scale_inv`, as
//! DeepSeek-V3, LLaDA2.0-Uni-FP8 and transformers have it, or `X_scale`, as compressed-tensors and
//! AutoFP8 have it, often in bf16. Whatever the name, a value is multiplied by its scale (vLLM's `fp8_utils.py`,
//! transformers' `finegrained_fp8.py`).
use super::failed;
use super::files::{Files, Tensor};
use super::matrix::{Part, same};
use crate::weights::TileScales;
use crate::{FloatType, Result};

/// Their type in safetensors files.
pub(super) const DTYPE: &str = "F8_E4M3";
/// Rows and columns that share a scale, where the scales are those of tiles.
pub(super) const TILE: u32 = 128;

/// The scales of a matrix of a tensor: one for each 128 x 128 values, for each row, or for all.
pub(super) fn scales<'a>(
    files: &'a Files,
    tensor: &Tensor<'a>,
    name: &str,
    part: &Part,
) -> Result<TileScales<'a>> {
    let [first, second] = ["_scale_inv", "_scale"].map(|suffix| format!("{name}{suffix}"));
    let Some(scale_name) = [&first, &second].into_iter().find(|name| files.has(name)) else {
        let reason = format!("is {DTYPE}, and neither `{first}` nor `{second}` is there");
        return Err(failed(tensor.file, Some(name), reason));
    };
    let scales = files.tensor(scale_name)?;
    let fail = |reason: String| Err(failed(scales.file, Some(scale_name), reason));
    let Some(float_type) = FloatType::of_dtype(scales.dtype) else {
        return fail(format!("is {}, expected F32, F16 or BF16", scales.dtype));
    };
    let [rows, columns] = part.whole;
    let stack: Vec<u32> = part.stack.iter().map(|&[_, count]| count).collect();
    let tiles = [rows.div_ceil(TILE), columns.div_ceil(TILE)];
    // Shape of the scales of a matrix, and what of the matrix shares one.
    let layouts: [(&[u32], [u32; 2]); 5] = [
        (&tiles, [TILE, TILE]),
        (&[rows, 1], [1, columns]),
        (&[rows], [1, columns]),
        (&[1], part.whole),
        (&[], part.whole),
    ];
    let shape = |one: &[u32]| [&stack, one].concat();
    let Some((one, tile)) = layouts.into_iter().find(|(one, _)| same(scales.shape, &shape(one)))
    else {
        let want: Vec<_> =
            layouts[..4].iter().map(|(one, _)| format!("{:?}", shape(one))).collect();
        return fail(format!("has shape {:?}, expected {}", scales.shape, want.join(" or ")));
    };
    if part.shape[1] != columns && tile[1] < columns {
        return fail(format!(
            "is for tiles of {TILE} x {TILE}, not cut into those of several shared experts"
        ));
    }
    let count: u64 = one.iter().map(|&n| u64::from(n)).product();
    let at = part.stack.map_or(0, |[index, _]| u64::from(index) * count * float_type.bytes());
    // Inside the tensor, whose shape is known.
    let bytes = usize::try_from(at).ok().and_then(|at| scales.bytes.get(at..)).unwrap_or_default();
    Ok(TileScales::new(bytes, tile).of_type(float_type).from_row(part.start[0]))
}
