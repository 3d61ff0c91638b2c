//! What all layers on one device of Burn's share.
use crate::learning::buffer;
use crate::op::Place;
use crate::pack::Packer;
use burn::backend::wgpu::WgpuSetup;
use burn::tensor::{Device, Tensor};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use wgmoe::layer::Scratch;
use wgmoe::weights::{ExpertGradients, ExpertShape};
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
    /// Of layers that learn: what every step uses in its turn.
    packer: OnceLock<Packer>,
    exchange: Mutex<HashMap<&'static str, wgpu::Buffer>>,
    gradients: Mutex<HashMap<ExpertShape, ExpertGradients>>,
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
            packer: OnceLock::new(),
            exchange: Mutex::default(),
            gradients: Mutex::default(),
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

    /// Bytes of scratch, shared by all layers; of layers that learn their gradients too, before Burn has them.
    pub fn scratch_bytes(&self) -> u64 {
        let exchange = self.inner.exchange.lock().unwrap_or_else(PoisonError::into_inner);
        let gradients = self.inner.gradients.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.scratch.bytes()
            + exchange.values().map(wgpu::Buffer::size).sum::<u64>()
            + gradients.values().map(ExpertGradients::bytes).sum::<u64>()
    }

    pub(crate) fn packer(&self) -> &Packer {
        self.inner.packer.get_or_init(|| Packer::new(&self.inner.ctx))
    }

    /// Room for a tensor between Burn's and a step of ours, which all steps share.
    pub(crate) fn exchange(&self, name: &'static str, bytes: u64) -> Place {
        let mut all = self.inner.exchange.lock().unwrap_or_else(PoisonError::into_inner);
        let found = all.get(name).filter(|b| b.size() >= bytes).cloned();
        let buffer = found.unwrap_or_else(|| {
            let made = buffer(self, name, bytes);
            all.insert(name, made.clone());
            made
        });
        Place { buffer, offset: 0, size: bytes }
    }

    /// Room for the gradients of experts, which all steps share.
    pub(crate) fn gradients(&self, shape: ExpertShape) -> Result<ExpertGradients> {
        let mut all = self.inner.gradients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = all.get(&shape) {
            return Ok(made.clone());
        }
        let made = ExpertGradients::new(&self.inner.ctx, &shape)?;
        all.insert(shape, made.clone());
        Ok(made)
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
        self.read_back(values.len() as u64 * 4);
        values
    }

    /// Counts a tensor that was read back.
    pub(crate) fn read_back(&self, bytes: u64) {
        self.inner.readbacks.fetch_add(1, Ordering::Relaxed);
        self.moved(bytes);
    }

    /// Counts bytes that go to the device.
    pub(crate) fn moved(&self, bytes: u64) {
        self.inner.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}
