//! Arguments: a range of bytes of somebody's buffer.
use crate::error::bytes_of;
use crate::{Error, Result};

/// A range of a buffer: how every tensor is handed over, so that tensors an engine has placed inside larger buffers bind
/// where they lie. A whole buffer converts (`(&buffer).into()`), and so does a [`wgpu::BufferSlice`].
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a> {
    /// The buffer, with `BufferUsages::STORAGE`.
    pub buffer: &'a wgpu::Buffer,
    /// First byte; a multiple of the device's `min_storage_buffer_offset_alignment`.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

impl<'a> Slice<'a> {
    /// `size` bytes of `buffer` from `offset` on. Checked when it is bound.
    pub const fn new(buffer: &'a wgpu::Buffer, offset: u64, size: u64) -> Self {
        Self { buffer, offset, size }
    }

    /// The range as a bind group takes it, for kernels of the caller's own.
    pub fn binding(self) -> wgpu::BindingResource<'a> {
        let Self { buffer, offset, size } = self;
        let size = wgpu::BufferSize::new(size);
        wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size })
    }

    /// Checks that the slice holds exactly this shape of f32, in checked arithmetic.
    pub(crate) fn f32s(&self, name: &'static str, shape: &[u64]) -> Result<()> {
        self.holds(name, shape, "f32", 4)
    }

    /// Checks that the slice holds exactly this shape of u32, in checked arithmetic.
    pub(crate) fn u32s(&self, name: &'static str, shape: &[u64]) -> Result<()> {
        self.holds(name, shape, "u32", 4)
    }

    /// Checks that the slice holds exactly this shape of pairs of u32, in checked arithmetic.
    pub(crate) fn pairs(&self, name: &'static str, shape: &[u64]) -> Result<()> {
        self.holds(name, shape, "pairs of u32", 8)
    }

    fn holds(&self, name: &'static str, shape: &[u64], item: &str, bytes: u64) -> Result<()> {
        let (expected, got) = (bytes_of(name, shape, bytes)?, self.size);
        if got == expected {
            return Ok(());
        }
        Err(Error::Size { name, expected, got, shape: Some(format!("{shape:?} {item}")) })
    }

    pub(crate) fn end(&self) -> u64 {
        self.offset.saturating_add(self.size)
    }

    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.buffer == other.buffer && self.offset < other.end() && other.offset < self.end()
    }
}

impl<'a> From<&'a wgpu::Buffer> for Slice<'a> {
    fn from(buffer: &'a wgpu::Buffer) -> Self {
        Self { buffer, offset: 0, size: buffer.size() }
    }
}

impl<'a> From<wgpu::BufferSlice<'a>> for Slice<'a> {
    fn from(s: wgpu::BufferSlice<'a>) -> Self {
        Self { buffer: s.buffer(), offset: s.offset(), size: s.size() }
    }
}
