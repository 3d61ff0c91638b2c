//! Times of work that is recorded again and again: warmed up until they settle, on the host's clock
//! and between GPU timestamps.
use crate::device::Device;
use crate::file::Times;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use web_time::Instant;
use wgmoe::{Gpu, wgpu};

/// Most samples of a case, and so timestamps in pairs.
const MOST_SAMPLES: usize = 200;
/// Fewest samples of a case, and of one that takes long.
const FEWEST_SAMPLES: usize = 7;
const FEWEST_SLOW_SAMPLES: usize = 3;
/// A sample lasts about this long at least, in milliseconds, so that submitting it weighs little. A browser's clocks tick in
/// tenths of a millisecond, the GPU's too.
const SAMPLE_MS: f64 = if cfg!(target_family = "wasm") { 10.0 } else { 2.0 };
const MOST_REPEATS: u32 = 256;
/// Times have settled once the medians of two runs of samples differ by less than this share.
const SETTLED: f64 = 0.05;
const SETTLED_RUN: usize = 3;

/// What was measured of some work.
#[derive(Clone, Debug)]
pub(crate) struct Timing {
    pub(crate) wall: Times,
    /// The GPU's times, or why there are none.
    pub(crate) gpu: Result<Times, String>,
    pub(crate) repeats: u32,
    pub(crate) settled: bool,
}

impl Timing {
    /// The times to go by.
    pub(crate) fn times(&self) -> &Times {
        self.gpu.as_ref().unwrap_or(&self.wall)
    }
}

/// Work to be timed: records turn number `n` into a pass. Turns go through the inputs.
pub(crate) type Record<'a> = &'a dyn Fn(usize, &mut wgpu::ComputePass<'_>);

/// Times work on one device.
pub(crate) struct Timer<'a> {
    pub(crate) device: &'a Device,
    stop: &'a AtomicBool,
    queries: Option<Queries>,
    /// Turns recorded so far.
    turn: Cell<usize>,
}

struct Queries {
    set: wgpu::QuerySet,
    resolved: wgpu::Buffer,
}

/// Why work was not timed.
#[derive(Debug, PartialEq)]
pub(crate) enum Stop {
    Interrupted,
    Failed(String),
}

impl From<wgmoe::Error> for Stop {
    fn from(e: wgmoe::Error) -> Self {
        Self::Failed(e.to_string())
    }
}

impl<'a> Timer<'a> {
    pub(crate) fn new(device: &'a Device, stop: &'a AtomicBool) -> Self {
        let gpu = &device.gpu;
        let stamps = gpu.device.features().contains(wgpu::Features::TIMESTAMP_QUERY);
        let queries = stamps.then(|| Queries {
            set: gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("samples"),
                ty: wgpu::QueryType::Timestamp,
                count: 2 * MOST_SAMPLES as u32,
            }),
            resolved: gpu.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("samples"),
                size: 16 * MOST_SAMPLES as u64,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            }),
        });
        Self { device, stop, queries, turn: Cell::new(0) }
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        &self.device.gpu
    }

    /// Turns recorded so far.
    #[cfg(test)]
    pub(crate) fn turns(&self) -> usize {
        self.turn.get()
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Times work for about `seconds`, a third of it warming up at most; work that takes long may
    /// take three times that.
    pub(crate) async fn time(&self, record: Record<'_>, seconds: f64) -> Result<Timing, Stop> {
        let start = Instant::now();
        let spent = || start.elapsed().as_secs_f64();
        // The first run may make things that later ones find. Work that takes long is warm after.
        let mut once = self.sample(record, 1, 0).await?;
        if once / 1e3 < seconds / 3.0 {
            once = self.sample(record, 1, 0).await?;
        }
        let repeats = ((SAMPLE_MS / once).ceil() as u32).clamp(1, MOST_REPEATS);
        let mut warm = vec![];
        while !settled(&warm) && spent() < seconds / 3.0 && !self.stopped() {
            warm.push(self.sample(record, repeats, 0).await?);
        }
        let settled = settled(&warm);
        let begin = spent();
        let mut walls = vec![];
        loop {
            let long = spent() - begin;
            let enough = if long < 3.0 * seconds { FEWEST_SAMPLES } else { FEWEST_SLOW_SAMPLES };
            if walls.len() == MOST_SAMPLES || (long >= seconds * 2.0 / 3.0 && walls.len() >= enough)
            {
                break;
            }
            if self.stopped() && walls.len() < FEWEST_SLOW_SAMPLES {
                return Err(Stop::Interrupted);
            } else if self.stopped() {
                break;
            }
            walls.push(self.sample(record, repeats, walls.len()).await?);
        }
        // Fails where the device was lost on the way: its times mean nothing.
        self.gpu().wait_async().await?;
        self.device.errors()?;
        let gpu = self.stamps(&walls).await?;
        let share =
            |ms: &[f64]| summary(&ms.iter().map(|ms| ms / f64::from(repeats)).collect::<Vec<_>>());
        let wall = share(&walls).ok_or_else(|| Stop::Failed("no samples".into()))?;
        let gpu = gpu.and_then(|ms| share(&ms).ok_or_else(|| "no samples".into()));
        Ok(Timing { wall, gpu, repeats, settled })
    }

    /// Times what `record` puts into an encoder, alone in its submission, on the host's clock, for
    /// about `seconds`.
    pub(crate) async fn submit(
        &self,
        record: &dyn Fn(&mut wgpu::CommandEncoder),
        seconds: f64,
    ) -> Result<Times, Stop> {
        let start = Instant::now();
        let mut walls = vec![];
        while walls.len() < FEWEST_SAMPLES || start.elapsed().as_secs_f64() < seconds {
            if self.stopped() {
                return Err(Stop::Interrupted);
            }
            let begin = Instant::now();
            let mut encoder = self.gpu().device.create_command_encoder(&Default::default());
            record(&mut encoder);
            self.submit_and_wait(encoder).await?;
            walls.push(begin.elapsed().as_secs_f64() * 1e3);
        }
        self.device.errors()?;
        summary(&walls).ok_or_else(|| Stop::Failed("no samples".into()))
    }

    async fn submit_and_wait(&self, encoder: wgpu::CommandEncoder) -> Result<(), Stop> {
        self.gpu().queue.submit([encoder.finish()]);
        if cfg!(target_family = "wasm") {
            return Ok(self.gpu().wait_async().await?);
        }
        // No more than needed: it is timed.
        let polled = self.gpu().device.poll(wgpu::PollType::wait_indefinitely());
        polled.map(|_| ()).map_err(|e| Stop::Failed(e.to_string()))
    }

    /// Milliseconds of one sample on the host's clock. Its timestamps go to pair `pair`.
    async fn sample(&self, record: Record<'_>, repeats: u32, pair: usize) -> Result<f64, Stop> {
        let start = Instant::now();
        let mut encoder = self.gpu().device.create_command_encoder(&Default::default());
        let first = 2 * pair as u32;
        let writes = self.queries.as_ref().map(|q| wgpu::ComputePassTimestampWrites {
            query_set: &q.set,
            beginning_of_pass_write_index: Some(first),
            end_of_pass_write_index: Some(first + 1),
        });
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: Some("sample"),
                timestamp_writes: writes,
            });
            for _ in 0..repeats {
                record(self.turn.get(), &mut pass);
                self.turn.set(self.turn.get() + 1);
            }
        }
        self.submit_and_wait(encoder).await?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }

    /// The samples' milliseconds between timestamps, or why they cannot be used.
    async fn stamps(&self, walls: &[f64]) -> Result<Result<Vec<f64>, String>, Stop> {
        let Some(queries) = &self.queries else {
            return Ok(Err("the device has no timestamps".into()));
        };
        let count = 2 * walls.len() as u32;
        let mut encoder = self.gpu().device.create_command_encoder(&Default::default());
        encoder.resolve_query_set(&queries.set, 0..count, &queries.resolved, 0);
        self.gpu().queue.submit([encoder.finish()]);
        let size = 8 * u64::from(count);
        let ticks: Vec<u64> = self.gpu().download_async(queries.resolved.slice(..size)).await?;
        Ok(durations(&ticks, self.gpu().queue.get_timestamp_period(), walls))
    }
}

/// Milliseconds of pairs of timestamps, or why they cannot be true. `walls` are the host's, of the
/// same work and more.
fn durations(ticks: &[u64], period: f32, walls: &[f64]) -> Result<Vec<f64>, String> {
    if !period.is_finite() || period <= 0.0 {
        return Err(format!("a tick of {period} ns"));
    }
    if ticks.iter().all(|&t| t == 0) {
        return Err("all timestamps are zero".into());
    }
    let times: Option<Vec<f64>> = ticks
        .chunks_exact(2)
        .map(|t| Some(t[1].checked_sub(t[0])? as f64 * f64::from(period) / 1e6))
        .collect();
    let times = times.ok_or("a sample ends before it begins")?;
    if let Some(i) = times.iter().position(|&ms| ms == 0.0) {
        return Err(format!("sample {i} took no time"));
    }
    // Two clocks may differ a little.
    match times.iter().zip(walls).position(|(gpu, wall)| *gpu > wall * 1.02 + 0.05) {
        Some(i) => Err(format!(
            "sample {i} took {:.3} ms by its timestamps, {:.3} ms in all by the host's clock",
            times[i], walls[i]
        )),
        None => Ok(times),
    }
}

/// Whether the last samples are like those before them.
fn settled(samples: &[f64]) -> bool {
    let Some(last) = samples.len().checked_sub(2 * SETTLED_RUN) else { return false };
    let (before, after) = samples[last..].split_at(SETTLED_RUN);
    match (median(before), median(after)) {
        (Some(a), Some(b)) => (a - b).abs() <= SETTLED * a,
        _ => false,
    }
}

fn median(values: &[f64]) -> Option<f64> {
    summary(values).map(|t| t.median_ms)
}

/// Median, quartiles (between neighbours, linearly), least and count; none of no samples.
pub(crate) fn summary(ms: &[f64]) -> Option<Times> {
    let mut sorted = ms.to_vec();
    sorted.sort_by(f64::total_cmp);
    let least_ms = *sorted.first()?;
    let at = |share: f64| {
        let place = share * (sorted.len() - 1) as f64;
        let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
        low + (high - low) * place.fract()
    };
    Some(Times {
        median_ms: at(0.5),
        q1_ms: at(0.25),
        q3_ms: at(0.75),
        least_ms,
        count: sorted.len() as u32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_medians_and_quartiles() {
        let of = |ms: &[f64]| {
            let t = summary(ms).unwrap();
            [t.least_ms, t.q1_ms, t.median_ms, t.q3_ms]
        };
        assert_eq!(of(&[5.0]), [5.0; 4]);
        assert_eq!(of(&[4.0, 1.0, 3.0, 2.0, 9.0]), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(of(&[4.0, 1.0, 3.0, 2.0]), [1.0, 1.75, 2.5, 3.25]);
        assert_eq!(summary(&[]), None);
        // One slow sample in seven moves neither the median nor the quartiles.
        assert_eq!(of(&[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 900.0]), [1.0; 4]);
    }

    #[test]
    fn warm_up_ends_once_times_stay() {
        assert!(!settled(&[1.0; 5]));
        assert!(settled(&[1.0; 6]));
        assert!(!settled(&[9.0, 8.0, 7.0, 3.0, 2.0, 1.0]));
        assert!(settled(&[9.0, 1.0, 1.0, 1.0, 1.0, 1.04, 1.04]));
        assert!(!settled(&[f64::NAN; 6]));
    }

    #[test]
    fn timestamps_that_cannot_be_true_are_dropped() {
        let walls = [3.0, 3.0];
        assert_eq!(durations(&[10, 1_000_010, 7, 500_007], 2.0, &walls), Ok(vec![2.0, 1.0]));
        for (ticks, period, reason) in [
            ([0, 0, 0, 0], 1.0, "all timestamps are zero"),
            ([5, 4, 1, 2], 1.0, "ends before it begins"),
            ([5, 5, 1, 2], 1.0, "sample 0 took no time"),
            ([0, 9_000_000, 0, 1], 1.0, "by the host's clock"),
            ([1, 2, 3, 4], 0.0, "a tick of 0 ns"),
            ([1, 2, 3, 4], f32::NAN, "a tick of NaN ns"),
        ] {
            let got = durations(&ticks, period, &walls).unwrap_err();
            assert!(got.contains(reason), "{got:?} should say {reason:?}");
        }
    }
}
