//! Weights on the host.
use super::{MatrixView, WeightType};
use crate::{Error, Result};
use half::{bf16, f16};

/// Weights on the host, row-major `[out, in]` as checkpoints have them.
#[derive(Clone, Copy, Debug)]
pub enum HostWeights<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// 16-bit floats.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// A matrix that need not be contiguous or aligned: a part of a tensor of a file, in any type.
    /// Types of blocks, such as Q4_K, are uploaded by this.
    View(MatrixView<'a>),
}

impl<'a> HostWeights<'a> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
            Self::View(v) => v.shape().map(|n| n as usize).iter().product(),
        }
    }

    /// Type of the values.
    pub fn weight_type(&self) -> WeightType {
        match self {
            Self::F32(_) => WeightType::F32,
            Self::F16(_) => WeightType::F16,
            Self::Bf16(_) => WeightType::Bf16,
            Self::View(view) => view.weight_type(),
        }
    }

    /// Bytes of the values.
    pub fn size(&self) -> u64 {
        match self {
            Self::View(view) => view.size(),
            _ => self.len() as u64 * self.weight_type().block_bytes(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A value, widened exactly.
    ///
    /// # Panics
    ///
    /// If `i` is not below [`HostWeights::len`].
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::F32(v) => v[i],
            Self::F16(v) => v[i].to_f32(),
            Self::Bf16(v) => v[i].to_f32(),
            Self::View(v) => {
                let columns = v.shape()[1] as usize;
                v.get(i / columns, i % columns)
            }
        }
    }

    /// The values as a matrix `[out, in]`.
    ///
    /// # Errors
    ///
    /// Another number of values.
    pub fn matrix(&self, shape: [u32; 2]) -> Result<MatrixView<'a>> {
        let expected = u64::from(shape[0]) * u64::from(shape[1]);
        let fits = match self {
            Self::View(view) => view.shape() == shape,
            _ => self.len() as u64 == expected,
        };
        if !fits {
            let got = match self {
                Self::View(view) => format!("{:?}", view.shape()),
                _ => format!("{} values", self.len()),
            };
            return Err(Error::invalid(
                "weights",
                format!("expected {expected} values, {shape:?}, got {got}"),
            ));
        }
        let bytes = match *self {
            Self::F32(v) => bytemuck::cast_slice(v),
            Self::F16(v) => bytemuck::cast_slice(v),
            Self::Bf16(v) => bytemuck::cast_slice(v),
            Self::View(view) => return Ok(view),
        };
        MatrixView::new(bytes, self.weight_type(), shape, [shape[1].into(), 1])
    }
}
