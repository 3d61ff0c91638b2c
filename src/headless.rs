//! A headless device for tests, benches and examples. Applications bring their own.
//!
//! ```
//! # fn main() -> wgmoe::Result<()> {
//! # if wgmoe::Gpu::new().is_err() { return Ok(()) }
//! let gpu = wgmoe::Gpu::new()?; // or `Gpu::open(Some("a part of its name"))`
//! let buffer = gpu.upload(&[1u32, 2, 3]);
//! assert_eq!(gpu.download::<u32>(&buffer)?, [1, 2, 3]);
//! # Ok(())
//! # }
//! ```
use crate::device::wait::{Wait, block_on, signal};
use crate::layer::BoundLayer;
use crate::{BoundOp, Error, Result};

/// A device and its queue, with the features our kernels can use where present.
///
/// What waits for the device is there twice. In a browser nothing may block: the `async` ones work there, the others are
/// [`Error::Device`]. Elsewhere the `async` ones poll the device, and come back with the result at once.
#[derive(Clone, Debug)]
pub struct Gpu {
    /// Device.
    pub device: wgpu::Device,
    /// Queue.
    pub queue: wgpu::Queue,
    /// What it is, for reports.
    pub info: wgpu::AdapterInfo,
}

impl Gpu {
    /// Opens the default adapter (`WGPU_BACKEND` and `WGPU_ADAPTER_NAME` are honoured), a software one where there is no
    /// other.
    ///
    /// # Errors
    ///
    /// [`Error::NoGpu`] if there is no adapter or it refuses the device.
    pub fn new() -> Result<Self> {
        block_on(Self::open(None))
    }

    /// As [`Gpu::new`], `async`; `adapter` chooses one by a part of its name or by its index in [`Gpu::adapters`].
    ///
    /// # Errors
    ///
    /// [`Error::NoGpu`] if there is no such adapter or it refuses the device.
    pub async fn open(adapter: Option<&str>) -> Result<Self> {
        Self::from_adapter(&Self::choose(adapter).await?).await
    }

    /// The adapter that [`Gpu::open`] opens.
    ///
    /// # Errors
    ///
    /// [`Error::NoGpu`] if there is no such adapter.
    pub async fn choose(adapter: Option<&str>) -> Result<wgpu::Adapter> {
        let none = |e: &dyn std::fmt::Display| Error::NoGpu(e.to_string());
        // wgpu's own reading of `WGPU_ADAPTER_NAME` panics where no adapter has the name.
        let named = std::env::var("WGPU_ADAPTER_NAME").ok().filter(|n| !n.is_empty());
        Ok(match adapter.or(named.as_deref()) {
            None => {
                let descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
                let options = wgpu::RequestAdapterOptions {
                    power_preference: wgpu::PowerPreference::from_env().unwrap_or_default(),
                    ..Default::default()
                };
                let instance = wgpu::Instance::new(descriptor);
                instance.request_adapter(&options).await.map_err(|e| none(&e))?
            }
            Some(want) => {
                let all = Self::adapters().await;
                let index = want.parse::<usize>().ok().filter(|&i| i < all.len()).or_else(|| {
                    let want = want.to_lowercase();
                    all.iter().position(|a| a.get_info().name.to_lowercase().contains(&want))
                });
                let names: Vec<_> = all.iter().map(|a| a.get_info().name).collect();
                let index = index
                    .ok_or_else(|| Error::NoGpu(format!("no adapter `{want}` among {names:?}")))?;
                all[index].clone()
            }
        })
    }

    /// Every adapter of every backend compiled in (or of those in `WGPU_BACKEND`).
    pub async fn adapters() -> Vec<wgpu::Adapter> {
        let descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
        let backends = descriptor.backends;
        wgpu::Instance::new(descriptor).enumerate_adapters(backends).await
    }

    /// A device of `adapter`, with all its limits and the features that help here.
    ///
    /// # Errors
    ///
    /// [`Error::NoGpu`] if it refuses the device.
    pub async fn from_adapter(adapter: &wgpu::Adapter) -> Result<Self> {
        Self::request(adapter, wgpu::Features::empty(), wgpu::ExperimentalFeatures::disabled())
            .await
    }

    /// The same with the features of [`MatrixUnits`](crate::MatrixUnits) too, where the adapter has
    /// all of them. The token is the caller's word that wgpu's experimental features may be used.
    ///
    /// # Errors
    ///
    /// As [`Gpu::from_adapter`].
    pub async fn with_matrix_units(
        adapter: &wgpu::Adapter,
        token: wgpu::ExperimentalFeatures,
    ) -> Result<Self> {
        let features = crate::MatrixUnits::FEATURES;
        if adapter.features().contains(features) {
            Self::request(adapter, features, token).await
        } else {
            Self::from_adapter(adapter).await
        }
    }

    async fn request(
        adapter: &wgpu::Adapter,
        more: wgpu::Features,
        experimental_features: wgpu::ExperimentalFeatures,
    ) -> Result<Self> {
        let wanted = wgpu::Features::SUBGROUP
            | wgpu::Features::SHADER_INT64
            | wgpu::Features::TIMESTAMP_QUERY
            | more;
        let (device, queue) = adapter
            .request_device(&wgpu::DeviceDescriptor {
                required_features: adapter.features() & wanted,
                required_limits: adapter.limits(),
                experimental_features,
                ..Default::default()
            })
            .await
            .map_err(|e| Error::NoGpu(e.to_string()))?;
        Ok(Self { device, queue, info: adapter.get_info() })
    }

    /// A storage buffer holding `data`. On a lost device, or where memory runs out, an invalid one: whatever it is bound to
    /// or copied to is then refused with an error.
    pub fn upload<T: bytemuck::NoUninit>(&self, data: &[T]) -> wgpu::Buffer {
        let contents: &[u8] = bytemuck::cast_slice(data);
        let descriptor = wgpu::BufferDescriptor {
            label: None,
            size: (contents.len() as u64).next_multiple_of(4),
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: !contents.is_empty(),
        };
        let make = || {
            let buffer = self.device.create_buffer(&descriptor);
            if descriptor.mapped_at_creation {
                if let Ok(mut view) = buffer.get_mapped_range_mut(..) {
                    view.slice(..contents.len()).copy_from_slice(contents);
                    drop(view);
                    buffer.unmap();
                }
            }
            buffer
        };
        crate::device::guard::watched(&self.device, make).0
    }

    /// Records `step` into a pass of its own, submits it, and waits.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where the device is lost or refuses the work.
    pub fn run(&self, step: &BoundOp) -> Result<()> {
        block_on(self.run_async(step))
    }

    /// As [`Gpu::run`], `async`.
    ///
    /// # Errors
    ///
    /// As [`Gpu::run`].
    pub async fn run_async(&self, step: &BoundOp) -> Result<()> {
        crate::device::guard::scoped(&self.device, || {
            let mut encoder = self.device.create_command_encoder(&Default::default());
            step.record(&mut encoder.begin_compute_pass(&Default::default()));
            self.queue.submit([encoder.finish()]);
        })?;
        self.wait_async().await
    }

    /// Records a layer's step, submits it, and waits.
    ///
    /// # Errors
    ///
    /// As [`Gpu::run`].
    pub fn run_layer(&self, step: &BoundLayer) -> Result<()> {
        block_on(self.run_layer_async(step))
    }

    /// As [`Gpu::run_layer`], `async`.
    ///
    /// # Errors
    ///
    /// As [`Gpu::run`].
    pub async fn run_layer_async(&self, step: &BoundLayer) -> Result<()> {
        crate::device::guard::scoped(&self.device, || {
            let mut encoder = self.device.create_command_encoder(&Default::default());
            step.encode(&mut encoder);
            self.queue.submit([encoder.finish()]);
        })?;
        self.wait_async().await
    }

    /// Waits for all submitted work.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where the device is lost.
    pub fn wait(&self) -> Result<()> {
        block_on(self.wait_async())
    }

    /// As [`Gpu::wait`], `async`.
    ///
    /// # Errors
    ///
    /// As [`Gpu::wait`].
    pub async fn wait_async(&self) -> Result<()> {
        match Wait::HERE {
            Wait::Poll => {
                let poll = self.device.poll(wgpu::PollType::wait_indefinitely());
                poll.map_err(|e| Error::Device(e.to_string()))?;
            }
            Wait::Await => {
                let (done, future) = signal();
                self.queue.on_submitted_work_done(move || done(()));
                future.await;
            }
        }
        crate::device::guard::alive(&self.device)
    }

    /// Copies a buffer, or a range of one, back. Waits for the GPU.
    ///
    /// # Errors
    ///
    /// [`Error::ReadBack`] if mapping fails, [`Error::Device`] if the copy is refused.
    pub fn download<'a, T: bytemuck::Pod>(
        &self,
        slice: impl Into<crate::Slice<'a>>,
    ) -> Result<Vec<T>> {
        block_on(self.download_async(slice))
    }

    /// As [`Gpu::download`], `async`.
    ///
    /// # Errors
    ///
    /// As [`Gpu::download`].
    pub async fn download_async<'a, T: bytemuck::Pod>(
        &self,
        slice: impl Into<crate::Slice<'a>>,
    ) -> Result<Vec<T>> {
        let crate::Slice { buffer, offset, size } = slice.into();
        crate::device::guard::alive(&self.device)?;
        let staging = crate::device::guard::scoped(&self.device, || {
            let staging = self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("download"),
                size,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            });
            let mut encoder = self.device.create_command_encoder(&Default::default());
            encoder.copy_buffer_to_buffer(buffer, offset, &staging, 0, size);
            self.queue.submit([encoder.finish()]);
            staging
        })?;
        let (send, mapped) = signal();
        staging.map_async(wgpu::MapMode::Read, .., send);
        let mapped = Wait::HERE.until(&self.device, None, mapped).await?;
        mapped.map_err(|e| Error::ReadBack(e.to_string()))?;
        let view = staging.get_mapped_range(..).map_err(|e| Error::ReadBack(e.to_string()))?;
        Ok(bytemuck::pod_collect_to_vec(&view))
    }
}
