//! Expert weights in pages: buffers that each hold a range of experts, or of one expert's columns, within the device's
//! limits.
//!
//! A matrix `[N, K]` is packed for the kernels: cut into panels of [`PANEL`] columns (the last one padded); within a panel,
//! the `c`-th 16 bytes (4 or 8 values of K, zero-padded) of column `n` are 16-byte word `c * PANEL + n`. So lanes that work
//! on neighbouring columns read neighbouring words, and a workgroup reads whole stretches of memory.
use super::pack::{self, UNIT};
use super::{HostWeights, MatrixView, PANEL, WeightType};
use crate::device::guard::{alive, scoped};
use crate::{Context, Error, Result};
use std::ops::Range;
use std::sync::Arc;

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

    /// Rows and columns of the gate and of the up projection, `[F, D]`.
    pub(crate) fn gate_up_matrix(&self) -> [u32; 2] {
        self.matrix(Projection::Gate)
    }

    /// Bytes of one expert's three matrices, unpadded: what a checkpoint holds.
    pub fn expert_bytes(&self) -> u64 {
        let values = u64::from(self.hidden) * u64::from(self.intermediate);
        values.saturating_mul(3 * self.weight_type.bytes())
    }

    pub(crate) fn check(&self) -> Result<()> {
        let Self { experts, hidden, intermediate, .. } = *self;
        crate::error::not_zero(&[
            ("experts", experts),
            ("hidden", hidden),
            ("intermediate", intermediate),
        ])?;
        // Padded and packed they are more.
        if self.device_bytes().checked_mul(experts.into()).is_none() {
            let shape = [hidden, intermediate, experts];
            return Err(Error::invalid("hidden", format!("{shape:?} overflows")));
        }
        Ok(())
    }

    /// Bytes of one expert's three matrices on the device, padded and packed. `u64::MAX` where they do not fit 64 bits.
    pub fn device_bytes(&self) -> u64 {
        Projection::ALL
            .map(|p| self.matrix(p))
            .iter()
            .map(|&[columns, depth]| self.packed_bytes(columns, depth))
            .fold(0, u64::saturating_add)
    }

    /// Bytes of `columns` packed columns of a matrix whose rows hold `depth` values, or `u64::MAX`.
    fn packed_bytes(&self, columns: u32, depth: u32) -> u64 {
        u64::from(columns)
            .next_multiple_of(PANEL.into())
            .saturating_mul(16 * u64::from(depth.div_ceil(self.weight_type.lanes())))
    }
}

/// Most pages of a projection. Each is a buffer and a dispatch; a layer of 64 GiB in pages of 4 MiB has as many.
const MAX_PAGES: u64 = 1 << 14;

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
    /// Zero sizes, or sizes whose bytes overflow; a device whose bindings cannot hold one panel of
    /// columns; [`Error::Device`] where memory runs out or the device is lost.
    pub fn new(ctx: &Context, shape: ExpertShape) -> Result<Self> {
        Self::with_page_limit(ctx, shape, u64::MAX)
    }

    /// The same in pages of at most `page_limit` bytes.
    ///
    /// # Errors
    ///
    /// As [`ExpertWeights::new`], and a `page_limit` that cannot hold one panel of columns, or that
    /// makes more than 16,384 pages of a projection.
    pub fn with_page_limit(ctx: &Context, shape: ExpertShape, page_limit: u64) -> Result<Self> {
        shape.check()?;
        alive(ctx.device())?;
        let limit = PageLimit::new(page_limit, ctx.max_binding());
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
        self.buffers().map(wgpu::Buffer::size).sum()
    }

    /// The pages' buffers: each page of gate with that of up behind it, then down.
    pub fn buffers(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        self.gate_up
            .iter()
            .chain(&*self.down)
            .flat_map(|p| [Some(&p.buffer), p.up.as_ref()])
            .flatten()
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
        for part in self.parts(expert, projection, weights)? {
            part.write(queue, 0..part.units())?;
        }
        Ok(())
    }

    /// Where one matrix of one expert goes: a part for each page that has columns of it.
    pub(crate) fn parts<'a>(
        &'a self,
        expert: u32,
        projection: Projection,
        weights: HostWeights<'a>,
    ) -> Result<impl Iterator<Item = Part<'a>>> {
        if expert >= self.shape.experts {
            return Err(Error::invalid("expert", format!("{expert} of {}", self.shape.experts)));
        }
        let matrix = weights.matrix(self.shape.matrix(projection))?;
        let weight_type = self.shape.weight_type;
        let pages = if projection == Projection::Down { &self.down } else { &self.gate_up };
        Ok(pages.iter().filter(move |p| p.experts.contains(&expert)).map(move |page| {
            let buffer = match (projection, &page.up) {
                (Projection::Up, Some(up)) => up,
                _ => &page.buffer,
            };
            let columns = page.columns.start as usize..page.columns.end as usize;
            let mut part = Part { buffer, offset: 0, matrix, weight_type, columns };
            part.offset = u64::from(expert - page.experts.start) * (part.units() * UNIT) as u64;
            part
        }))
    }
}

/// Columns of a matrix, on their way to a page.
pub(crate) struct Part<'a> {
    buffer: &'a wgpu::Buffer,
    offset: u64,
    matrix: MatrixView<'a>,
    weight_type: WeightType,
    columns: Range<usize>,
}

impl Part<'_> {
    /// Pieces of [`UNIT`] bytes that it is made of.
    pub(crate) fn units(&self) -> usize {
        pack::units(self.weight_type, self.columns.len(), self.matrix.shape()[1] as usize)
    }

    /// Packs some of its units straight into memory that wgpu copies to the page with the next submission.
    pub(crate) fn write(&self, queue: &wgpu::Queue, units: Range<usize>) -> Result<()> {
        let offset = self.offset + (units.start * UNIT) as u64;
        let Some(size) = wgpu::BufferSize::new((units.len() * UNIT) as u64) else {
            return Ok(());
        };
        let refused = || Error::Device(format!("no staging memory of {size} bytes"));
        let mut staging = queue.write_buffer_with(self.buffer, offset, size).ok_or_else(refused)?;
        let packed = staging.slice(..);
        pack::pack(&self.matrix, self.weight_type, self.columns.clone(), units, packed);
        Ok(())
    }
}

/// The most bytes of a page.
#[derive(Clone, Copy, Debug)]
struct PageLimit {
    bytes: u64,
    /// Whether it is the caller's own rather than the device's.
    own: bool,
}

impl PageLimit {
    fn new(page_limit: u64, binding: u64) -> Self {
        Self { bytes: page_limit.min(binding), own: page_limit < binding }
    }

    /// Errors for more pages than are sensible, before any is made.
    fn few(self, pages: u64, projection: Projection) -> Result<()> {
        if pages <= MAX_PAGES {
            return Ok(());
        }
        let Self { bytes, own } = self;
        let name = if own { "page_limit" } else { "weights" };
        let reason = format!(
            "{bytes} bytes a page make {pages} pages of {projection:?}, at most {MAX_PAGES}"
        );
        Err(Error::invalid(name, reason))
    }

    /// The error where not even one panel of columns fits.
    fn too_small(self, need: u64) -> Error {
        let Self { bytes, own } = self;
        if own {
            let reason = format!("{bytes} bytes, {PANEL} columns of an expert need {need}");
            return Error::invalid("page_limit", reason);
        }
        let limit = "max_storage_buffer_binding_size";
        Error::Limit { name: "weights", limit, need, have: bytes }
    }
}

/// The experts and columns of each page of a projection.
fn ranges(
    shape: &ExpertShape,
    projection: Projection,
    limit: PageLimit,
) -> Result<Vec<(Range<u32>, Range<u32>)>> {
    let [columns, depth] = shape.matrix(projection);
    let expert = shape.packed_bytes(columns, depth);
    let fit = u32::try_from(limit.bytes / expert).unwrap_or(u32::MAX);
    let starts = |n: u32, step: u32| {
        (0..n).step_by(step as usize).map(move |i| i..(i.saturating_add(step)).min(n))
    };
    if fit > 0 {
        limit.few(shape.experts.div_ceil(fit).into(), projection)?;
        return Ok(starts(shape.experts, fit).map(|e| (e, 0..columns)).collect());
    }
    // One expert is too large: pages of its columns, in whole panels.
    let panel = shape.packed_bytes(PANEL, depth);
    let panels = limit.bytes / panel;
    let step = u32::try_from(panels * u64::from(PANEL)).unwrap_or(u32::MAX / PANEL * PANEL);
    if step == 0 {
        return Err(limit.too_small(panel));
    }
    limit.few(u64::from(shape.experts) * u64::from(columns.div_ceil(step)), projection)?;
    Ok((0..shape.experts).flat_map(|e| starts(columns, step).map(move |c| (e..e + 1, c))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_stay_within_the_limit() {
        let shape =
            ExpertShape { experts: 5, hidden: 64, intermediate: 96, weight_type: WeightType::Bf16 };
        let ranges = |limit| ranges(&shape, Projection::Gate, PageLimit::new(limit, 1 << 30));
        let whole = ranges(2 * 96 * 64 * 2).unwrap();
        assert_eq!(whole, [(0..2, 0..96), (2..4, 0..96), (4..5, 0..96)]);
        let split = ranges(70 * 64 * 2).unwrap();
        assert_eq!(split[..3], [(0..1, 0..64), (0..1, 64..96), (1..2, 0..64)]);
        assert!(ranges(31 * 64 * 2).is_err());
    }
}
