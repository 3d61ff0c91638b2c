//! Gradients of expert weights on the device: f32, row-major, in pages.
use super::{ExpertShape, Projection};
use crate::device::guard::{alive, scoped};
use crate::{Context, Error, Result, Slice};
use std::ops::Range;
use std::sync::Arc;

/// Rows that pages of one matrix are cut into multiples of, so that what their rows stand for in other
/// tensors is loaded as whole vectors.
const ROWS: u64 = 8;

/// Most pages of a projection, as for weights.
const MAX_PAGES: u64 = 1 << 14;

/// A page: some rows of some experts' matrices, `[experts, rows, in]`.
#[derive(Clone, Debug)]
pub(crate) struct GradientPage {
    pub(crate) experts: Range<u32>,
    pub(crate) rows: Range<u32>,
    pub(crate) buffer: wgpu::Buffer,
}

/// The gradients of the experts of one layer on the device. Clones share the pages.
///
/// Each projection lies as `[experts, out, in]` in f32, shared experts after the routed ones, cut into
/// pages that a binding holds: between experts, and between the rows of a matrix where not even one
/// fits. New pages hold zeros.
#[derive(Clone, Debug)]
pub struct ExpertGradients {
    shape: ExpertShape,
    /// Of each of [`Projection::ALL`].
    pages: [Arc<[GradientPage]>; 3],
}

impl ExpertGradients {
    /// Room for the gradients of experts of a shape, whatever their weights are stored as.
    ///
    /// # Errors
    ///
    /// Zero sizes, or sizes whose bytes overflow; a device whose bindings cannot hold 8 rows;
    /// [`Error::Device`] where memory runs out or the device is lost.
    pub fn new(ctx: &Context, shape: &ExpertShape) -> Result<Self> {
        Self::with_page_limit(ctx, shape, u64::MAX)
    }

    /// The same in pages of at most `page_limit` bytes.
    ///
    /// # Errors
    ///
    /// As [`ExpertGradients::new`], and a `page_limit` that cannot hold 8 rows, or that makes more than
    /// 16,384 pages of a projection.
    pub fn with_page_limit(ctx: &Context, shape: &ExpertShape, page_limit: u64) -> Result<Self> {
        shape.check()?;
        Self::bytes_of(shape)?;
        alive(ctx.device())?;
        let limit = page_limit.min(ctx.max_binding());
        let pages = |projection: Projection| -> Result<Arc<[GradientPage]>> {
            let ranges = ranges(shape.experts, shape.matrix(projection), limit);
            let refused = || {
                if page_limit <= ctx.max_binding() {
                    let reason = format!("{page_limit} bytes a page of {projection:?} gradients");
                    return Error::invalid("page_limit", reason);
                }
                let (name, limit) = ("gradients", "max_storage_buffer_binding_size");
                let need = ROWS * row_bytes(shape, projection);
                Error::Limit { name, limit, need, have: ctx.max_binding() }
            };
            let page = |(experts, rows): (Range<u32>, Range<u32>)| {
                let size = row_bytes(shape, projection)
                    * u64::from(experts.end - experts.start)
                    * u64::from(rows.end - rows.start);
                let buffer = scoped(ctx.device(), || {
                    ctx.device().create_buffer(&wgpu::BufferDescriptor {
                        label: Some("gradients"),
                        size,
                        usage: wgpu::BufferUsages::STORAGE
                            | wgpu::BufferUsages::COPY_DST
                            | wgpu::BufferUsages::COPY_SRC,
                        mapped_at_creation: false,
                    })
                })?;
                Ok(GradientPage { experts, rows, buffer })
            };
            ranges.ok_or_else(refused)?.into_iter().map(page).collect()
        };
        let [gate, up, down] = Projection::ALL.map(pages);
        Ok(Self { shape: *shape, pages: [gate?, up?, down?] })
    }

    /// Bytes that gradients of a shape take on the device: 12 for each value of an expert's matrices.
    ///
    /// # Errors
    ///
    /// Sizes whose bytes overflow.
    pub fn bytes_of(shape: &ExpertShape) -> Result<u64> {
        let dims = [shape.experts, shape.hidden, shape.intermediate].map(u64::from);
        crate::error::bytes_of("hidden", &dims, 12)
    }

    /// Shape of the experts.
    pub fn shape(&self) -> ExpertShape {
        self.shape
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        self.buffers().map(wgpu::Buffer::size).sum()
    }

    /// Pages of each projection: gate, up, down.
    pub fn page_counts(&self) -> [usize; 3] {
        [0, 1, 2].map(|p| self.pages[p].len())
    }

    /// The pages' buffers: of gate, up and down, each a piece of `[experts, out, in]` after the one
    /// before. What an optimizer that treats all values alike goes over.
    pub fn buffers(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        self.pages.iter().flat_map(|pages| pages.iter()).map(|page| &page.buffer)
    }

    /// Where one matrix `[out, in]` of an expert lies: rows, and the bytes that hold them. Offsets are
    /// good for copies; as bindings only where the device's alignment divides them.
    pub fn slices(
        &self,
        expert: u32,
        projection: Projection,
    ) -> impl Iterator<Item = (Range<u32>, Slice<'_>)> {
        let row = row_bytes(&self.shape, projection);
        self.pages(projection).iter().filter(move |p| p.experts.contains(&expert)).map(
            move |page| {
                let size = u64::from(page.rows.end - page.rows.start) * row;
                let offset = u64::from(expert - page.experts.start) * size;
                (page.rows.clone(), Slice::new(&page.buffer, offset, size))
            },
        )
    }

    /// Records that all become zero: before the first of several passes that add.
    pub fn zero(&self, encoder: &mut wgpu::CommandEncoder) {
        self.buffers().for_each(|buffer| encoder.clear_buffer(buffer, 0, None));
    }

    pub(crate) fn pages(&self, projection: Projection) -> &[GradientPage] {
        &self.pages[projection as usize]
    }
}

/// Bytes of a row of a matrix.
fn row_bytes(shape: &ExpertShape, projection: Projection) -> u64 {
    4 * u64::from(shape.matrix(projection)[1])
}

/// Experts and rows of each page; none where a page cannot hold [`ROWS`] rows, or where they are too
/// many.
fn ranges(
    experts: u32,
    [rows, columns]: [u32; 2],
    limit: u64,
) -> Option<Vec<(Range<u32>, Range<u32>)>> {
    let cut = |all: u32, step: u64| {
        let step = u32::try_from(step).unwrap_or(u32::MAX);
        (0..all).step_by(step as usize).map(move |i| i..all.min(i.saturating_add(step)))
    };
    let row = 4 * u64::from(columns);
    let fit = limit / (u64::from(rows) * row);
    if fit > 0 {
        let few = u64::from(experts).div_ceil(fit) <= MAX_PAGES;
        return few.then(|| cut(experts, fit).map(|e| (e, 0..rows)).collect());
    }
    let step = limit / row / ROWS * ROWS;
    let few = step > 0 && u64::from(experts) * u64::from(rows).div_ceil(step) <= MAX_PAGES;
    let of_expert = |e: Range<u32>| cut(rows, step).map(move |rows| (e.clone(), rows));
    few.then(|| cut(experts, 1).flat_map(of_expert).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_cut_between_experts_and_then_between_rows() {
        let row = 4 * 10;
        assert_eq!(ranges(5, [20, 10], 2 * 20 * row).unwrap().len(), 3);
        assert_eq!(ranges(5, [20, 10], u64::MAX).unwrap(), [(0..5, 0..20)]);
        let split = ranges(2, [20, 10], 19 * row).unwrap();
        assert_eq!(split, [(0..1, 0..16), (0..1, 16..20), (1..2, 0..16), (1..2, 16..20)]);
        assert_eq!(ranges(5, [20, 10], 7 * row), None);
        assert_eq!(ranges(u32::MAX, [20, 10], 20 * row), None);
    }
}
