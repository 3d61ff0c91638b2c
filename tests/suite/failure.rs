//! What a caller sees of a whole layer when the device fails it: errors, never a panic, never the device's
//! uncaptured-error handler.
use std::sync::Arc;
use testkit::layer::HostLayer;
use testkit::prelude::*;
use wgmoe::layer::{Batch, LayerConfig, MoeLayer, Tensor};
use wgmoe::routing::schedule::Schedule;
use wgmoe::weights::ExpertWeights;
use wgmoe::wgpu::{self, BufferUsages, Limits};
use wgmoe::{Context, Error, Gpu, Slice, WeightType, models};

fn config() -> LayerConfig {
    let config = models::find("llada2-mini").unwrap().config;
    {
        let mut config = config;
        config.hidden = 64;
        config.intermediate = 32;
        config.experts = 32;
        config
    }
}

/// A device of its own whose uncaptured-error handler is a failure, with limits changed.
fn device(change: impl FnOnce(&mut Limits)) -> Option<Gpu> {
    gpu()?;
    let adapters = pollster::block_on(Gpu::adapters());
    let mut required_limits = Limits::default();
    change(&mut required_limits);
    let descriptor = wgpu::DeviceDescriptor { required_limits, ..Default::default() };
    let (device, queue) = pollster::block_on(adapters[0].request_device(&descriptor)).unwrap();
    device.on_uncaptured_error(Arc::new(|e| panic!("an uncaptured error: {e}")));
    Some(Gpu { device, queue, info: adapters[0].get_info() })
}

fn layer(gpu: &Gpu) -> Result<MoeLayer, Error> {
    HostLayer::new(config()).layer(&Context::new(&gpu.device)?, &gpu.queue)
}

/// 33 tokens of a layer in two buffers.
fn bind(layer: &MoeLayer, hidden: &wgpu::Buffer, out: &wgpu::Buffer) -> Result<(), String> {
    let batch = Batch::new(Slice::new(hidden, 0, BYTES), 33).into_out(Slice::new(out, 0, BYTES));
    layer.bind(&batch).map(|_| ()).map_err(|e| e.to_string())
}

const BYTES: u64 = 33 * 64 * 4;

fn buffer(gpu: &Gpu, usage: BufferUsages) -> wgpu::Buffer {
    gpu.device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: BYTES,
        usage,
        mapped_at_creation: false,
    })
}

#[test]
fn limits_too_small() {
    let Some(gpu) = device(|l| l.max_storage_buffers_per_shader_stage = 4) else { return };
    let error = layer(&gpu).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Limit { limit: "max_storage_buffers_per_shader_stage", need: 5.., have: 4, .. }
        ),
        "{error}"
    );
    let gpu = device(|l| l.max_compute_workgroup_storage_size = 8000).unwrap();
    let error = layer(&gpu).unwrap_err().to_string();
    let text = "`: 16384 needed, max_compute_workgroup_storage_size of this device is 8000";
    assert!(error.ends_with(text), "{error}");
    let lanes: [fn(&mut Limits); 2] =
        [|l| l.max_compute_invocations_per_workgroup = 64, |l| l.max_compute_workgroup_size_x = 24];
    for change in lanes {
        let error = layer(&device(change).unwrap()).unwrap_err();
        assert!(matches!(error, Error::Device(_)), "{error}");
        assert!(error.to_string().contains("64"), "{error}");
    }
    // Weights take more pages, and a batch that does not fit is refused.
    let gpu = device(|l| l.max_storage_buffer_binding_size = 64 << 10).unwrap();
    let layer = layer(&gpu).unwrap();
    assert!(layer.weights().page_counts()[0] > 1);
    let [hidden, out] = [(); 2].map(|()| buffer(&gpu, BufferUsages::STORAGE));
    bind(&layer, &hidden, &out).unwrap();
    let long = gpu.upload(&vec![0f32; 2048 * 64]);
    let batch = |at| Slice::new(&long, at, 1024 * 64 * 4);
    let error = layer.bind(&Batch::new(batch(0), 1024).into_out(batch(1024 * 64 * 4))).unwrap_err();
    assert!(
        matches!(error, Error::Limit { limit: "max_storage_buffer_binding_size", .. }),
        "{error}"
    );
    // A page that cannot hold one panel of columns.
    let gpu = device(|l| l.max_storage_buffer_binding_size = 4 << 10).unwrap();
    let ctx = Context::new(&gpu.device).unwrap();
    let error = ExpertWeights::new(&ctx, config().expert_shape(WeightType::F32));
    let error = error.unwrap_err().to_string();
    assert_eq!(
        error,
        "`weights`: 8192 needed, max_storage_buffer_binding_size of this device is 4096"
    );
}

#[test]
fn a_usage_that_is_missing() {
    let Some(gpu) = device(|_| ()) else { return };
    let layer = layer(&gpu).unwrap();
    let good = buffer(&gpu, BufferUsages::STORAGE);
    let bare = buffer(&gpu, BufferUsages::COPY_DST);
    bind(&layer, &good, &buffer(&gpu, BufferUsages::STORAGE)).unwrap();
    // Named as the kernel that binds it names it.
    for result in [bind(&layer, &bare, &good), bind(&layer, &good, &bare)] {
        let text = result.unwrap_err();
        assert!(text.ends_with("the buffer lacks STORAGE"), "{text}");
    }
}

#[test]
fn destroyed_and_foreign_buffers() {
    let Some(gpu) = device(|_| ()) else { return };
    let layer = layer(&gpu).unwrap();
    let [good, gone] = [(); 2].map(|()| buffer(&gpu, BufferUsages::STORAGE));
    gone.destroy();
    for result in [bind(&layer, &gone, &good), bind(&layer, &good, &gone)] {
        let text = result.unwrap_err();
        assert!(text.starts_with("wgpu: ") && text.contains("destroyed"), "{text}");
    }
}

#[test]
fn a_device_that_is_lost() {
    let Some(gpu) = device(|_| ()) else { return };
    let sample = HostLayer::new(config());
    let ctx = Context::new(&gpu.device).unwrap();
    let layer = sample.layer(&ctx, &gpu.queue).unwrap();
    let [hidden, out] = [(); 2].map(|()| buffer(&gpu, BufferUsages::STORAGE));
    let batch = Batch::new(&hidden, 33).into_out(&out);
    let step = layer.bind(&batch).unwrap();
    gpu.device.destroy();
    let lost = gpu.upload(&[1u32]);
    let texts = [
        Context::new(&gpu.device).map(|_| ()),
        ExpertWeights::new(&ctx, layer.weights().shape()).map(|_| ()),
        sample.router(&ctx).map(|_| ()),
        layer.with_routing(models::find("ec-dlm").unwrap().config.routing).map(|_| ()),
        // Every kernel of it is compiled already.
        layer.with_context(&ctx).map(|_| ()),
        // As a schedule's stairs are uploaded.
        Tensor::new(&ctx, "stairs", &Schedule::fixed(3).staircase().unwrap().words()).map(|_| ()),
        layer.bind(&batch).map(|_| ()),
        gpu.run_layer(&step),
        gpu.download::<u32>(&lost).map(|_| ()),
    ]
    .map(|result| result.unwrap_err().to_string());
    for text in texts {
        assert!(text.contains("lost") || text.contains("destroyed"), "{text}");
    }
}
