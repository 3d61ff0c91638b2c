//! The GPU of a test run, and buffers that show what a kernel wrote.
use std::sync::OnceLock;
use wgmoe::device::MatrixReport;
use wgmoe::{BoundOp, Context, ContextOptions, Gpu, MatrixUnits, Slice, Variant, wgpu};

/// Whether an absent adapter is a failure: `MOE_REQUIRE_GPU=1`, which CI sets.
pub fn required() -> bool {
    std::env::var_os("MOE_REQUIRE_GPU").is_some()
}

/// The GPU, or `None` with a note. `MOE_REQUIRE_GPU=1` (CI) turns absence into a failure. One
/// device serves all tests.
pub fn gpu() -> Option<Gpu> {
    match opened() {
        Ok((_, gpu)) => Some(gpu.clone()),
        Err(e) if required() => panic!("{e}"),
        Err(e) => {
            eprintln!("skipped: {e}");
            None
        }
    }
}

/// The adapter and the device made of it; with matrix units where it has them.
fn opened() -> &'static Result<(wgpu::Adapter, Gpu), wgmoe::Error> {
    static GPU: OnceLock<Result<(wgpu::Adapter, Gpu), wgmoe::Error>> = OnceLock::new();
    GPU.get_or_init(|| {
        pollster::block_on(async {
            let adapter = Gpu::choose(None).await?;
            let gpu = with_matrix_units(&adapter).await?;
            Ok((adapter, gpu))
        })
    })
}

/// A device with matrix units, where the adapter has some that work.
///
/// # Errors
///
/// As [`Gpu::from_adapter`].
pub async fn with_matrix_units(adapter: &wgpu::Adapter) -> wgmoe::Result<Gpu> {
    // On lavapipe they work with subgroups of 8 alone: wgpu 30 panics with 2 and 4, and with 16 the driver
    // (Mesa 26.2.6) crashes as it compiles a kernel.
    let info = adapter.get_info();
    if info.device_type == wgpu::DeviceType::Cpu && info.subgroup_min_size != 8 {
        Gpu::from_adapter(adapter).await
    } else {
        Gpu::with_matrix_units(adapter, experimental()).await
    }
}

/// The adapter of the GPU of the test run.
pub fn adapter() -> wgpu::Adapter {
    opened().as_ref().expect("a GPU").0.clone()
}

/// A device without any feature that is experimental.
pub fn plain(adapter: &wgpu::Adapter) -> Gpu {
    pollster::block_on(Gpu::from_adapter(adapter)).expect("a device")
}

/// wgpu's token for experimental features.
#[expect(unsafe_code, reason = "the token for experimental features is made in no other way")]
pub fn experimental() -> wgpu::ExperimentalFeatures {
    // SAFETY: tests take the risk of undefined behaviour in features that wgpu has not finished.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}

/// The matrix units of the GPU of the test run; shapes are listed where the device has the features.
pub fn matrix_units(gpu: &Gpu) -> MatrixUnits {
    let listed = opened().as_ref().ok().map(|(a, _)| a.cooperative_matrix_properties());
    MatrixUnits::of_shapes(listed.unwrap_or_default(), &gpu.queue)
}

/// The context of a variant, with matrix units where it uses them and they are there.
pub fn context_of(gpu: &Gpu, variant: Variant) -> Context {
    let options = ContextOptions::default().with_variant(variant);
    let options = options.with_matrix_units(matrix_units(gpu));
    Context::with_options(&gpu.device, options).expect("a context")
}

/// A context for every variant `gpu` can run, with tiles of the shape that suits it, and small items on GPUs; each is made once. Those for matrix units are said to
/// be left out where the device has none.
pub fn contexts(gpu: &Gpu) -> Vec<Context> {
    static ALL: OnceLock<Vec<Context>> = OnceLock::new();
    ALL.get_or_init(|| own_contexts(gpu)).clone()
}

/// The same, made anew: for tests that count pipelines, which other tests would add to.
pub fn own_contexts(gpu: &Gpu) -> Vec<Context> {
    // Without subgroups matrix units are of no use.
    let best = Variant::best(&gpu.device);
    let is_likely = |v: &Variant| v.tile == best.tile && v.small_items == best.small_items;
    let all = Variant::all(&gpu.device).into_iter().filter(is_likely);
    let all = all.filter(|v| v.subgroups || !v.matrix);
    let all: Vec<Context> = all.map(|variant| context_of(gpu, variant)).collect();
    for ctx in all.iter().filter(|ctx| ctx.variant().matrix) {
        assert!(matches!(ctx.matrix(), MatrixReport::InUse { .. }), "{}", ctx.matrix());
    }
    if !all.iter().any(|ctx| ctx.variant().matrix) {
        static SAID: std::sync::Once = std::sync::Once::new();
        SAID.call_once(|| eprintln!("not run: kernels on matrix units, which this device lacks"));
    }
    all
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
    let subgroups = if v.subgroups { ", subgroups" } else { "" };
    let matrix = if v.matrix { ", matrix units" } else { "" };
    let small = if v.small_items { ", small items" } else { "" };
    format!("{:?}{subgroups}{matrix}, {:?} tiles{small}", v.target, v.tile)
}
