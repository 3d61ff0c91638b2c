//! Matrices inside the bytes of a tensor: what is uploaded without a copy.
use super::blocks::Fp8;
use super::format::{ForFormat, Format};
use crate::error::bytes_of;
use crate::{Error, FloatType, Result, WeightType};
use bytemuck::Zeroable;
use std::borrow::Cow;
use std::ops::Range;

/// A matrix inside the bytes of a tensor: little-endian values at any alignment, rows and columns at
/// any distance. So one expert of a stacked tensor, a transposed matrix, or some columns of a wider one
/// need no copy. Blocks of a type of blocks run along a row.
#[derive(Clone, Copy, Debug)]
pub struct MatrixView<'a> {
    bytes: &'a [u8],
    pub(super) weight_type: WeightType,
    pub(super) shape: [usize; 2],
    /// From row to row and from column to column, in values where `scales` lie apart, else in blocks.
    strides: [usize; 2],
    scales: Option<TileScales<'a>>,
}

/// Scales of a matrix of 8-bit floats that lie in a tensor of their own, one for each tile.
#[derive(Clone, Copy, Debug)]
pub struct TileScales<'a> {
    values: &'a [u8],
    float_type: FloatType,
    tile: [u32; 2],
    first_row: u32,
}

impl<'a> TileScales<'a> {
    /// f32 or [of another type](Self::of_type), little endian, row-major `[ceil(out / tile[0]), ceil(in / tile[1])]`. Each value of a tile
    /// is multiplied by its scale. DeepSeek and LLaDA2.0-Uni-FP8 have tiles of 128 x 128
    /// (`weight_scale_inv`); a scale a row is a tile of `[1, in]`, one for all `[out, in]`.
    pub fn new(values: &'a [u8], tile: [u32; 2]) -> Self {
        Self { values, float_type: FloatType::F32, tile, first_row: 0 }
    }

    /// The same in another type of floats.
    pub fn of_type(self, float_type: FloatType) -> Self {
        Self { float_type, ..self }
    }

    /// For a matrix that begins at this row of the tensor whose scales these are.
    pub fn from_row(self, first_row: u32) -> Self {
        Self { first_row, ..self }
    }

    /// Errors for a matrix that they do not cover.
    fn check(&self, [rows, depth]: [u32; 2]) -> Result<()> {
        let [height, width] = self.tile;
        if height == 0 || width == 0 || (width < depth && !width.is_multiple_of(128)) {
            let reason = format!("tiles of {:?}, rows of {depth}: a multiple of 128", self.tile);
            return Err(Error::invalid("scales", reason));
        }
        let down = u64::from(self.first_row) + u64::from(rows);
        let shape = [down.div_ceil(height.into()), depth.div_ceil(width).into()];
        let (need, got) =
            (bytes_of("scales", &shape, self.float_type.bytes())?, self.values.len() as u64);
        if need > got { Err(Error::size("scales", need, got)) } else { Ok(()) }
    }

    /// The scale of a value.
    fn of(&self, row: usize, k: usize, depth: usize) -> f32 {
        let [height, width] = self.tile.map(|n| n as usize);
        let across = depth.div_ceil(width);
        let at = (row + self.first_row as usize) / height * across + k / width;
        self.float_type.at(self.values, at)
    }
}

impl<'a> MatrixView<'a> {
    /// The matrix of `shape` `[out, in]` whose value `[row, column]` is value
    /// `row * strides[0] + column * strides[1]` of `bytes`.
    ///
    /// In a type of blocks rows are whole blocks ([`WeightType::row_bytes`]), the last one perhaps longer
    /// than the row, with finite values behind it ([`WeightType::encode`] puts zeros there): `strides[0]` is a multiple of [`WeightType::block_values`], `strides[1]` is 1.
    ///
    /// # Errors
    ///
    /// A matrix that reaches past the end of `bytes`, or strides that cut blocks.
    pub fn new(
        bytes: &'a [u8],
        weight_type: WeightType,
        shape: [u32; 2],
        strides: [u64; 2],
    ) -> Result<Self> {
        let values = u64::from(weight_type.block_values());
        let [down, along] = strides;
        // A stride that is never taken may be any number.
        let cut = (shape[0] > 1 && !down.is_multiple_of(values)) || (shape[1] > 1 && along != 1);
        if weight_type.has_blocks() && cut {
            let reason = format!(
                "{strides:?}, expected a multiple of {values} and 1: blocks of {} run along a row",
                weight_type.name()
            );
            return Err(Error::invalid("strides", reason));
        }
        let blocks = [shape[0].into(), u64::from(shape[1]).div_ceil(values)];
        let block = weight_type.block_bytes();
        Self::within(bytes, weight_type, shape, blocks, [down / values, along], block)
    }

    /// A matrix of 8-bit floats (e4m3) whose scales lie apart.
    ///
    /// # Errors
    ///
    /// A matrix that reaches past the end of `bytes` or of its scales, tiles that are no multiple of
    /// 128 along a row, or values of a row that are not neighbours.
    pub fn with_tile_scales(
        bytes: &'a [u8],
        shape: [u32; 2],
        strides: [u64; 2],
        scales: TileScales<'a>,
    ) -> Result<Self> {
        scales.check(shape)?;
        if shape[1] > 1 && strides[1] != 1 {
            return Err(Error::invalid("strides", format!("{strides:?}, expected 1 along a row")));
        }
        let values = shape.map(u64::from);
        let view = Self::within(bytes, WeightType::Fp8, shape, values, strides, 1)?;
        Ok(Self { scales: Some(scales), ..view })
    }

    /// A view of `items` of `size` bytes each.
    fn within(
        bytes: &'a [u8],
        weight_type: WeightType,
        shape: [u32; 2],
        items: [u64; 2],
        strides: [u64; 2],
        size: u64,
    ) -> Result<Self> {
        let need = if items.contains(&0) {
            0
        } else {
            let last = |axis: usize| bytes_of("strides", &[items[axis] - 1, strides[axis]], size);
            let need = last(0)?.checked_add(last(1)?).and_then(|n| n.checked_add(size));
            need.ok_or_else(|| Error::invalid("strides", format!("{strides:?} overflow")))?
        };
        if need > bytes.len() as u64 {
            return Err(Error::size("bytes", need, bytes.len() as u64));
        }
        let stride = |axis: usize| if items[axis] > 1 { strides[axis] as usize } else { 1 };
        Ok(Self {
            bytes: &bytes[..bytes.len() - bytes.len() % size as usize],
            weight_type,
            shape: shape.map(|n| n as usize),
            strides: [stride(0), stride(1)],
            scales: None,
        })
    }

    /// Rows and columns, `[out, in]`.
    pub fn shape(&self) -> [u32; 2] {
        self.shape.map(|n| n as u32) // as they were given
    }

    /// Type of the values.
    pub fn weight_type(&self) -> WeightType {
        self.weight_type
    }

    /// Bytes of the values that are part of the matrix, scales that lie apart not among them.
    pub fn size(&self) -> u64 {
        let [rows, depth] = self.shape();
        let row =
            if self.scales.is_some() { depth.into() } else { self.weight_type.row_bytes(depth) };
        u64::from(rows).saturating_mul(row)
    }

    /// A value, widened exactly.
    ///
    /// # Panics
    ///
    /// Outside the matrix.
    pub fn get(&self, row: usize, column: usize) -> f32 {
        struct Get<'a>(&'a MatrixView<'a>, usize, usize);
        impl ForFormat for Get<'_> {
            type Output = f32;
            fn run<F: Format>(self) -> f32 {
                let Self(matrix, row, column) = self;
                let block = column / F::VALUES;
                let blocks = matrix.blocks::<F>(row, block..block + 1);
                if F::VALUES == 1 {
                    let mut value = [0.0];
                    F::widen(&blocks[0], &mut value);
                    return value[0];
                }
                let mut values = vec![0.0; F::VALUES];
                F::widen(&blocks[0], &mut values);
                values[column % F::VALUES]
            }
        }
        let [rows, columns] = self.shape;
        assert!(row < rows && column < columns, "[{row}, {column}] of {:?}", self.shape);
        self.weight_type.run(Get(self, row, column))
    }

    /// All values of a row, widened exactly.
    #[cfg_attr(
        not(feature = "cpu-experts"),
        expect(dead_code, reason = "read by the host's experts")
    )]
    pub(crate) fn widen_row(&self, row: usize, values: &mut [f32]) {
        struct Row<'a>(&'a MatrixView<'a>, usize, &'a mut [f32]);
        impl ForFormat for Row<'_> {
            type Output = ();
            fn run<F: Format>(self) {
                let Self(matrix, row, values) = self;
                let blocks = matrix.blocks::<F>(row, 0..values.len().div_ceil(F::VALUES));
                let mut whole = values.chunks_exact_mut(F::VALUES);
                let mut left = blocks.iter();
                for (values, block) in (&mut whole).zip(&mut left) {
                    F::widen(block, values);
                }
                let rest = whole.into_remainder();
                if !rest.is_empty() {
                    let mut last = vec![0.0; F::VALUES];
                    F::widen(&blocks[blocks.len() - 1], &mut last);
                    rest.copy_from_slice(&last[..rest.len()]);
                }
            }
        }
        assert!(row < self.shape[0] && values.len() == self.shape[1], "row {row}");
        self.weight_type.run(Row(self, row, values));
    }

    /// Some blocks of a row.
    pub(super) fn blocks<S: Format>(
        &self,
        row: usize,
        blocks: Range<usize>,
    ) -> Cow<'a, [S::Block]> {
        let [down, along] = self.strides;
        let first = row * down;
        if let Some(scales) = self.scales {
            let block = |b: usize| {
                let k = b * S::VALUES..((b + 1) * S::VALUES).min(self.shape[1]);
                let mut block = S::Block::zeroed();
                let (scale, values) = bytemuck::bytes_of_mut(&mut block).split_at_mut(Fp8::SCALE);
                scale.copy_from_slice(&scales.of(row, k.start, self.shape[1]).to_le_bytes());
                values[..k.len()].copy_from_slice(&self.bytes[first + k.start..first + k.end]);
                block
            };
            return blocks.map(block).collect();
        }
        let all: &[S::Block] = bytemuck::cast_slice(self.bytes);
        if along == 1 {
            Cow::Borrowed(&all[first + blocks.start..first + blocks.end])
        } else {
            blocks.map(|b| all[first + b * along]).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_in_tiles() {
        // Two tiles down, two along, the last ones short; the matrix begins in row 100 of the tensor.
        let codes: Vec<u8> = (0..50 * 200).map(|i| (i * 37 % 251) as u8 & 0x7e).collect();
        let scales: Vec<u8> = [1f32, 2.0, 4.0, 8.0].iter().flat_map(|s| s.to_le_bytes()).collect();
        let tiles = TileScales::new(&scales, [128, 128]).from_row(100);
        let view = MatrixView::with_tile_scales(&codes, [50, 200], [200, 1], tiles).unwrap();
        let own = |row: usize, k: usize| {
            let (code, scale) = (codes[row * 200 + k], [1.0, 2.0, 4.0, 8.0]);
            let mut block = [0; 132];
            block[..4].copy_from_slice(&f32::to_le_bytes(scale[row / 28 * 2 + k / 128]));
            block[4] = code;
            WeightType::Fp8.decode(&block, 128)[0]
        };
        for (row, k) in [(0, 0), (27, 127), (27, 128), (28, 127), (49, 199)] {
            assert_eq!(view.get(row, k), own(row, k), "[{row}, {k}]");
        }
        let short = TileScales::new(&scales[..12], [128, 128]).from_row(100);
        assert!(MatrixView::with_tile_scales(&codes, [50, 200], [200, 1], short).is_err());
        let narrow = TileScales::new(&scales, [128, 64]);
        assert!(MatrixView::with_tile_scales(&codes, [50, 200], [200, 1], narrow).is_err());
    }

    #[test]
    fn views_stay_inside() {
        let bytes = [0u8; 24];
        let view = |shape, strides| MatrixView::new(&bytes, WeightType::F32, shape, strides);
        assert!(view([2, 3], [3, 1]).is_ok());
        assert!(view([2, 3], [1, 2]).is_ok());
        assert!(view([2, 3], [4, 1]).is_err());
        assert!(view([3, 3], [3, 1]).is_err());
        assert!(view([2, 2], [u64::MAX, 1]).is_err());
        assert!(view([2, 2], [u64::MAX / 4, u64::MAX / 4]).is_err());
        assert!(view([u32::MAX, u32::MAX], [u64::MAX, u64::MAX]).is_err());
        assert!(view([0, u32::MAX], [u64::MAX, u64::MAX]).is_ok());
        // One value for all.
        assert_eq!(view([u32::MAX, u32::MAX], [0, 0]).unwrap().size(), u64::MAX);
        let blocks = |shape, strides| MatrixView::new(&[0; 68], WeightType::Q8_0, shape, strides);
        assert!(blocks([2, 32], [32, 1]).is_ok());
        assert!(blocks([2, 20], [32, 1]).is_ok());
        assert!(blocks([3, 32], [32, 1]).is_err());
        assert!(blocks([2, 33], [64, 1]).is_err());
        assert!(blocks([2, 32], [48, 1]).is_err());
        assert!(blocks([32, 2], [1, 32]).is_err());
    }
}
