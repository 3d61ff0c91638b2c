//! Packing: matrices on the host, in any storage type and layout, into the panels that the kernels
//! read (see [`crate::weights`]).
use super::PANEL;
use super::format::{ForFormat, Format, Word};
use super::view::MatrixView;
use crate::WeightType;
use std::borrow::Cow;
use std::ops::Range;
use wgpu::WriteOnly;

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

/// Most words of a block on the device.
const MOST_WORDS: usize = {
    let (mut most, mut i) = (0, 0);
    while i < WeightType::ALL.len() {
        let words = WeightType::ALL[i].device_words() as usize;
        most = if words > most { words } else { most };
        i += 1;
    }
    most
};

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
}
