//! What all layers on one device of Burn's share.
use burn::backend::wgpu::WgpuSetup;
use burn::tensor::{Device, Tensor};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use wgmoe::layer::Scratch;
use wgmoe::{Context, Error, Result, wgpu};

/// A device of Burn's on wgpu, and what the layers on it share: pipelines and scratch. Clones share all of it.
#[derive(Clone, Debug)]
pub struct MoeDevice {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    device: Device,
    queue: wgpu::Queue,
    ctx: Context,
    scratch: Scratch,
    readbacks: AtomicU64,
    bytes: AtomicU64,
}

/// What this crate moved between host and device: every copy and map of ours is counted here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Tensors read back to the host.
    pub readbacks: u64,
    /// Bytes moved, either way.
    pub bytes: u64,
}

impl MoeDevice {
    /// Burn's default device on wgpu. It must not be in use yet: Burn hands out the wgpu handles of a device when it makes it.
    ///
    /// # Errors
    ///
    /// [`Error::NoGpu`] where Burn finds no adapter, or has made the device already.
    pub fn open() -> Result<Self> {
        let (device, setup) =
            Device::wgpu_options().init_with_setup().map_err(|e| Error::NoGpu(e.to_string()))?;
        Self::new(device, &setup)
    }

    /// A device of Burn's and the wgpu handles that it runs on: what `Device::wgpu_options().init_with_setup()` returned, or
    /// what an application gave to `WgpuOptions::setup`.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where the device is lost.
    pub fn new(device: Device, setup: &WgpuSetup) -> Result<Self> {
        let ctx = Context::new(&setup.device)?;
        let inner = Inner {
            device,
            queue: setup.queue.clone(),
            scratch: Scratch::new(&ctx),
            ctx,
            readbacks: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Burn's device, to make tensors on.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// The context of the layers.
    pub fn context(&self) -> &Context {
        &self.inner.ctx
    }

    /// The queue that Burn and the layers submit to.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.inner.queue
    }

    pub(crate) fn scratch(&self) -> &Scratch {
        &self.inner.scratch
    }

    /// Bytes of scratch, shared by all layers.
    pub fn scratch_bytes(&self) -> u64 {
        self.inner.scratch.bytes()
    }

    /// What was moved so far. Layers move weights when they are made; running one moves nothing.
    pub fn traffic(&self) -> Traffic {
        Traffic {
            readbacks: self.inner.readbacks.load(Ordering::Relaxed),
            bytes: self.inner.bytes.load(Ordering::Relaxed),
        }
    }

    /// Reads a tensor back, counted.
    pub(crate) fn read<const R: usize>(&self, tensor: Tensor<R>) -> Vec<f32> {
        let values: Vec<f32> = tensor.try_into_vec_as().expect("a tensor that can be read");
        self.inner.readbacks.fetch_add(1, Ordering::Relaxed);
        self.moved(values.len() as u64 * 4);
        values
    }

    /// Counts bytes that go to the device.
    pub(crate) fn moved(&self, bytes: u64) {
        self.inner.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}
