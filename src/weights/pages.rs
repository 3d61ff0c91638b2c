//! Expert weights in pages: buffers that each hold a range of experts, or of one expert's columns, within the device's
//! limits.
//!
//! A matrix `[N, K]` is packed for the kernels: cut into panels of [`PANEL`] columns (the last one padded); within a panel,
//! 16-byte word `c` of column `n` (4 or 8 floats of K, or a part of a block, zero-padded) is word
//! `c * PANEL + n`. So lanes that work on neighbouring columns read neighbouring words, and a
//! workgroup reads whole stretches of memory.
use super::pack;
use super::{HostWeights, MatrixView, PANEL, WeightType};
use crate::device::guard::{alive, scoped};
use crate::{Context, Error, Result, Slice};
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

/// Storage types of an expert's matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExpertTypes {
    /// Of the gate and the up projection.
    pub gate_up: WeightType,
    /// Of the down projection.
    pub down: WeightType,
}

impl ExpertTypes {
    /// The type of a projection.
    pub fn of(self, projection: Projection) -> WeightType {
        match projection {
            Projection::Gate | Projection::Up => self.gate_up,
            Projection::Down => self.down,
        }
    }
}

/// One type for all.
impl From<WeightType> for ExpertTypes {
    fn from(weight_type: WeightType) -> Self {
        Self { gate_up: weight_type, down: weight_type }
    }
}

/// Shape of the experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct ExpertShape {
    /// Experts, shared ones included: those follow the routed ones.
    pub experts: u32,
    /// D: hidden size.
    pub hidden: u32,
    /// F: intermediate size of one expert.
    pub intermediate: u32,
    /// Storage types.
    pub types: ExpertTypes,
    /// Experts at the end, such as the shared ones, whose storage types are others.
    pub last: u32,
    /// The storage types of those.
    pub last_types: ExpertTypes,
}

impl ExpertShape {
    /// Experts of one set of storage types, or of one type: `[F, D]`, `[F, D]`, `[D, F]` each.
    pub fn new(
        experts: u32,
        hidden: u32,
        intermediate: u32,
        types: impl Into<ExpertTypes>,
    ) -> Self {
        let types = types.into();
        Self { experts, hidden, intermediate, types, last: 0, last_types: types }
    }

    /// The same with other types for the last experts: files often keep shared experts in better ones.
    pub fn with_last_types(self, last: u32, types: impl Into<ExpertTypes>) -> Self {
        let last_types = types.into();
        let last = if last_types == self.types { 0 } else { last };
        Self { last, last_types, ..self }
    }

    /// Storage types of an expert.
    pub fn types_of(&self, expert: u32) -> ExpertTypes {
        if expert < self.first_of_last() { self.types } else { self.last_types }
    }

    /// The storage types of a projection that some expert has.
    pub(crate) fn types_there(&self, projection: Projection) -> Vec<WeightType> {
        let [first, last] = [self.types, self.last_types].map(|types| types.of(projection));
        let all = [(self.first_of_last() > 0, first), (self.last > 0 && last != first, last)];
        all.into_iter().filter(|(there, _)| *there).map(|(_, t)| t).collect()
    }

    fn first_of_last(&self) -> u32 {
        self.experts.saturating_sub(self.last)
    }

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

    /// Bytes of a routed expert's three matrices, unpadded: what a file holds. `u64::MAX` where they do
    /// not fit 64 bits.
    pub fn expert_bytes(&self) -> u64 {
        self.sum(|[rows, depth], t| u64::from(rows).saturating_mul(t.row_bytes(depth)))
    }

    /// Bytes of a routed expert's three matrices on the device, padded and packed. `u64::MAX` where they
    /// do not fit 64 bits.
    pub fn device_bytes(&self) -> u64 {
        self.sum(packed_bytes)
    }

    /// The same of one of the last experts, which may be of other types.
    pub(crate) fn last_device_bytes(&self) -> u64 {
        Self { types: self.last_types, ..*self }.device_bytes()
    }

    fn sum(&self, bytes: impl Fn([u32; 2], WeightType) -> u64) -> u64 {
        let each = Projection::ALL.map(|p| bytes(self.matrix(p), self.types.of(p)));
        each.into_iter().fold(0, u64::saturating_add)
    }

    pub(crate) fn check(&self) -> Result<()> {
        let Self { experts, hidden, intermediate, last, .. } = *self;
        crate::error::not_zero(&[
            ("experts", experts),
            ("hidden", hidden),
            ("intermediate", intermediate),
        ])?;
        if last > experts {
            return Err(Error::invalid("last", format!("{last} of {experts} experts")));
        }
        // Padded and packed they are more.
        let most = self.device_bytes().max(self.last_device_bytes());
        if most.checked_mul(experts.into()).is_none() {
            let shape = [hidden, intermediate, experts];
            return Err(Error::invalid("hidden", format!("{shape:?} overflows")));
        }
        Ok(())
    }
}

/// Bytes of packed columns of a matrix whose rows hold `depth` values, or `u64::MAX`.
fn packed_bytes([columns, depth]: [u32; 2], weight_type: WeightType) -> u64 {
    let blocks = depth.div_ceil(weight_type.device_depth());
    u64::from(columns)
        .next_multiple_of(PANEL.into())
        .saturating_mul(16 * u64::from(blocks) * u64::from(weight_type.device_words()))
}

/// Most pages of a projection. Each is a buffer and a dispatch; a layer of 64 GiB in pages of 4 MiB has as many.
const MAX_PAGES: u64 = 1 << 14;

/// A page: some columns of some experts, in a buffer of their own.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) experts: Range<u32>,
    pub(crate) columns: Range<u32>,
    pub(crate) weight_type: WeightType,
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
        let buffer = |label, size| {
            scoped(ctx.device(), || {
                ctx.device().create_buffer(&wgpu::BufferDescriptor {
                    label: Some(label),
                    size,
                    usage: wgpu::BufferUsages::STORAGE
                        | wgpu::BufferUsages::COPY_DST
                        | wgpu::BufferUsages::COPY_SRC,
                    mapped_at_creation: false,
                })
            })
        };
        let pages = |projection: Projection| -> Result<Arc<[Page]>> {
            let gated = projection == Projection::Gate;
            let depth = shape.matrix(projection)[1];
            let page = |PageRange { experts, columns, weight_type }| {
                let width = columns.end - columns.start;
                let bytes = packed_bytes([width, depth], weight_type)
                    * u64::from(experts.end - experts.start);
                let up = if gated { Some(buffer("up", bytes)?) } else { None };
                let buffer = buffer(if gated { "gate" } else { "down" }, bytes)?;
                Ok(Page { experts, columns, weight_type, buffer, up })
            };
            all_ranges(&shape, projection, limit)?.into_iter().map(page).collect()
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

    /// Where one matrix of an expert lies: columns of it, and the bytes that hold them packed, page by page.
    pub fn slices(
        &self,
        expert: u32,
        projection: Projection,
    ) -> impl Iterator<Item = (Range<u32>, Slice<'_>)> {
        let pages = if projection == Projection::Down { &self.down } else { &self.gate_up };
        let depth = self.shape.matrix(projection)[1];
        pages.iter().filter(move |p| p.experts.contains(&expert)).map(move |page| {
            let up = page.up.as_ref().filter(|_| projection == Projection::Up);
            let width = page.columns.end - page.columns.start;
            let size = packed_bytes([width, depth], page.weight_type);
            let offset = u64::from(expert - page.experts.start) * size;
            (page.columns.clone(), Slice::new(up.unwrap_or(&page.buffer), offset, size))
        })
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
        let pages = if projection == Projection::Down { &self.down } else { &self.gate_up };
        Ok(pages.iter().filter(move |p| p.experts.contains(&expert)).map(move |page| {
            let buffer = match (projection, &page.up) {
                (Projection::Up, Some(up)) => up,
                _ => &page.buffer,
            };
            let columns = page.columns.start as usize..page.columns.end as usize;
            let mut part =
                Part { buffer, offset: 0, matrix, weight_type: page.weight_type, columns };
            let each = (part.units() * part.unit_bytes()) as u64;
            part.offset = u64::from(expert - page.experts.start) * each;
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
    /// Pieces of [`Part::unit_bytes`] that it is made of.
    pub(crate) fn units(&self) -> usize {
        pack::units(self.weight_type, self.columns.len(), self.matrix.shape()[1] as usize)
    }

    /// Bytes of a unit.
    pub(crate) fn unit_bytes(&self) -> usize {
        pack::unit_bytes(self.weight_type)
    }

    /// Packs some of its units straight into memory that wgpu copies to the page with the next submission.
    pub(crate) fn write(&self, queue: &wgpu::Queue, units: Range<usize>) -> Result<()> {
        let unit = self.unit_bytes();
        let offset = self.offset + (units.start * unit) as u64;
        let Some(size) = wgpu::BufferSize::new((units.len() * unit) as u64) else {
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

/// What a page has.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PageRange {
    experts: Range<u32>,
    columns: Range<u32>,
    weight_type: WeightType,
}

/// What each page of a projection has, page by page.
fn all_ranges(
    shape: &ExpertShape,
    projection: Projection,
    limit: PageLimit,
) -> Result<Vec<PageRange>> {
    let [first, last] = [shape.types, shape.last_types].map(|types| types.of(projection));
    let (end, all) = (shape.first_of_last(), 0..shape.experts);
    let matrix = shape.matrix(projection);
    if first == last {
        return ranges(matrix, all, first, projection, limit);
    }
    let mut pages = ranges(matrix, 0..end, first, projection, limit)?;
    pages.extend(ranges(matrix, end..all.end, last, projection, limit)?);
    Ok(pages)
}

/// The same of some experts of one type.
fn ranges(
    [columns, depth]: [u32; 2],
    all: Range<u32>,
    weight_type: WeightType,
    projection: Projection,
    limit: PageLimit,
) -> Result<Vec<PageRange>> {
    let expert = packed_bytes([columns, depth], weight_type);
    let fit = u32::try_from(limit.bytes / expert).unwrap_or(u32::MAX);
    let starts = |all: Range<u32>, step: u32| {
        let end = all.end;
        all.step_by(step as usize).map(move |i| i..i.saturating_add(step).min(end))
    };
    let page = |experts, columns| PageRange { experts, columns, weight_type };
    let count = all.end - all.start;
    if fit > 0 {
        limit.few(count.div_ceil(fit).into(), projection)?;
        return Ok(starts(all, fit).map(|e| page(e, 0..columns)).collect());
    }
    // One expert is too large: pages of its columns, in whole panels.
    let panel = packed_bytes([PANEL, depth], weight_type);
    let panels = limit.bytes / panel;
    let step = u32::try_from(panels * u64::from(PANEL)).unwrap_or(u32::MAX / PANEL * PANEL);
    if step == 0 {
        return Err(limit.too_small(panel));
    }
    limit.few(u64::from(count) * u64::from(columns.div_ceil(step)), projection)?;
    Ok(all.flat_map(|e| starts(0..columns, step).map(move |c| page(e..e + 1, c))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_stay_within_the_limit() {
        let ranges = |limit| {
            let limit = PageLimit::new(limit, 1 << 30);
            let pages = ranges([96, 64], 0..5, WeightType::Bf16, Projection::Gate, limit)?;
            Ok::<_, Error>(pages.into_iter().map(|p| (p.experts, p.columns)).collect::<Vec<_>>())
        };
        let whole = ranges(2 * 96 * 64 * 2).unwrap();
        assert_eq!(whole, [(0..2, 0..96), (2..4, 0..96), (4..5, 0..96)]);
        let split = ranges(70 * 64 * 2).unwrap();
        assert_eq!(split[..3], [(0..1, 0..64), (0..1, 64..96), (1..2, 0..64)]);
        assert!(ranges(31 * 64 * 2).is_err());
    }

    #[test]
    fn pages_hold_one_type() {
        let types = ExpertTypes { gate_up: WeightType::Q4_K, down: WeightType::Bf16 };
        let last = ExpertTypes { gate_up: WeightType::Q8_0, down: WeightType::Bf16 };
        let shape = ExpertShape::new(5, 256, 32, types).with_last_types(1, last);
        let pages = |projection| {
            let pages = all_ranges(&shape, projection, PageLimit::new(1 << 20, 1 << 30)).unwrap();
            pages.into_iter().map(|p| (p.experts, p.weight_type)).collect::<Vec<_>>()
        };
        let apart = [(0..4, WeightType::Q4_K), (4..5, WeightType::Q8_0)];
        assert_eq!(pages(Projection::Gate), apart);
        assert_eq!(pages(Projection::Down), [(0..5, WeightType::Bf16)]);
    }
}
