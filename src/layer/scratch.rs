//! Buffers between the kernels of a layer.
use crate::device::Tensor;
use crate::{Context, Error, Result};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Buffers between the kernels of a layer, for layers of one context to share: those must then run
/// in order on one queue.
///
/// A buffer grows with the largest batch that was bound and serves all smaller ones. A buffer that
/// has been replaced by a larger one is freed with the last layer that was bound to it. Clones share
/// the buffers.
#[derive(Clone, Debug)]
pub struct Scratch {
    ctx: Context,
    buffers: Arc<Mutex<HashMap<Key, wgpu::Buffer>>>,
    /// Bytes that one bind has asked for.
    asked: Arc<Mutex<HashMap<Key, u64>>>,
}

/// The tensor's name, and the part of one that lies in several buffers.
type Key = (&'static str, usize);

impl Scratch {
    /// None yet.
    pub fn new(ctx: &Context) -> Self {
        Self { ctx: ctx.clone(), buffers: Arc::default(), asked: Arc::default() }
    }

    /// The caller's, if it is of this context, or one of a layer's own.
    pub(crate) fn of(given: Option<&Self>, ctx: &Context) -> Result<Self> {
        match given {
            None => Ok(Self::new(ctx)),
            Some(scratch) if scratch.ctx.is_same(ctx) => Ok(scratch.clone()),
            Some(_) => Err(Error::invalid("scratch", "made for another context")),
        }
    }

    /// The same buffers, for a bind that counts what it asks for.
    pub(crate) fn counting(self) -> Self {
        Self { asked: Arc::default(), ..self }
    }

    /// Bytes that were asked for since it counts.
    pub(crate) fn asked(&self) -> u64 {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }

    pub(crate) fn get(&self, name: &'static str, bytes: u64) -> Result<Tensor> {
        self.part(name, 0, bytes)
    }

    /// A part of a tensor that lies in several buffers.
    pub(crate) fn part(&self, name: &'static str, part: usize, bytes: u64) -> Result<Tensor> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (name, part);
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let of_key = asked.entry(key).or_default();
        *of_key = bytes.max(16).next_multiple_of(16).max(*of_key); // as buffers are made
        drop(asked);
        let buffer = match buffers.get(&key) {
            Some(buffer) if buffer.size() >= bytes => buffer.clone(),
            _ => {
                let buffer = self.ctx.scratch(name, bytes)?;
                buffers.insert(key, buffer.clone());
                buffer
            }
        };
        Ok(Tensor { buffer, offset: 0, size: bytes })
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        let buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.values().map(wgpu::Buffer::size).sum()
    }
}
