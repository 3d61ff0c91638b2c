//! Missing experts that the host computes itself, while the device computes those that are there.
use super::super::batch::Batch;
use crate::device::guard::scoped;
use crate::device::{FloatType, Tensor};
use crate::plan::Sections;
use crate::routing::Activation;
use crate::weights::{MatrixView, WeightType};
use crate::{Context, Error, Result, Slice};
use std::ops::Range;

/// Whether the host computes experts that a step asks for and that are not on the device, in place of
/// bringing them in. Needs the feature `cpu-experts`, threads, and a `hidden` that can be copied from.
///
/// The host's sums are f32 in another order than the device's: `out` then equals that of a layer with all
/// experts on the device within rounding, not in its bits. As long as there are empty places, what is
/// missing comes into them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostExperts {
    /// Never: everything that is missing is brought in.
    #[default]
    Never,
    /// Always, but for what a [`CachePolicy`](super::CachePolicy) brings in at its times.
    Always,
    /// Where it is the faster way, by what both took before.
    Measured,
}

/// What both ways of serving a missing expert took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    /// Seconds a byte that was brought in.
    upload: Option<f64>,
    /// Seconds a byte of weights, with the work of its rows ([`Pace::work`]).
    host: Option<f64>,
    decided: u32,
}

impl Pace {
    /// One decision of so many is for the way that seems slower, since only ways that are gone are measured.
    const AGAIN: u32 = 64;

    /// Widening a byte costs about as much as multiplying it by eight rows.
    fn work(bytes: u64, rows: u32) -> f64 {
        bytes as f64 * (1.0 + f64::from(rows) / 8.0)
    }

    /// Whether the host is the faster one for an expert of so many bytes and rows.
    pub(super) fn is_host_faster(&mut self, bytes: u64, rows: u32) -> bool {
        let (Some(upload), Some(host)) = (self.upload, self.host) else {
            return self.upload.is_some();
        };
        self.decided += 1;
        let faster = host * Self::work(bytes, rows) < upload * bytes as f64;
        if self.decided.is_multiple_of(Self::AGAIN) { !faster } else { faster }
    }

    pub(super) fn uploaded(&mut self, bytes: u64, seconds: f64) {
        Self::note(&mut self.upload, seconds / bytes as f64);
    }

    /// Experts of so many bytes and rows each.
    pub(super) fn computed(&mut self, experts: impl Iterator<Item = (u64, u32)>, seconds: f64) {
        let work: f64 = experts.map(|(bytes, rows)| Self::work(bytes, rows)).sum();
        Self::note(&mut self.host, seconds / work);
    }

    /// The latest counts a quarter.
    fn note(mean: &mut Option<f64>, latest: f64) {
        if latest.is_finite() {
            *mean = Some(mean.map_or(latest, |mean| 0.75 * mean + 0.25 * latest));
        }
    }
}

/// A matrix of an expert, and what the device would store it as: values are rounded to that.
#[cfg_attr(not(feature = "cpu-experts"), expect(dead_code, reason = "read by the host's experts"))]
#[derive(Clone, Copy)]
pub(super) struct Stored<'a> {
    pub(super) matrix: MatrixView<'a>,
    pub(super) stored: WeightType,
}

/// An expert to compute: its rows of `hidden`, `[rows, D]`, and its gate, up and down matrix.
#[cfg_attr(not(feature = "cpu-experts"), expect(dead_code, reason = "read by the host's experts"))]
pub(super) struct Expert<'a> {
    pub(super) x: Vec<f32>,
    pub(super) matrices: [Stored<'a>; 3],
}

/// Whether this build can compute experts.
pub(super) const IS_THERE: bool = cfg!(all(feature = "cpu-experts", not(target_family = "wasm")));

/// The rows of `y`, `[rows, D]`, of each expert, on all threads.
#[cfg(feature = "cpu-experts")]
pub(super) fn compute(experts: &[Expert<'_>], activation: Activation) -> Vec<Vec<f32>> {
    use crate::ops::grouped_matmul::activate;
    use ndarray::{Array2, ArrayView2};
    use rayon::prelude::*;

    /// Rows of weights that a thread widens and multiplies at a time.
    const STRETCH: usize = 32;

    /// `[rows of x, rows of the matrix in the stretch]`.
    fn product(x: ArrayView2<'_, f32>, of: &Stored<'_>, rows: &Range<usize>) -> Array2<f32> {
        let Stored { matrix, stored } = *of;
        let mut w = Array2::zeros((rows.len(), x.ncols()));
        for (row, mut values) in rows.clone().zip(w.rows_mut()) {
            if let Some(values) = values.as_slice_mut() {
                matrix.widen_row(row, values);
                if stored != matrix.weight_type() {
                    values.copy_from_slice(&stored.round(values, values.len()));
                }
            }
        }
        x.dot(&w.t())
    }

    /// Of each expert `[rows of x, columns]`, from what `part` makes of stretches of the columns.
    fn joined(
        inputs: &[ArrayView2<'_, f32>],
        columns: impl Fn(usize) -> usize,
        part: impl Fn(usize, &Range<usize>) -> Array2<f32> + Sync,
    ) -> Vec<Array2<f32>> {
        let mut stretches: Vec<(usize, Range<usize>)> = vec![];
        for i in 0..inputs.len() {
            let n = columns(i);
            stretches.extend((0..n).step_by(STRETCH).map(|at| (i, at..(at + STRETCH).min(n))));
        }
        let parts: Vec<Array2<f32>> =
            stretches.par_iter().map(|(i, columns)| part(*i, columns)).collect();
        let mut all: Vec<Array2<f32>> =
            (0..inputs.len()).map(|i| Array2::zeros((inputs[i].nrows(), columns(i)))).collect();
        for ((i, columns), part) in stretches.into_iter().zip(parts) {
            all[i].slice_mut(ndarray::s![.., columns]).assign(&part);
        }
        all
    }

    let rows_of = |of: &Stored<'_>| of.matrix.shape()[0] as usize;
    let x: Vec<ArrayView2<'_, f32>> = experts
        .iter()
        .map(|e| {
            let depth = e.matrices[0].matrix.shape()[1] as usize;
            ArrayView2::from_shape((e.x.len() / depth, depth), &e.x).expect("whole rows")
        })
        .collect();
    let h = joined(
        &x,
        |i| rows_of(&experts[i].matrices[0]),
        |i, columns| {
            let [gate, up, _] = &experts[i].matrices;
            let mut h = product(x[i], gate, columns);
            h.zip_mut_with(&product(x[i], up, columns), |gate, &up| {
                *gate = activate(activation, f64::from(*gate), f64::from(up)) as f32;
            });
            h
        },
    );
    let h: Vec<ArrayView2<'_, f32>> = h.iter().map(|h| h.view()).collect();
    let y = joined(
        &h,
        |i| rows_of(&experts[i].matrices[2]),
        |i, columns| product(h[i], &experts[i].matrices[2], columns),
    );
    y.into_iter().map(|y| y.into_raw_vec_and_offset().0).collect()
}

/// Not in this build: options that ask for it are refused.
#[cfg(not(feature = "cpu-experts"))]
pub(super) fn compute(_experts: &[Expert<'_>], _activation: Activation) -> Vec<Vec<f32>> {
    unreachable!("`HostExperts` was refused")
}

/// What a step needs so that the host can compute some of its experts: copies of its plan and its hidden
/// states to read, and where `y` is written.
#[derive(Debug)]
pub(super) struct HostStep {
    hidden: (wgpu::Buffer, u64),
    plan: (wgpu::Buffer, u64),
    float_type: FloatType,
    width: usize,
    at: Sections,
    experts: usize,
    pub(super) hidden_back: wgpu::Buffer,
    pub(super) plan_back: wgpu::Buffer,
    /// `y [S, columns]`, in stretches of columns.
    y: Vec<(Range<u32>, Tensor)>,
}

/// The plan and the hidden states of a step, read back.
pub(super) struct Rows {
    expert_offsets: Vec<u32>,
    token_of: Vec<u32>,
    /// `[T, D]`.
    hidden: Vec<f32>,
}

impl HostStep {
    /// Of a batch, its plan and the number of its experts, shared ones included.
    pub(super) fn new(
        ctx: &Context,
        batch: &Batch<'_>,
        (plan, at, experts): (Slice<'_>, Sections, u32),
        y: Vec<(Range<u32>, Tensor)>,
        width: u32,
    ) -> Result<Self> {
        let hidden = batch.hidden.slice;
        if !hidden.buffer.usage().contains(wgpu::BufferUsages::COPY_SRC) {
            let reason = "its buffer lacks COPY_SRC: the host reads it to compute experts";
            return Err(Error::invalid("hidden", reason));
        }
        let float_type = batch.hidden.float_type;
        let size = u64::from(batch.tokens) * u64::from(width) * float_type.bytes();
        let back = |label, size: u64| {
            scoped(ctx.device(), || {
                ctx.device().create_buffer(&wgpu::BufferDescriptor {
                    label: Some(label),
                    size: size.next_multiple_of(4),
                    usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                    mapped_at_creation: false,
                })
            })
        };
        Ok(Self {
            hidden: (hidden.buffer.clone(), hidden.offset),
            plan: (plan.buffer.clone(), plan.offset),
            float_type,
            width: width as usize,
            at,
            experts: experts as usize,
            hidden_back: back("hidden", size)?,
            plan_back: back("plan", 4 * u64::from(at.words))?,
            y,
        })
    }

    pub(super) fn encode_copies(&self, encoder: &mut wgpu::CommandEncoder) {
        for ((from, offset), to) in
            [(&self.hidden, &self.hidden_back), (&self.plan, &self.plan_back)]
        {
            encoder.copy_buffer_to_buffer(from, *offset, to, 0, to.size());
        }
    }

    /// What the mapped copies hold.
    pub(super) fn read(&self) -> Result<Rows> {
        let words = |buffer: &wgpu::Buffer| {
            let view = buffer.get_mapped_range(..);
            let view = view.map_err(|e| Error::ReadBack(e.to_string()))?;
            Ok::<_, Error>(bytemuck::pod_collect_to_vec::<u8, u32>(&view))
        };
        let (plan, hidden) = (words(&self.plan_back)?, words(&self.hidden_back)?);
        let section = |first: u32, len: usize| plan[first as usize..][..len].to_vec();
        let bytes: &[u8] = bytemuck::cast_slice(&hidden);
        let values = bytes.len() / self.float_type.bytes() as usize;
        let expert_offsets = section(self.at.expert_offsets, self.experts + 1);
        Ok(Rows {
            token_of: section(self.at.token_of, expert_offsets.last().map_or(0, |&n| n as usize)),
            expert_offsets,
            hidden: (0..values).map(|i| self.float_type.at(bytes, i)).collect(),
        })
    }

    /// The rows of `hidden` of an expert's slots, `[rows, D]`.
    pub(super) fn rows(&self, read: &Rows, expert: u32) -> Vec<f32> {
        let tokens = &read.token_of[read.slots(expert)];
        let row = |&t: &u32| &read.hidden[t as usize * self.width..][..self.width];
        tokens.iter().flat_map(row).copied().collect()
    }

    /// Writes an expert's rows of `y`; they are there for what is submitted next.
    pub(super) fn write(&self, queue: &wgpu::Queue, read: &Rows, expert: u32, y: &[f32]) {
        let first = read.slots(expert).start as u64;
        for (columns, to) in &self.y {
            let width = u64::from(columns.end - columns.start);
            let range = columns.start as usize..columns.end as usize;
            let rows: Vec<f32> =
                y.chunks_exact(self.width).flat_map(|row| &row[range.clone()]).copied().collect();
            let at = to.offset + 4 * first * width;
            queue.write_buffer(&to.buffer, at, bytemuck::cast_slice(&rows));
        }
    }
}

impl Rows {
    fn slots(&self, expert: u32) -> Range<usize> {
        let at = |e: u32| self.expert_offsets[e as usize] as usize;
        at(expert)..at(expert + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_faster_way_is_taken_and_the_other_tried_again() {
        let mut pace = Pace::default();
        assert!(!pace.is_host_faster(100, 1), "nothing is known: it is brought in");
        pace.uploaded(100, 1.0);
        assert!(pace.is_host_faster(100, 1), "the host has not been tried");
        pace.computed([(100, 8)].into_iter(), 1.0);
        // 1 s to bring in, 0.56 s for one row, 1.5 s for 16 rows.
        assert!(pace.is_host_faster(100, 1));
        assert!(!pace.is_host_faster(100, 16));
        let again = (0..2 * Pace::AGAIN).filter(|_| !pace.is_host_faster(100, 1)).count();
        assert_eq!(again, 2);
        // A slow bus for a while.
        (0..20).for_each(|_| pace.uploaded(100, 10.0));
        assert!(pace.is_host_faster(100, 16));
    }
}
