//! Which variant of the kernels is the fastest on this device for a layer and a batch of the caller's.
//!
//! [`Variant::best`](crate::Variant::best) goes by the adapter's type and features; nobody has to tune. [`tune`] measures: it runs the layer in
//! every variant that the device can run, compares what they make, and says what each took. The variant it names is plain data, to
//! be kept (feature `serde`) and given to [`Context::with_variant`] at the next start.
//!
//! ```
//! # use wgmoe::layer::{Batch, MoeLayer};
//! # use wgmoe::{Context, wgpu};
//! # use wgmoe::measure::tune::tune;
//! # fn example(layer: &MoeLayer, device: &wgpu::Device, queue: &wgpu::Queue, batch: &Batch<'_>) -> wgmoe::Result<()> {
//! let tuning = tune(layer, queue, batch)?;
//! for candidate in &tuning.candidates {
//!     println!("{:?}: {:.3} ms", candidate.variant, candidate.ms);
//! }
//! let ctx = Context::with_variant(device, tuning.variant)?;
//! let layer = layer.with_context(&ctx)?;
//! # Ok(())
//! # }
//! ```
use crate::device::guard::{alive, scoped};
use crate::device::wait::may_block;
use crate::error::{bytes_of, not_zero};
use crate::layer::{Batch, BoundLayer, MoeLayer};
use crate::plan::bits;
use crate::{Context, ContextOptions, Error, Gpu, Result, Slice, Variant};
use std::time::Instant;

/// What [`tune`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuning {
    /// The fastest candidate that agrees with the layer's own variant.
    pub variant: Variant,
    /// Every variant that the device ran, the layer's own first.
    pub candidates: Vec<Candidate>,
}

/// One variant, measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The variant.
    pub variant: Variant,
    /// Least time of the whole step, from submission until the device was done, in milliseconds.
    pub ms: f64,
    /// What came before the first measured run, in milliseconds: compiling, binding, a first run.
    pub first_ms: f64,
    /// Tokens whose experts are not those of the layer's own variant. Logits that differ in their last bits may choose
    /// otherwise where two scores lie that close.
    pub tokens_apart: u32,
    /// Largest difference of the other tokens' outputs, as a share of their row's largest value.
    pub difference: f32,
    /// Whether the output is that of the layer's own variant: at most one token in eight apart, the others within 0.1 %.
    pub agrees: bool,
}

/// Runs of each candidate after the first.
const RUNS: usize = 5;

/// Measures every variant that the device can run on a batch. Submits to `queue` and waits, some runs of each variant; reads
/// the batch's inputs, but writes to buffers of its own, in f32.
///
/// # Errors
///
/// Zero tokens, what [`MoeLayer::bind`] refuses, or a device that is lost meanwhile ([`Error`]).
pub fn tune(layer: &MoeLayer, queue: &wgpu::Queue, batch: &Batch<'_>) -> Result<Tuning> {
    may_block()?;
    not_zero(&[("tokens", batch.tokens)])?;
    let (device, own) = (layer.context().device(), layer.context().variant());
    let gpu = Gpu { device: device.clone(), queue: queue.clone(), info: device.adapter_info() };
    let (tokens, experts) = (batch.tokens as usize, layer.config().experts as usize);
    let [rows, width] = [u64::from(batch.tokens), layer.config().hidden.into()];
    batch.hidden.holds("hidden", rows, width)?;
    let size = bytes_of("out", &[rows, width], 4)?;
    let out = scoped(device, || {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("out"),
            size, // perhaps more than a binding
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        })
    })?;
    let out = Slice::new(&out, 0, size);
    // Each variant has a context of its own, and so scratch of its own.
    let batch = Batch { scratch: None, ..batch.into_out(out) };

    // Matrix units only where the layer's context was given them.
    let offered = layer.context().options().units.is_some();
    let others = Variant::all(device).into_iter().filter(|v| *v != own && (offered || !v.matrix));
    let variants = [own].into_iter().chain(others);
    let mut steps = vec![];
    let mut candidates: Vec<Candidate> = vec![];
    let mut reference = None;
    for variant in variants {
        let start = Instant::now();
        let step = match first_run(&gpu, layer, variant, &batch) {
            Ok(step) => step,
            Err(e) if variant == own => return Err(e),
            Err(_) => {
                alive(device)?;
                continue; // more than this device has
            }
        };
        let first_ms = milliseconds(start);
        let assigned = step.assigned().ok_or_else(|| Error::invalid("tokens", "no work"))?;
        let made = (gpu.download::<f32>(out)?, gpu.download::<u32>(assigned)?);
        let reference = reference.get_or_insert_with(|| made.clone());
        let (tokens_apart, difference) = compare(reference, &made, tokens, experts);
        let agrees = u64::from(tokens_apart) * 8 <= tokens as u64 && difference <= 1e-3;
        let ms = f64::INFINITY;
        candidates.push(Candidate { variant, ms, first_ms, tokens_apart, difference, agrees });
        steps.push(step);
    }
    // In turn, so that a change of the device's clocks meets all alike; once only what is far behind.
    for run in 0..RUNS {
        let best = candidates.iter().fold(f64::INFINITY, |best, c| best.min(c.ms));
        for (step, candidate) in steps.iter().zip(&mut candidates) {
            if run == 0 || candidate.ms < 4.0 * best {
                let start = Instant::now();
                gpu.run_layer(step)?;
                candidate.ms = candidate.ms.min(milliseconds(start));
            }
        }
    }
    let fastest = candidates.iter().filter(|c| c.agrees).min_by(|a, b| a.ms.total_cmp(&b.ms));
    let variant = fastest.map_or(own, |c| c.variant); // the own one agrees with itself
    Ok(Tuning { variant, candidates })
}

fn first_run(
    gpu: &Gpu,
    layer: &MoeLayer,
    variant: Variant,
    batch: &Batch<'_>,
) -> Result<BoundLayer> {
    let options = ContextOptions { cache: None, ..layer.context().options() };
    let ctx = Context::with_options(&gpu.device, options.with_variant(variant))?;
    let step = layer.with_context(&ctx)?.bind(batch)?;
    gpu.run_layer(&step)?;
    Ok(step)
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Tokens whose experts differ, and the largest difference of the others' rows as a share of the row's largest value. Outputs
/// `[T, D]` and bit sets of both. A row that is not finite in one only differs without bound.
fn compare(
    (want, want_assigned): &(Vec<f32>, Vec<u32>),
    (got, got_assigned): &(Vec<f32>, Vec<u32>),
    tokens: usize,
    experts: usize,
) -> (u32, f32) {
    let width = want.len() / tokens;
    let (mut apart, mut most) = (0, 0f32);
    for (t, (want, got)) in want.chunks(width).zip(got.chunks(width)).enumerate() {
        let has = |words: &[u32], e| bits::get(words, tokens, e, t);
        if (0..experts).any(|e| has(want_assigned, e) != has(got_assigned, e)) {
            apart += 1;
            continue;
        }
        let scale = want.iter().fold(f32::MIN_POSITIVE, |max, v| max.max(v.abs()));
        for (want, got) in want.iter().zip(got) {
            let same = want == got || (want.is_nan() && got.is_nan());
            let difference = if same { 0.0 } else { (want - got).abs() / scale };
            most = if difference.is_nan() { f32::INFINITY } else { most.max(difference) };
        }
    }
    (apart, most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_seen() {
        // Two tokens of two values, one expert.
        let made = |values: [f32; 4], assigned: u32| (values.to_vec(), vec![assigned]);
        let want = made([4.0, 1.0, 0.0, 0.0], 0b01);
        let compared = |got| compare(&want, &got, 2, 1);
        assert_eq!(compared(want.clone()), (0, 0.0));
        assert_eq!(compared(made([4.0, 2.0, 0.0, 0.0], 0b01)), (0, 0.25));
        assert_eq!(compared(made([4.0, 1.0, 9.0, 9.0], 0b11)), (1, 0.0));
        assert_eq!(compared(made([f32::NAN, 1.0, 0.0, 0.0], 0b01)), (0, f32::INFINITY));
        assert_eq!(compared(made([f32::INFINITY, 1.0, 0.0, 0.0], 0b01)).1, f32::INFINITY);
    }
}
