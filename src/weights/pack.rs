//! Packing: matrices on the host, in any storage type and layout, into the panels that the kernels
//! read (see [`crate::weights`]).
use super::PANEL;
use super::blocks::Fp8;
use super::format::{ForFormat, Format, Word, zeros};
use crate::error::bytes_of;
use crate::{Error, Result, WeightType};
use std::borrow::Cow;
use std::ops::Range;
use wgpu::WriteOnly;

/// A matrix inside the bytes of a tensor: little-endian values at any alignment, rows and columns at
/// any distance. So one expert of a stacked tensor, a transposed matrix, or some columns of a wider one
/// need no copy. Blocks of a type of blocks run along a row.
#[derive(Clone, Copy, Debug)]
pub struct MatrixView<'a> {
    bytes: &'a [u8],
    weight_type: WeightType,
    shape: [usize; 2],
    /// From row to row and from column to column, in values where `scales` lie apart, else in blocks.
    strides: [usize; 2],
    scales: Option<TileScales<'a>>,
}

/// Scales of a matrix of 8-bit floats that lie in a tensor of their own, one for each tile.
#[derive(Clone, Copy, Debug)]
pub struct TileScales<'a> {
    values: &'a [u8],
    tile: [u32; 2],
    first_row: u32,
}

impl<'a> TileScales<'a> {
    /// f32, little endian, row-major `[ceil(out / tile[0]), ceil(in / tile[1])]`. Each value of a tile
    /// is multiplied by its scale. DeepSeek and LLaDA2.0-Uni-FP8 have tiles of 128 x 128
    /// (`weight_scale_inv`); a scale a row is a tile of `[1, in]`, one for all `[out, in]`.
    pub fn new(values: &'a [u8], tile: [u32; 2]) -> Self {
        Self { values, tile, first_row: 0 }
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
        let (need, got) = (bytes_of("scales", &shape, 4)?, self.values.len() as u64);
        if need > got { Err(Error::size("scales", need, got)) } else { Ok(()) }
    }

    /// The bytes of the scale of a value.
    fn of(&self, row: usize, k: usize, depth: usize) -> [u8; 4] {
        let [height, width] = self.tile.map(|n| n as usize);
        let across = depth.div_ceil(width);
        let at = (row + self.first_row as usize) / height * across + k / width;
        let mut scale = [0; 4];
        scale.copy_from_slice(&self.values[4 * at..4 * at + 4]);
        scale
    }
}

impl<'a> MatrixView<'a> {
    /// The matrix of `shape` `[out, in]` whose value `[row, column]` is value
    /// `row * strides[0] + column * strides[1]` of `bytes`.
    ///
    /// In a type of blocks rows are whole blocks ([`WeightType::row_bytes`]), the last one perhaps longer
    /// than the row: `strides[0]` is a multiple of [`WeightType::block_values`], `strides[1]` is 1.
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
        u64::from(rows) * row
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
                let mut values = [0.0; WINDOW];
                let blocks = matrix.blocks::<F>(row, block..block + 1);
                F::widen(&blocks[0], &mut values[..F::VALUES]);
                values[column % F::VALUES]
            }
        }
        let [rows, columns] = self.shape;
        assert!(row < rows && column < columns, "[{row}, {column}] of {:?}", self.shape);
        self.weight_type.run(Get(self, row, column))
    }

    /// Some blocks of a row.
    fn blocks<S: Format>(&self, row: usize, blocks: Range<usize>) -> Cow<'a, [S::Block]> {
        let [down, along] = self.strides;
        let first = row * down;
        if let Some(scales) = self.scales {
            let block = |b: usize| {
                let k = b * S::VALUES..((b + 1) * S::VALUES).min(self.shape[1]);
                let mut block = zeros::<S>();
                let (scale, values) = bytemuck::bytes_of_mut(&mut block).split_at_mut(Fp8::SCALE);
                scale.copy_from_slice(&scales.of(row, k.start, self.shape[1]));
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

/// Packing from the type that it is run for, to this one.
struct PackFrom(WeightType);

impl ForFormat for PackFrom {
    type Output = PackAs;
    fn run<S: Format>(self) -> PackAs {
        self.0.run(PackTo(std::marker::PhantomData::<S>))
    }
}

/// Packing from `S` to the type that it is run for.
struct PackTo<S>(std::marker::PhantomData<S>);

impl<S: Format> ForFormat for PackTo<S> {
    type Output = PackAs;
    fn run<T: Format>(self) -> PackAs {
        pack_as::<S, T>
    }
}

/// Bytes of the 16-byte words that the columns of a panel have side by side.
const ROW: usize = PANEL as usize * 16;

/// Bytes of a unit: a block of every column of a panel.
pub(crate) const fn unit_bytes(to: WeightType) -> usize {
    to.device_words() as usize * ROW
}

/// Units that `columns` packed columns of `depth` values take.
pub(crate) fn units(to: WeightType, columns: usize, depth: usize) -> usize {
    columns.div_ceil(PANEL as usize) * depth.div_ceil(to.device_depth() as usize)
}

/// Packs columns `columns` (rows of the `[out, in]` matrix), of which the units `units` are wanted, into
/// `packed`.
///
/// # Panics
///
/// If `packed` does not hold exactly those units.
pub(crate) fn pack(
    matrix: &MatrixView<'_>,
    to: WeightType,
    columns: Range<usize>,
    units: Range<usize>,
    packed: WriteOnly<'_, [u8]>,
) {
    let unit = unit_bytes(to);
    assert_eq!(packed.len(), units.len() * unit, "bytes of the packed units");
    let pack = matrix.weight_type.run(PackFrom(to));
    // Small matrices are done before a thread has started.
    let least = ((256 << 10) / unit).max(1);
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = cores.min(units.len() / least).clamp(1, 8);
    let share = units.len().div_ceil(threads).max(1);
    let rows = share * (unit / ROW);
    let mut packed: Vec<Row<'_>> = packed.into_chunks::<ROW>().0.into_iter().collect();
    std::thread::scope(|scope| {
        let mut end = units.end;
        while packed.len() > rows {
            let mine = packed.split_off(packed.len() - rows);
            end -= share;
            let columns = columns.clone();
            scope.spawn(move || pack(matrix, columns, end, mine));
        }
        pack(matrix, columns, units.start, packed);
    });
}

/// Memory for a row of words. One by one, as wgpu lets a slice of write-only memory not go to another
/// thread.
type Row<'a> = WriteOnly<'a, [u8; ROW]>;
type PackAs = fn(&MatrixView<'_>, Range<usize>, usize, Vec<Row<'_>>);

/// Values of a column that are packed at a time: whole blocks of every type, few enough that those of a
/// panel stay close to the core.
const WINDOW: usize = 256;

/// Packs the units from `unit` on.
fn pack_as<S: Format, T: Format>(
    matrix: &MatrixView<'_>,
    columns: Range<usize>,
    mut unit: usize,
    packed: Vec<Row<'_>>,
) {
    let depth = matrix.shape[1];
    let blocks = depth.div_ceil(T::DEPTH);
    let mut packed = packed.into_iter();
    let mut words = vec![[[0u8; 16]; PANEL as usize]; WINDOW / T::DEPTH * T::WORDS];
    while packed.len() > 0 {
        let (panel, block) = (unit / blocks, unit % blocks);
        let count = (WINDOW - block * T::DEPTH % WINDOW) / T::DEPTH;
        let count = count.min(blocks - block).min(packed.len() / T::WORDS);
        let first = columns.start + panel * PANEL as usize;
        let k = block * T::DEPTH..((block + count) * T::DEPTH).min(depth);
        let words = &mut words[..count * T::WORDS];
        words.fill([[0; 16]; PANEL as usize]);
        for column in 0..(PANEL as usize).min(columns.end - first) {
            let blocks = stored::<S, T>(matrix, first + column, k.clone());
            let each = blocks.chunks(T::DEPTH / T::VALUES);
            for (blocks, words) in each.zip(words.chunks_exact_mut(T::WORDS)) {
                let mut own = [Word::default(); MOST_WORDS];
                T::place(blocks, &mut own[..T::WORDS]);
                for (row, word) in words.iter_mut().zip(own) {
                    row[column] = word;
                }
            }
        }
        for (row, out) in words.iter().zip(packed.by_ref()) {
            out.write(bytemuck::cast(*row));
        }
        unit += count;
    }
}

/// Most words of a block.
const MOST_WORDS: usize = 17;

/// Values `k` of a row in the blocks of another type; the same bits where the types are the same.
/// `k` begins with a block of `T`.
#[inline]
fn stored<'a, S: Format, T: Format>(
    matrix: &MatrixView<'a>,
    row: usize,
    k: Range<usize>,
) -> Cow<'a, [T::Block]> {
    let whole = k.start / S::VALUES * S::VALUES;
    let blocks = matrix.blocks::<S>(row, k.start / S::VALUES..k.end.div_ceil(S::VALUES));
    if std::any::TypeId::of::<S>() == std::any::TypeId::of::<T>() {
        return match blocks {
            Cow::Borrowed(blocks) => Cow::Borrowed(bytemuck::cast_slice(blocks)),
            Cow::Owned(blocks) => blocks.into_iter().map(bytemuck::cast).collect(),
        };
    }
    let mut values = [0.0; WINDOW];
    for (block, values) in blocks.iter().zip(values.chunks_exact_mut(S::VALUES)) {
        S::widen(block, values);
    }
    values[k.start - whole..k.end - whole].chunks(T::VALUES).map(T::narrow).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    fn packed(matrix: &MatrixView<'_>, to: WeightType, columns: Range<usize>) -> Vec<u8> {
        let all = 0..units(to, columns.len(), matrix.shape[1]);
        let mut bytes = vec![0xff; all.len() * unit_bytes(to)];
        pack(matrix, to, columns, all, (&mut bytes[..]).into());
        bytes
    }

    fn view(values: &[f32], shape: [u32; 2]) -> MatrixView<'_> {
        let bytes = bytemuck::cast_slice(values);
        MatrixView::new(bytes, WeightType::F32, shape, [shape[1].into(), 1]).unwrap()
    }

    #[test]
    fn packs_panels_of_16_byte_words() {
        // 33 columns of 5 values: a panel of 32 columns and one of 1, two words a column.
        let w: Vec<f32> = (0..33 * 5).map(|i| i as f32).collect();
        let matrix = view(&w, [33, 5]);
        let f32s: Vec<f32> = bytemuck::pod_collect_to_vec(&packed(&matrix, WeightType::F32, 0..33));
        let value = |word: usize, lane: usize| f32s[word * 4 + lane];
        assert_eq!(f32s.len(), 64 * 2 * 4);
        assert_eq!([value(0, 0), value(0, 3), value(1, 0), value(31, 2)], [0.0, 3.0, 5.0, 157.0]);
        assert_eq!([value(32, 0), value(32, 1), value(33, 0)], [4.0, 0.0, 9.0]); // second words, padded
        assert_eq!([value(64, 0), value(65, 0), value(96, 0)], [160.0, 0.0, 164.0]); // the last panel, padded
        let words: Vec<u32> =
            bytemuck::pod_collect_to_vec(&packed(&matrix, WeightType::Bf16, 32..33));
        assert_eq!(words[..8], [0x4321_4320, 0x4323_4322, 0x0000_4324, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn packs_in_parts_and_in_any_layout() {
        // Deep and wide enough for several threads; awkward in both directions.
        let (rows, depth) = (70usize, 4100usize);
        let w: Vec<f32> = (0..rows * depth).map(|i| (i % 8191) as f32 - 4000.5).collect();
        let matrix = view(&w, [70, 4100]);
        for &to in WeightType::ALL {
            let whole = packed(&matrix, to, 0..rows);
            // A value at a time, as the module says.
            let lanes = to.device_depth() as usize;
            let chunks = depth.div_ceil(lanes);
            for (row, k) in [(0, 0), (31, 4099), (32, 8), (69, 4096), (69, 4099), (5, 2049)] {
                let word = (row / 32 * chunks + k / lanes) * 32 + row % 32;
                let v = w[row * depth + k];
                let want = match to {
                    WeightType::F32 => v.to_le_bytes().to_vec(),
                    WeightType::F16 => f16::from_f32(v).to_le_bytes().to_vec(),
                    WeightType::Bf16 => bf16::from_f32(v).to_le_bytes().to_vec(),
                    _ => continue,
                };
                let got = &whole[word * 16 + k % lanes * want.len()..][..want.len()];
                assert_eq!(got, want, "[{row}, {k}] as {to:?}");
            }
            // As files have it: the same bytes, without a conversion.
            let file = to.encode(&w, depth);
            let stride = depth.next_multiple_of(to.block_values() as usize) as u64;
            let stored = MatrixView::new(&file, to, [70, 4100], [stride, 1]).unwrap();
            assert!(packed(&stored, to, 0..rows) == whole, "stored differs, {to:?}");
            let values = to.decode(&file, depth);
            for (row, k) in [(0, 0), (31, 4099), (69, 4099)] {
                assert_eq!(stored.get(row, k), values[row * depth + k], "[{row}, {k}] of {to:?}");
            }
            // In parts of a few units.
            let unit = unit_bytes(to);
            let mut parts = vec![0xff; whole.len()];
            for (i, part) in parts.chunks_mut(7 * unit).enumerate() {
                let units = i * 7..i * 7 + part.len() / unit;
                pack(&matrix, to, 0..rows, units, part.into());
            }
            assert!(parts == whole, "parts differ, {to:?}");
            // Transposed, at an odd address.
            let mut bytes = vec![0u8];
            for k in 0..depth {
                bytes.extend((0..rows).flat_map(|row| w[row * depth + k].to_le_bytes()));
            }
            let turned =
                MatrixView::new(&bytes[1..], WeightType::F32, [70, 4100], [1, 70]).unwrap();
            assert!(packed(&turned, to, 0..rows) == whole, "transposed differs, {to:?}");
        }
    }

    /// Every type to every other, by values.
    #[test]
    fn packs_every_type_from_every_type() {
        let (rows, depth) = (33usize, 300usize);
        let w: Vec<f32> =
            (0..rows * depth).map(|i| (i * 7919 % 2003) as f32 / 1001.5 - 1.0).collect();
        for &from in WeightType::ALL {
            let file = from.encode(&w, depth);
            let stride = depth.next_multiple_of(from.block_values() as usize) as u64;
            let view = MatrixView::new(&file, from, [33, 300], [stride, 1]).unwrap();
            let values = from.decode(&file, depth);
            for &to in WeightType::ALL {
                let widened = self::view(&values, [33, 300]);
                let got = packed(&view, to, 0..rows);
                let want = packed(&widened, to, 0..rows);
                assert!(from == to || got == want, "{from:?} to {to:?}");
            }
        }
    }

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
        let blocks = |shape, strides| MatrixView::new(&[0; 68], WeightType::Q8_0, shape, strides);
        assert!(blocks([2, 32], [32, 1]).is_ok());
        assert!(blocks([2, 20], [32, 1]).is_ok());
        assert!(blocks([3, 32], [32, 1]).is_err());
        assert!(blocks([2, 33], [64, 1]).is_err());
        assert!(blocks([2, 32], [48, 1]).is_err());
        assert!(blocks([32, 2], [1, 32]).is_err());
    }
}
