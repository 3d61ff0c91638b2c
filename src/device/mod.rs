//! The caller's device: contexts, slices of buffers, kernels and the work they record.
//!
//! | type | what it is |
//! |---|---|
//! | [`Context`] | a device, the [`Variant`] of the kernels in use, and the pipelines made so far: one a device |
//! | [`Slice`] | a range of one of the caller's buffers: how every tensor is handed over |
//! | [`Floats`] | a slice of f32, f16 or bf16: hidden states and outputs |
//! | [`Tensor`] | a buffer that is kept, such as a router's weights |
//! | [`BoundOp`] | an op with its arguments: a list of [`Dispatch`]es, recorded as often as it is to run |
//!
//! `record` writes into a compute pass of the caller's. Layers also have `encode`, which makes a
//! pass of their own in an encoder.
//!
//! ```
//! use wgmoe::ops::gather::{Args, Dims, Gather};
//! use wgmoe::{Context, Slice};
//! # fn main() -> wgmoe::Result<()> {
//! # let Ok(gpu) = wgmoe::Gpu::new() else { return Ok(()) };
//! let ctx = Context::new(&gpu.device)?;
//! // Four rows of two values in the second half of a buffer; rows 2 and 0 are wanted.
//! let arena = gpu.upload(&[0f32; 64 + 8]);
//! let x = Slice::new(&arena, 256, 4 * 2 * 4);
//! let (token_of, out) = (gpu.upload(&[2u32, 0]), gpu.upload(&[1f32; 4]));
//! let args = Args { x: x.into(), token_of: (&token_of).into(), out: (&out).into() };
//! let gather = Gather::new(&ctx)?.bind(&Dims { tokens: 4, slots: 2, hidden: 2 }, args)?;
//!
//! let mut encoder = gpu.device.create_command_encoder(&Default::default());
//! gather.record(&mut encoder.begin_compute_pass(&Default::default()));
//! gpu.queue.submit([encoder.finish()]);
//! assert_eq!(gpu.download::<f32>(&out)?, [0.0; 4]);
//! # Ok(())
//! # }
//! ```
mod context;
mod floats;
pub(crate) mod guard;
pub(crate) mod matrix;
pub(crate) mod quirks;
mod record;
pub(crate) mod shader;
mod slice;
mod tensor;
mod threads;
mod variant;
pub(crate) mod wait;

pub use context::{Context, ContextOptions};
pub use floats::{FloatType, Floats};
pub use matrix::{MatrixReport, MatrixShape, MatrixUnits, Precision};
pub(crate) use record::Kernel;
pub use record::{BoundOp, Dispatch};
pub use shader::{Binding, Prelude, Spec, WORKGROUP_BYTES};
pub use slice::Slice;
pub use tensor::Tensor;
pub(crate) use threads::both;
pub use variant::{Target, TileShape, Variant};
