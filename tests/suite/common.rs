//! Seeded data, the GPU fixture and the comparison every parity test uses.
use rand::{Rng, SeedableRng, rngs::StdRng};
use wgmoe::layer::{self, HostBatch, HostRouter, LayerConfig, MoeLayer, Router, Tensor};
use wgmoe::weights::{ExpertWeights, HostWeights, Projection, WeightType};
use wgmoe::{BoundOp, Context, Error, Gpu, Slice, Variant};

/// The GPU, or `None` with a note. `MOE_REQUIRE_GPU=1` (CI) turns absence into a failure. One device serves all tests.
pub(crate) fn gpu() -> Option<Gpu> {
    static GPU: std::sync::OnceLock<Result<Gpu, wgmoe::Error>> = std::sync::OnceLock::new();
    match GPU.get_or_init(Gpu::new) {
        Ok(gpu) => Some(gpu.clone()),
        Err(e) if std::env::var_os("MOE_REQUIRE_GPU").is_some() => panic!("{e}"),
        Err(e) => {
            eprintln!("skipped: {e}");
            None
        }
    }
}

/// A context for every variant `gpu` can run; each is made once.
pub(crate) fn contexts(gpu: &Gpu) -> Vec<Context> {
    static ALL: std::sync::OnceLock<Vec<Context>> = std::sync::OnceLock::new();
    ALL.get_or_init(|| own_contexts(gpu)).clone()
}

/// The same, made anew: for tests that count pipelines, which other tests would add to.
pub(crate) fn own_contexts(gpu: &Gpu) -> Vec<Context> {
    let context = |v| Context::with_variant(&gpu.device, v, None).expect("a context");
    Variant::all(&gpu.device).into_iter().map(context).collect()
}

/// Uniform in [-1, 1), the same on every machine.
pub(crate) fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// A written buffer: `len` items of `poison` before, one guard word after.
pub(crate) struct Output {
    buffer: wgpu::Buffer,
    size: u64,
}

use wgmoe::wgpu;

const GUARD: u32 = 0xdead_beef;

impl Output {
    /// Holds u32 poison.
    pub(crate) fn u32s(gpu: &Gpu, len: usize) -> Self {
        Self::holding(gpu, &vec![u32::MAX; len])
    }

    /// Holds NaN.
    pub(crate) fn f32s(gpu: &Gpu, len: usize) -> Self {
        Self::holding(gpu, &vec![f32::NAN; len])
    }

    /// Holds `data`.
    pub(crate) fn holding<T: bytemuck::NoUninit>(gpu: &Gpu, data: &[T]) -> Self {
        let mut words: Vec<u32> = bytemuck::cast_slice(data).to_vec();
        let size = words.len() as u64 * 4;
        words.push(GUARD);
        Self { buffer: gpu.upload(&words), size }
    }

    pub(crate) fn slice(&self) -> Slice<'_> {
        Slice::new(&self.buffer, 0, self.size)
    }

    /// What it holds now; fails if the guard word was overwritten.
    pub(crate) fn get<T: bytemuck::Pod>(&self, gpu: &Gpu) -> Vec<T> {
        let mut words: Vec<u32> = gpu.download(&self.buffer).expect("read back");
        assert_eq!(words.pop(), Some(GUARD), "written past the end");
        bytemuck::pod_collect_to_vec(&words)
    }
}

/// Runs a step and waits.
pub(crate) fn run(gpu: &Gpu, step: &BoundOp) {
    gpu.run(step).expect("run");
}

/// First index where `got` is not within `atol + rtol * |want|` of `want`. NaN never is.
pub(crate) fn mismatch(got: &[f32], want: &[f32], atol: f32, rtol: f32) -> Option<usize> {
    assert_eq!(got.len(), want.len(), "lengths");
    got.iter().zip(want).position(|(g, w)| {
        let close = (g - w).abs() <= atol + rtol * w.abs(); // false for NaN
        !close
    })
}

/// Fails on the first mismatch, naming index and values.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f32], atol: f32, rtol: f32, what: &str) {
    if let Some(i) = mismatch(got, want, atol, rtol) {
        panic!("{what}: at {i} of {}: got {}, want {}", got.len(), got[i], want[i]);
    }
}

/// Fails on the first difference, naming index and values.
#[track_caller]
pub(crate) fn assert_same<T: PartialEq + std::fmt::Debug>(got: &[T], want: &[T], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    if let Some(i) = (0..got.len()).find(|&i| got[i] != want[i]) {
        panic!("{what}: at {i} of {}: got {:x?}, want {:x?}", got.len(), got[i], want[i]);
    }
}

/// A layer of seeded weights, and the same on the host.
pub(crate) struct Sample {
    pub(crate) settings: LayerConfig,
    pub(crate) router: Vec<f32>,
    matrices: Vec<[Vec<f32>; 3]>,
}

impl Sample {
    pub(crate) fn new(settings: LayerConfig) -> Self {
        let all = settings.experts + settings.shared_experts;
        let size = (settings.hidden * settings.intermediate) as usize;
        let matrix = |e: u32, p: u32| -> Vec<f32> {
            random(u64::from(e * 3 + p) + 1000, size).iter().map(|v| v * 0.3).collect()
        };
        Self {
            settings,
            router: random(1, (settings.experts * settings.hidden) as usize),
            matrices: (0..all).map(|e| [0, 1, 2].map(|p| matrix(e, p))).collect(),
        }
    }

    /// Experts of f32 on the device.
    pub(crate) fn weights(
        &self,
        ctx: &Context,
        queue: &wgpu::Queue,
    ) -> Result<ExpertWeights, Error> {
        let shape = self.settings.expert_shape(WeightType::F32);
        let weights = ExpertWeights::new(ctx, shape, None)?;
        for (e, matrices) in (0..).zip(&self.matrices) {
            for (p, values) in Projection::ALL.into_iter().zip(matrices) {
                weights.write(queue, e, p, HostWeights::F32(values))?;
            }
        }
        Ok(weights)
    }

    pub(crate) fn router(&self, ctx: &Context) -> Result<Router, Error> {
        let weight = Tensor::new(ctx, "router", &self.router)?;
        Ok(Router { weight, bias: None, by_count: None, by_expert: None })
    }

    pub(crate) fn layer(&self, ctx: &Context, queue: &wgpu::Queue) -> Result<MoeLayer, Error> {
        MoeLayer::new(ctx, self.settings, self.router(ctx)?, self.weights(ctx, queue)?)
    }

    /// The CPU twin of one token's experts.
    pub(crate) fn cpu_token(&self, x: &[f32], chosen: &[(u32, f32)]) -> Vec<f32> {
        let matrix =
            |e: u32, p: Projection| HostWeights::F32(&self.matrices[e as usize][p as usize]);
        layer::cpu_token(&self.settings, &matrix, x, chosen)
    }

    /// The CPU twin of the layer.
    pub(crate) fn cpu(&self, x: &[f32]) -> Vec<f32> {
        let matrix =
            |e: u32, p: Projection| HostWeights::F32(&self.matrices[e as usize][p as usize]);
        let router = &self.router;
        let router = HostRouter { weight: router, bias: None, by_count: None, by_expert: None };
        layer::cpu(&self.settings, &router, HostBatch::default(), &matrix, x)
    }
}

#[test]
fn mismatch_can_fail() {
    assert_eq!(mismatch(&[1.0, f32::NAN], &[1.0, 1.0], 1.0, 1.0), Some(1));
    assert_eq!(mismatch(&[1.0, 1.1], &[1.0, 1.0], 0.01, 0.01), Some(1));
    assert_eq!(mismatch(&[1.0, 1.0], &[1.0, 1.0], 0.0, 0.0), None);
}
