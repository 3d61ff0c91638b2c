//! Expert weights in pages: buffers that each hold a range of experts, or of one expert's columns, within the device's
//! limits (ARCHITECTURE 1).
//!
//! A matrix `[N, K]` is packed for the kernels: cut into panels of [`PANEL`] columns (the last one padded); within a panel,
//! the `c`-th 16 bytes (4 or 8 values of K, zero-padded) of column `n` are 16-byte word `c * PANEL + n`. So lanes that work
//! on neighbouring columns read neighbouring words, and a workgroup reads whole stretches of memory.
use crate::kernel::{alive, scoped};
use crate::slice::bytes_of;
use crate::{Context, Error, Result};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

/// Columns of a panel of packed weights.
pub const PANEL: u32 = 32;

/// Storage type of weights. Sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats; needs no `SHADER_F16`.
    F16,
    /// The upper half of 32-bit floats, as checkpoints have it.
    Bf16,
}

impl WeightType {
    /// Bytes of a value.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Values in 16 bytes.
    pub(crate) const fn lanes(self) -> u32 {
        (16 / self.bytes()) as u32
    }
}

/// Weights on the host, row-major `[out, in]` as checkpoints have them.
#[derive(Clone, Copy, Debug)]
pub enum HostWeights<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// 16-bit floats.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl HostWeights<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A value, widened exactly.
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::F32(v) => v[i],
            Self::F16(v) => v[i].to_f32(),
            Self::Bf16(v) => v[i].to_f32(),
        }
    }
}

/// Which of an expert's matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Projection {
    /// `Wgate [F, D]`.
    Gate,
    /// `Wup [F, D]`.
    Up,
    /// `Wdown [D, F]`.
    Down,
}

impl Projection {
    /// All three.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];
}

/// Shape of the experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExpertShape {
    /// Experts, shared ones included: those follow the routed ones.
    pub experts: u32,
    /// D: hidden size.
    pub hidden: u32,
    /// F: intermediate size of one expert.
    pub intermediate: u32,
    /// Storage type.
    pub weight_type: WeightType,
}

impl ExpertShape {
    /// Rows and columns `[out, in]` of a projection.
    pub fn matrix(&self, projection: Projection) -> [u32; 2] {
        match projection {
            Projection::Gate | Projection::Up => [self.intermediate, self.hidden],
            Projection::Down => [self.hidden, self.intermediate],
        }
    }

    /// Bytes of one expert's three matrices, unpadded: what a checkpoint holds.
    pub fn expert_bytes(&self) -> u64 {
        3 * u64::from(self.hidden) * u64::from(self.intermediate) * self.weight_type.bytes()
    }

    /// Bytes of `columns` packed columns of a matrix whose rows hold `depth` values.
    fn packed_bytes(&self, columns: u32, depth: u32) -> u64 {
        u64::from(columns.next_multiple_of(PANEL))
            * u64::from(depth.div_ceil(self.weight_type.lanes()))
            * 16
    }
}

/// A page: some columns of some experts, in a buffer of their own.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) experts: Range<u32>,
    pub(crate) columns: Range<u32>,
    /// The projection's packed weights; for gate pages, the up weights of the same experts and columns too.
    pub(crate) buffer: wgpu::Buffer,
    pub(crate) up: Option<wgpu::Buffer>,
}

/// The experts of one layer on the device. Clones share the pages.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    shape: ExpertShape,
    gate_up: Arc<[Page]>,
    down: Arc<[Page]>,
}

impl ExpertWeights {
    /// Room for the experts of a layer, each page within the device's limits and `page_limit` bytes.
    ///
    /// # Errors
    ///
    /// Zero sizes; a `page_limit` that cannot hold one panel of columns; [`Error::Device`] where memory runs out or the
    /// device is lost.
    pub fn new(ctx: &Context, shape: ExpertShape, page_limit: Option<u64>) -> Result<Self> {
        let ExpertShape { experts, hidden, intermediate, .. } = shape;
        crate::ops::not_zero(&[
            ("experts", experts),
            ("hidden", hidden),
            ("intermediate", intermediate),
        ])?;
        bytes_of("hidden", &[hidden.into(), intermediate.into(), experts.into()], 4)?;
        alive(ctx.device())?;
        let limit = page_limit.unwrap_or(u64::MAX).min(ctx.max_binding());
        let pages = |projection: Projection| -> Result<Arc<[Page]>> {
            let gated = projection == Projection::Gate;
            ranges(&shape, projection, limit)?
                .into_iter()
                .map(|(experts, columns)| {
                    let depth = shape.matrix(projection)[1];
                    let bytes = shape.packed_bytes(columns.end - columns.start, depth)
                        * u64::from(experts.end - experts.start);
                    let buffer = |label| {
                        scoped(ctx.device(), || {
                            ctx.device().create_buffer(&wgpu::BufferDescriptor {
                                label: Some(label),
                                size: bytes,
                                usage: wgpu::BufferUsages::STORAGE
                                    | wgpu::BufferUsages::COPY_DST
                                    | wgpu::BufferUsages::COPY_SRC,
                                mapped_at_creation: false,
                            })
                        })
                    };
                    let up = if gated { Some(buffer("up")?) } else { None };
                    let buffer = buffer(if gated { "gate" } else { "down" })?;
                    Ok(Page { experts, columns, buffer, up })
                })
                .collect()
        };
        Ok(Self { shape, gate_up: pages(Projection::Gate)?, down: pages(Projection::Down)? })
    }

    /// Shape of the experts.
    pub fn shape(&self) -> ExpertShape {
        self.shape
    }

    /// Pages, and so dispatches, of the first matmul and of the second.
    pub fn page_counts(&self) -> [usize; 2] {
        [self.gate_up.len(), self.down.len()]
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        let size = |p: &Page| p.buffer.size() + p.up.as_ref().map_or(0, wgpu::Buffer::size);
        self.gate_up.iter().chain(&*self.down).map(size).sum()
    }

    pub(crate) fn gate_up(&self) -> &[Page] {
        &self.gate_up
    }

    pub(crate) fn down(&self) -> &[Page] {
        &self.down
    }

    /// Uploads one matrix of one expert, `[out, in]`, converted to the storage type (rounded to nearest) and packed. Takes
    /// effect with the next submission to `queue`.
    ///
    /// # Errors
    ///
    /// An expert that is not there, or a matrix of another size.
    pub fn write(
        &self,
        queue: &wgpu::Queue,
        expert: u32,
        projection: Projection,
        weights: HostWeights<'_>,
    ) -> Result<()> {
        let [columns, depth] = self.shape.matrix(projection);
        if expert >= self.shape.experts {
            return Err(Error::invalid("expert", format!("{expert} of {}", self.shape.experts)));
        }
        let expected = u64::from(columns) * u64::from(depth);
        if weights.len() as u64 != expected {
            return Err(Error::invalid(
                "weights",
                format!("expected {expected} values, got {}", weights.len()),
            ));
        }
        let pages = if projection == Projection::Down { &self.down } else { &self.gate_up };
        for page in pages.iter().filter(|p| p.experts.contains(&expert)) {
            let buffer = match (projection, &page.up) {
                (Projection::Up, Some(up)) => up,
                _ => &page.buffer,
            };
            let packed =
                pack(weights, self.shape.weight_type, depth as usize, page.columns.clone());
            let at = u64::from(expert - page.experts.start) * packed.len() as u64 * 4;
            queue.write_buffer(buffer, at, bytemuck::cast_slice(&packed));
        }
        Ok(())
    }
}

/// The experts and columns of each page of a projection.
fn ranges(
    shape: &ExpertShape,
    projection: Projection,
    limit: u64,
) -> Result<Vec<(Range<u32>, Range<u32>)>> {
    let [columns, depth] = shape.matrix(projection);
    let expert = shape.packed_bytes(columns, depth);
    let fit = u32::try_from(limit / expert).unwrap_or(u32::MAX);
    let starts = |n: u32, step: u32| {
        (0..n).step_by(step as usize).map(move |i| i..(i.saturating_add(step)).min(n))
    };
    if fit > 0 {
        return Ok(starts(shape.experts, fit).map(|e| (e, 0..columns)).collect());
    }
    // One expert is too large: pages of its columns, in whole panels.
    let panels = limit / shape.packed_bytes(PANEL, depth);
    let step = u32::try_from(panels * u64::from(PANEL)).unwrap_or(u32::MAX / PANEL * PANEL);
    if step == 0 {
        let need = shape.packed_bytes(PANEL, depth);
        return Err(Error::Limit { name: "weights", limit: "page size", need, have: limit });
    }
    Ok((0..shape.experts).flat_map(|e| starts(columns, step).map(move |c| (e..e + 1, c))).collect())
}

/// Packs some columns (rows of the `[out, in]` matrix) as the module says.
fn pack(weights: HostWeights<'_>, to: WeightType, depth: usize, columns: Range<u32>) -> Vec<u32> {
    let lanes = to.lanes() as usize;
    let chunks = depth.div_ceil(lanes);
    let columns = columns.start as usize..columns.end as usize;
    let panel = PANEL as usize;
    let mut packed = Vec::with_capacity(columns.len().next_multiple_of(panel) * chunks * 4);
    let bits = |column: usize, k: usize| -> u32 {
        if k >= depth || column >= columns.end {
            return 0;
        }
        let i = column * depth + k;
        match (to, weights) {
            (WeightType::F32, w) => w.get(i).to_bits(),
            (WeightType::F16, HostWeights::F16(w)) => w[i].to_bits().into(),
            (WeightType::Bf16, HostWeights::Bf16(w)) => w[i].to_bits().into(),
            (WeightType::F16, w) => f16::from_f32(w.get(i)).to_bits().into(),
            (WeightType::Bf16, w) => bf16::from_f32(w.get(i)).to_bits().into(),
        }
    };
    for start in columns.clone().step_by(panel) {
        for c in 0..chunks {
            for column in start..start + panel {
                for w in 0..4 {
                    packed.push(if to == WeightType::F32 {
                        bits(column, c * 4 + w)
                    } else {
                        bits(column, c * 8 + 2 * w) | bits(column, c * 8 + 2 * w + 1) << 16
                    });
                }
            }
        }
    }
    packed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_panels_of_16_byte_words() {
        // 33 columns of 5 values: a panel of 32 columns and one of 1, two words a column.
        let w: Vec<f32> = (0..33 * 5).map(|i| i as f32).collect();
        let packed = pack(HostWeights::F32(&w), WeightType::F32, 5, 0..33);
        let value = |word: usize, lane: usize| f32::from_bits(packed[word * 4 + lane]);
        assert_eq!(packed.len(), 64 * 2 * 4);
        assert_eq!([value(0, 0), value(0, 3), value(1, 0), value(31, 2)], [0.0, 3.0, 5.0, 157.0]);
        assert_eq!([value(32, 0), value(32, 1), value(33, 0)], [4.0, 0.0, 9.0]); // second words, padded
        assert_eq!([value(64, 0), value(65, 0), value(96, 0)], [160.0, 0.0, 164.0]); // the last panel, padded
        let packed = pack(HostWeights::F32(&w), WeightType::Bf16, 5, 32..33);
        assert_eq!(packed[..8], [0x4321_4320, 0x4323_4322, 0x0000_4324, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn pages_stay_within_the_limit() {
        let shape =
            ExpertShape { experts: 5, hidden: 64, intermediate: 96, weight_type: WeightType::Bf16 };
        let whole = ranges(&shape, Projection::Gate, 2 * 96 * 64 * 2).unwrap();
        assert_eq!(whole, [(0..2, 0..96), (2..4, 0..96), (4..5, 0..96)]);
        let split = ranges(&shape, Projection::Gate, 70 * 64 * 2).unwrap();
        assert_eq!(split[..3], [(0..1, 0..64), (0..1, 64..96), (1..2, 0..64)]);
        assert!(ranges(&shape, Projection::Gate, 31 * 64 * 2).is_err());
    }
}
