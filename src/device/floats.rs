//! Activations in the type in which an engine keeps them.
use super::Tensor;
use super::shader::{Piece, piece};
use crate::error::bytes_of;
use crate::{Error, Result, Slice};
use half::{bf16, f16};
use std::ops::Range;

/// The type of values that an engine keeps in its buffers: hidden states and outputs. Kernels widen
/// them to f32 as they load them, exactly, and round once as they store: to nearest, ties to even,
/// values past the largest to infinity. No device feature is needed: halves are read and written as
/// integers, two a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// 4 bytes.
    #[default]
    F32,
    /// 2 bytes: 5 bits of exponent, 10 of mantissa. Values below 2^-14 may be read as 0 by devices
    /// that flush such f16.
    F16,
    /// 2 bytes: the upper half of an f32.
    Bf16,
}

impl FloatType {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of a value.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// `f32`, `f16`, `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// The bytes of values, rounded as the kernels round.
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        let halves =
            |of: fn(f32) -> u16| values.iter().flat_map(|&v| of(v).to_le_bytes()).collect();
        match self {
            Self::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::F16 => halves(|v| f16::from_f32(v).to_bits()),
            Self::Bf16 => halves(|v| bf16::from_f32(v).to_bits()),
        }
    }

    /// The values of bytes; bytes past the last whole value are left out.
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        (0..bytes.len() / self.bytes() as usize).map(|i| self.at(bytes, i)).collect()
    }

    /// The value at an index of bytes that hold it.
    pub(crate) fn at(self, bytes: &[u8], index: usize) -> f32 {
        let half = || u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]);
        match self {
            Self::F32 => f32::from_le_bytes(std::array::from_fn(|i| bytes[4 * index + i])),
            Self::F16 => f16::from_bits(half()).to_f32(),
            Self::Bf16 => bf16::from_bits(half()).to_f32(),
        }
    }

    /// The type of this name in safetensors files.
    #[cfg(feature = "checkpoint")]
    pub(crate) fn of_dtype(dtype: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(dtype))
    }

    /// How halves become f32 and f32 halves; none where nothing is to be done.
    pub(crate) fn halves(self) -> Option<Piece> {
        match self {
            Self::F32 => None,
            Self::F16 => Some(piece!("common/halves_f16")),
            Self::Bf16 => Some(piece!("common/halves_bf16")),
        }
    }
}

/// A range of a buffer that holds floats of some type. A [`Slice`], and what converts to one, is f32.
///
/// ```
/// # use wgmoe::device::Floats;
/// # use wgmoe::{Slice, layer::Batch, wgpu};
/// # fn f(hidden: &wgpu::Buffer, out: &wgpu::Buffer) {
/// // 32 tokens of an engine that keeps its hidden states in bf16 and sums the residual in f32.
/// let batch = Batch::new(Floats::bf16(hidden), 32).added_to(out);
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Floats<'a> {
    /// Where.
    pub slice: Slice<'a>,
    /// What.
    pub float_type: FloatType,
}

impl<'a> Floats<'a> {
    /// A slice of values of a type.
    pub fn new(slice: impl Into<Slice<'a>>, float_type: FloatType) -> Self {
        Self { slice: slice.into(), float_type }
    }

    /// A slice of f16.
    pub fn f16(slice: impl Into<Slice<'a>>) -> Self {
        Self::new(slice, FloatType::F16)
    }

    /// A slice of bf16.
    pub fn bf16(slice: impl Into<Slice<'a>>) -> Self {
        Self::new(slice, FloatType::Bf16)
    }

    /// Checks that the slice holds exactly these rows, each of whole 32-bit words.
    pub(crate) fn holds(&self, name: &'static str, rows: u64, width: u64) -> Result<()> {
        self.fits(name, rows, width, |got, expected| got == expected, "")
    }

    /// Checks that the slice holds these rows, and perhaps more.
    pub(crate) fn holds_at_least(&self, name: &'static str, rows: u64, width: u64) -> Result<()> {
        self.fits(name, rows, width, |got, expected| got >= expected, "at least ")
    }

    fn fits(
        &self,
        name: &'static str,
        rows: u64,
        width: u64,
        enough: fn(u64, u64) -> bool,
        words: &str,
    ) -> Result<()> {
        let float = self.float_type.name();
        if !(width * self.float_type.bytes()).is_multiple_of(4) {
            let reason = format!("rows of {width} {float} are no whole 32-bit words");
            return Err(Error::invalid(name, reason));
        }
        let shape = [rows, width];
        let (expected, got) = (bytes_of(name, &shape, self.float_type.bytes())?, self.slice.size);
        if enough(got, expected) {
            return Ok(());
        }
        Err(Error::Size { name, expected, got, shape: Some(format!("{words}{shape:?} {float}")) })
    }

    /// Some rows of a tensor of rows of `width` values.
    pub(crate) fn rows(&self, rows: &Range<u32>, width: u32) -> Self {
        let row = self.float_type.bytes() * u64::from(width);
        let offset = self.slice.offset + u64::from(rows.start) * row;
        let size = u64::from(rows.end - rows.start) * row;
        Self { slice: Slice { offset, size, ..self.slice }, ..*self }
    }
}

/// f32.
impl<'a> From<Slice<'a>> for Floats<'a> {
    fn from(slice: Slice<'a>) -> Self {
        Self::new(slice, FloatType::F32)
    }
}

/// f32, the whole buffer.
impl<'a> From<&'a wgpu::Buffer> for Floats<'a> {
    fn from(buffer: &'a wgpu::Buffer) -> Self {
        Slice::from(buffer).into()
    }
}

/// f32.
impl<'a> From<wgpu::BufferSlice<'a>> for Floats<'a> {
    fn from(slice: wgpu::BufferSlice<'a>) -> Self {
        Slice::from(slice).into()
    }
}

/// f32.
impl<'a> From<&'a Tensor> for Floats<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Slice::from(tensor).into()
    }
}
