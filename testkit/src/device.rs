//! The GPU of a test run, and buffers that show what a kernel wrote.
use wgmoe::{BoundOp, Context, Gpu, Slice, Variant, wgpu};

/// Whether an absent adapter is a failure: `MOE_REQUIRE_GPU=1`, which CI sets.
pub fn required() -> bool {
    std::env::var_os("MOE_REQUIRE_GPU").is_some()
}

/// The GPU, or `None` with a note. `MOE_REQUIRE_GPU=1` (CI) turns absence into a failure. One
/// device serves all tests.
pub fn gpu() -> Option<Gpu> {
    static GPU: std::sync::OnceLock<Result<Gpu, wgmoe::Error>> = std::sync::OnceLock::new();
    match GPU.get_or_init(Gpu::new) {
        Ok(gpu) => Some(gpu.clone()),
        Err(e) if required() => panic!("{e}"),
        Err(e) => {
            eprintln!("skipped: {e}");
            None
        }
    }
}

/// A context for every variant `gpu` can run; each is made once.
pub fn contexts(gpu: &Gpu) -> Vec<Context> {
    static ALL: std::sync::OnceLock<Vec<Context>> = std::sync::OnceLock::new();
    ALL.get_or_init(|| own_contexts(gpu)).clone()
}

/// The same, made anew: for tests that count pipelines, which other tests would add to.
pub fn own_contexts(gpu: &Gpu) -> Vec<Context> {
    let context = |v| Context::with_variant(&gpu.device, v).expect("a context");
    Variant::all(&gpu.device).into_iter().map(context).collect()
}

/// A written buffer: `len` items of `poison` before, one guard word after.
pub struct Output {
    buffer: wgpu::Buffer,
    size: u64,
}

const GUARD: u32 = 0xdead_beef;

impl Output {
    /// Holds u32 poison.
    pub fn u32s(gpu: &Gpu, len: usize) -> Self {
        Self::holding(gpu, &vec![u32::MAX; len])
    }

    /// Holds NaN.
    pub fn f32s(gpu: &Gpu, len: usize) -> Self {
        Self::holding(gpu, &vec![f32::NAN; len])
    }

    /// Holds `data`.
    pub fn holding<T: bytemuck::NoUninit>(gpu: &Gpu, data: &[T]) -> Self {
        let mut words: Vec<u32> = bytemuck::cast_slice(data).to_vec();
        let size = words.len() as u64 * 4;
        words.push(GUARD);
        Self { buffer: gpu.upload(&words), size }
    }

    pub fn slice(&self) -> Slice<'_> {
        Slice::new(&self.buffer, 0, self.size)
    }

    /// What it holds now; fails if the guard word was overwritten.
    pub fn get<T: bytemuck::Pod>(&self, gpu: &Gpu) -> Vec<T> {
        let mut words: Vec<u32> = gpu.download(&self.buffer).expect("read back");
        assert_eq!(words.pop(), Some(GUARD), "written past the end");
        bytemuck::pod_collect_to_vec(&words)
    }
}

/// Runs a step and waits.
pub fn run(gpu: &Gpu, step: &BoundOp) {
    gpu.run(step).expect("run");
}

/// What a variant is called in a message.
pub fn variant_name(ctx: &Context) -> String {
    let v = ctx.variant();
    format!("{:?}{}", v.target, if v.subgroups { ", subgroups" } else { "" })
}
