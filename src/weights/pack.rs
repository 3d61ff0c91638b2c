//! Packing: matrices on the host, in any storage type and layout, into the panels that the kernels read (see
//! [`crate::weights`]).
use super::PANEL;
use super::format::{ForValue, Value};
use crate::error::bytes_of;
use crate::{Error, Result, WeightType};
use bytemuck::Zeroable;
use std::ops::Range;
use wgpu::WriteOnly;

/// A matrix inside the bytes of a tensor: little-endian values at any alignment, rows and columns at any distance. So one
/// expert of a stacked tensor, a transposed matrix, or some columns of a wider one need no copy.
#[derive(Clone, Copy, Debug)]
pub struct MatrixView<'a> {
    bytes: &'a [u8],
    weight_type: WeightType,
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> MatrixView<'a> {
    /// The matrix of `shape` `[out, in]` whose value `[row, column]` is value `row * strides[0] + column * strides[1]` of
    /// `bytes`.
    ///
    /// # Errors
    ///
    /// A matrix that reaches past the end of `bytes`.
    pub fn new(
        bytes: &'a [u8],
        weight_type: WeightType,
        shape: [u32; 2],
        strides: [u64; 2],
    ) -> Result<Self> {
        let value = weight_type.bytes();
        let need = if shape.contains(&0) {
            0
        } else {
            let last = |axis: usize| {
                bytes_of("strides", &[u64::from(shape[axis] - 1), strides[axis]], value)
            };
            let need = last(0)?.checked_add(last(1)?).and_then(|n| n.checked_add(value));
            need.ok_or_else(|| Error::invalid("strides", format!("{strides:?} overflow")))?
        };
        if need > bytes.len() as u64 {
            let got = bytes.len() as u64;
            return Err(Error::size("bytes", need, got));
        }
        // A stride that is never taken may be any number.
        let stride = |axis: usize| if shape[axis] > 1 { strides[axis] as usize } else { 1 };
        let whole = bytes.len() - bytes.len() % value as usize;
        Ok(Self {
            bytes: &bytes[..whole],
            weight_type,
            shape: shape.map(|n| n as usize),
            strides: [stride(0), stride(1)],
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

    /// Bytes of the values that are part of the matrix.
    pub fn size(&self) -> u64 {
        self.shape[0] as u64 * self.shape[1] as u64 * self.weight_type.bytes()
    }

    /// A value, widened exactly.
    ///
    /// # Panics
    ///
    /// Outside the matrix.
    pub fn get(&self, row: usize, column: usize) -> f32 {
        assert!(
            row < self.shape[0] && column < self.shape[1],
            "[{row}, {column}] of {:?}",
            self.shape
        );
        let i = row * self.strides[0] + column * self.strides[1];
        self.weight_type.run(Get(self.bytes, i))
    }
}

/// One value of some bytes, widened.
struct Get<'a>(&'a [u8], usize);

impl ForValue for Get<'_> {
    type Output = f32;
    fn run<V: Value>(self) -> f32 {
        V::widen(cast::<V>(self.0)[self.1])
    }
}

/// Packing from the type that it is run for, to this one.
struct PackFrom(WeightType);

impl ForValue for PackFrom {
    type Output = PackAs;
    fn run<S: Value>(self) -> PackAs {
        self.0.run(PackTo(std::marker::PhantomData::<S>))
    }
}

/// Packing from `S` to the type that it is run for.
struct PackTo<S>(std::marker::PhantomData<S>);

impl<S: Value> ForValue for PackTo<S> {
    type Output = PackAs;
    fn run<T: Value>(self) -> PackAs {
        pack_as::<S, T>
    }
}

fn cast<S: Value>(bytes: &[u8]) -> &[S::Bytes] {
    bytemuck::cast_slice(bytes)
}

/// The same bits where the types are the same, NaN included.
fn convert<S: Value, T: Value>(bytes: S::Bytes) -> T::Bytes {
    if std::any::TypeId::of::<S>() == std::any::TypeId::of::<T>() {
        bytemuck::cast(bytes)
    } else {
        T::narrow(S::widen(bytes))
    }
}

/// Bytes of a unit: the 16-byte words that the columns of a panel have side by side.
pub(crate) const UNIT: usize = PANEL as usize * 16;

/// Units that `columns` packed columns of `depth` values take.
pub(crate) fn units(to: WeightType, columns: usize, depth: usize) -> usize {
    columns.div_ceil(PANEL as usize) * depth.div_ceil(to.lanes() as usize)
}

/// Packs columns `columns` (rows of the `[out, in]` matrix), of which the units `units` are wanted, into `packed`.
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
    assert_eq!(packed.len(), units.len() * UNIT, "bytes of the packed units");
    let pack = matrix.weight_type.run(PackFrom(to));
    // Small matrices are done before a thread has started.
    const LEAST: usize = (256 << 10) / UNIT;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = cores.min(units.len() / LEAST).clamp(1, 8);
    let share = units.len().div_ceil(threads).max(1);
    let mut packed: Vec<Unit<'_>> = packed.into_chunks::<UNIT>().0.into_iter().collect();
    std::thread::scope(|scope| {
        let mut end = units.end;
        while packed.len() > share {
            let mine = packed.split_off(packed.len() - share);
            end -= share;
            let columns = columns.clone();
            scope.spawn(move || pack(matrix, columns, end, mine));
        }
        pack(matrix, columns, units.start, packed);
    });
}

/// Memory for a unit. One by one, as wgpu lets a slice of write-only memory not go to another thread.
type Unit<'a> = WriteOnly<'a, [u8; UNIT]>;
type PackAs = fn(&MatrixView<'_>, Range<usize>, usize, Vec<Unit<'_>>);

/// Columns and depth of the square that is converted at a time: few enough bytes to stay close to the core, enough that a
/// line of the source is read once.
const TILE: usize = PANEL as usize;

/// Packs the units from `unit` on.
fn pack_as<S: Value, T: Value>(
    matrix: &MatrixView<'_>,
    columns: Range<usize>,
    mut unit: usize,
    packed: Vec<Unit<'_>>,
) {
    let lanes = 16 / size_of::<T::Bytes>();
    let depth = matrix.shape[1];
    let chunks = depth.div_ceil(lanes);
    let mut packed = packed.into_iter();
    while packed.len() > 0 {
        let (panel, chunk) = (unit / chunks, unit % chunks);
        let count = (TILE / lanes).min(chunks - chunk).min(packed.len());
        let first = columns.start + panel * TILE;
        let rows = first..(first + TILE).min(columns.end);
        let k = chunk * lanes;
        let tile = convert_tile::<S, T>(matrix, rows, k..(k + count * lanes).min(depth));
        for (chunk, out) in packed.by_ref().take(count).enumerate() {
            let mut words = [0u8; UNIT];
            for (word, row) in words.chunks_exact_mut(16).zip(&tile) {
                word.copy_from_slice(bytemuck::cast_slice(&row[chunk * lanes..][..lanes]));
            }
            out.write(words);
        }
        unit += count;
    }
}

/// Values `[rows, k]` of a matrix, converted; zero past them.
#[inline]
fn convert_tile<S: Value, T: Value>(
    matrix: &MatrixView<'_>,
    rows: Range<usize>,
    k: Range<usize>,
) -> [[T::Bytes; TILE]; TILE] {
    let mut tile = [[T::Bytes::zeroed(); TILE]; TILE];
    let values = cast::<S>(matrix.bytes);
    let [down, along] = matrix.strides;
    if along == 1 {
        for (row, out) in rows.zip(&mut tile) {
            let line = &values[row * down + k.start..][..k.len()];
            for (out, &value) in out.iter_mut().zip(line) {
                *out = convert::<S, T>(value);
            }
        }
    } else {
        // A transposed matrix: neighbours lie across the rows.
        for (i, k) in k.enumerate() {
            for (row, out) in rows.clone().zip(&mut tile) {
                out[i] = convert::<S, T>(values[row * down + k * along]);
            }
        }
    }
    tile
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    fn packed(matrix: &MatrixView<'_>, to: WeightType, columns: Range<usize>) -> Vec<u8> {
        let all = 0..units(to, columns.len(), matrix.shape[1]);
        let mut bytes = vec![0xff; all.len() * UNIT];
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
            let lanes = to.lanes() as usize;
            let chunks = depth.div_ceil(lanes);
            for (row, k) in [(0, 0), (31, 4099), (32, 8), (69, 4096), (69, 4099), (5, 2049)] {
                let word = (row / 32 * chunks + k / lanes) * 32 + row % 32;
                let bytes = to.bytes() as usize;
                let got = &whole[word * 16 + k % lanes * bytes..][..bytes];
                let v = w[row * depth + k];
                let want = match to {
                    WeightType::F32 => v.to_le_bytes().to_vec(),
                    WeightType::F16 => f16::from_f32(v).to_le_bytes().to_vec(),
                    WeightType::Bf16 => bf16::from_f32(v).to_le_bytes().to_vec(),
                };
                assert_eq!(got, want, "[{row}, {k}] as {to:?}");
            }
            // In parts of a few units.
            let mut parts = vec![0xff; whole.len()];
            for (i, part) in parts.chunks_mut(7 * UNIT).enumerate() {
                let units = i * 7..i * 7 + part.len() / UNIT;
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
    }
}
