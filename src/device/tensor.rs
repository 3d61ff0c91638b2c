//! Tensors that a layer keeps.
use super::guard::{holding, scoped};
use super::{Context, Slice};
use crate::Result;

/// A tensor on the device that a layer keeps: a buffer and a range of it.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub(crate) buffer: wgpu::Buffer,
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

impl Tensor {
    /// Uploads values.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where memory runs out or the device is lost.
    pub fn new<T: bytemuck::NoUninit>(
        ctx: &Context,
        name: &'static str,
        data: &[T],
    ) -> Result<Self> {
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_DST
            | wgpu::BufferUsages::COPY_SRC;
        let contents = bytemuck::cast_slice(data);
        let buffer = scoped(ctx.device(), || holding(ctx.device(), Some(name), usage, contents))??;
        Ok(Self { buffer, offset: 0, size: contents.len() as u64 })
    }

    /// The range, to bind.
    pub fn slice(&self) -> Slice<'_> {
        Slice::new(&self.buffer, self.offset, self.size)
    }
}

/// Keeps a caller's tensor where it lies.
impl From<Slice<'_>> for Tensor {
    fn from(slice: Slice<'_>) -> Self {
        Self { buffer: slice.buffer.clone(), offset: slice.offset, size: slice.size }
    }
}

/// The whole buffer.
impl From<&wgpu::Buffer> for Tensor {
    fn from(buffer: &wgpu::Buffer) -> Self {
        Slice::from(buffer).into()
    }
}

/// The whole buffer.
impl From<wgpu::Buffer> for Tensor {
    fn from(buffer: wgpu::Buffer) -> Self {
        let size = buffer.size();
        Self { buffer, offset: 0, size }
    }
}

impl<'a> From<&'a Tensor> for Slice<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        tensor.slice()
    }
}
