//! How long a program waits for a layer's first output: the time in which kernels are compiled.
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
use wgmoe::layer::{Batch, MoeLayer, Router, Tensor};
use wgmoe::weights::{HostWeights, Projection};
use wgmoe::{Context, ContextOptions, ExpertWeights, Gpu, WeightType, wgpu};

const MODEL: &str = "llada2-mini";
/// As many as there are groups of them, twice: the kernels are those of all 256.
const EXPERTS: u32 = 16;
/// Dispatches of the first run that are named, longest first.
const LONGEST: usize = 8;

/// What is waited for, and for how long.
struct Times {
    steps: Vec<(&'static str, Duration, usize)>,
    /// Of the first run: what each dispatch took, in ms.
    dispatches: Vec<(String, f64)>,
    again: Duration,
}

/// Measures an adapter, with the pipelines of `cache` where there is such a file, which is written anew.
///
/// # Errors
///
/// What goes wrong, in words.
pub(crate) async fn start(
    adapter: &wgpu::Adapter,
    tokens: u32,
    cache: Option<&Path>,
) -> Result<String, String> {
    let feature = wgpu::Features::PIPELINE_CACHE;
    if cache.is_some() && !adapter.features().contains(feature) {
        return Err("this adapter takes no pipeline cache".into());
    }
    let gpu =
        open(adapter, if cache.is_some() { feature } else { wgpu::Features::empty() }).await?;
    let weights = weights(&gpu).map_err(|e| e.to_string())?;
    let read = cache.and_then(|file| fs::read(file).ok());
    let pipelines = cache.map(|_| pipeline_cache(&gpu.device, read.as_deref()));
    let Times { steps, mut dispatches, again } =
        first_output(&gpu, weights, tokens, pipelines.clone()).map_err(|e| e.to_string())?;

    let info = &gpu.info;
    let mut text = format!("{}, {} {}\n", info.name, info.driver, info.driver_info);
    let _ = writeln!(text, "{MODEL}, one layer, {EXPERTS} experts, bf16, {tokens} tokens");
    let ms = |time: Duration| 1e3 * time.as_secs_f64();
    for (what, time, made) in &steps {
        let _ = writeln!(text, "  {what:<14}{:9.1} ms  {made:3} pipelines", ms(*time));
    }
    // A software driver makes machine code at a kernel's first dispatch.
    dispatches.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (label, ms) in dispatches.iter().take(LONGEST) {
        let _ = writeln!(text, "    {label:<38}{ms:9.1} ms");
    }
    let all: Duration = steps.iter().map(|(_, time, _)| time).sum();
    let _ = writeln!(text, "  {:<14}{:9.1} ms", "in all", ms(all));
    let _ = writeln!(text, "  {:<14}{:9.1} ms", "second run", ms(again));
    if let (Some(file), Some(pipelines)) = (cache, pipelines) {
        let written = pipelines.get_data().unwrap_or_default();
        fs::write(file, &written).map_err(|e| format!("{}: {e}", file.display()))?;
        let (read, written) = (read.map_or(0, |data| data.len()), written.len());
        let _ = writeln!(text, "  cache: {read} bytes read, {written} bytes written");
    }
    Ok(text)
}

async fn open(adapter: &wgpu::Adapter, more: wgpu::Features) -> Result<Gpu, String> {
    let wanted = wgpu::Features::SUBGROUP | wgpu::Features::SHADER_INT64;
    let (device, queue) = adapter
        .request_device(&wgpu::DeviceDescriptor {
            required_features: (adapter.features() & wanted) | more,
            required_limits: adapter.limits(),
            ..Default::default()
        })
        .await
        .map_err(|e| e.to_string())?;
    Ok(Gpu { device, queue, info: adapter.get_info() })
}

#[expect(unsafe_code, reason = "wgpu cannot know where the data comes from")]
fn pipeline_cache(device: &wgpu::Device, data: Option<&[u8]>) -> wgpu::PipelineCache {
    let descriptor = wgpu::PipelineCacheDescriptor { label: None, data, fallback: true };
    // SAFETY: the data is what `PipelineCache::get_data` returned: whoever names another file here does so knowingly.
    unsafe { device.create_pipeline_cache(&descriptor) }
}

/// The weights, there before the clock starts: how long they take is another question.
fn weights(gpu: &Gpu) -> wgmoe::Result<ExpertWeights> {
    let config = config();
    let shape = config.expert_shape(WeightType::Bf16);
    let weights = ExpertWeights::new(&Context::new(&gpu.device)?, shape)?;
    let matrix = vec![0.01f32; config.hidden as usize * config.intermediate as usize];
    for expert in 0..shape.experts {
        for projection in Projection::ALL {
            weights.write(&gpu.queue, expert, projection, HostWeights::F32(&matrix))?;
        }
    }
    gpu.queue.submit([]);
    gpu.wait()?;
    Ok(weights)
}

fn config() -> wgmoe::layer::LayerConfig {
    let mut config = wgmoe::models::find(MODEL).expect("a model").config;
    config.experts = EXPERTS;
    config
}

fn first_output(
    gpu: &Gpu,
    weights: ExpertWeights,
    tokens: u32,
    cache: Option<wgpu::PipelineCache>,
) -> wgmoe::Result<Times> {
    let config = config();
    let size = (tokens * config.hidden) as usize;
    let (hidden, out) = (gpu.upload(&vec![0.5f32; size]), gpu.upload(&vec![0f32; size]));
    let values: Vec<f32> =
        (0..config.experts * config.hidden).map(|i| (i % 7) as f32 * 0.01).collect();
    gpu.wait()?;

    let mut steps = vec![];
    let mut clock = Instant::now();
    let mut made = 0;
    let mut lap = |what, pipelines: usize| {
        let now = Instant::now();
        steps.push((what, now - clock, pipelines - made));
        (clock, made) = (now, pipelines);
    };
    let options = ContextOptions::default();
    let options = match cache {
        Some(cache) => options.with_cache(cache),
        None => options,
    };
    let ctx = Context::with_options(&gpu.device, options)?;
    lap("context", ctx.pipelines());
    let router = Router::new(Tensor::new(&ctx, "router", &values)?);
    let layer = MoeLayer::new(&ctx, config, router, weights)?;
    lap("layer", ctx.pipelines());
    let step = layer.bind(&Batch::new(&hidden, tokens).into_out(&out))?;
    lap("bind", ctx.pipelines());
    let dispatches = gpu.profile_alone(step.dispatches())?;
    lap("first run", ctx.pipelines());

    let start = Instant::now();
    gpu.run_layer(&step)?;
    Ok(Times { steps, dispatches, again: start.elapsed() })
}
