//! The caller's device: contexts, slices of buffers, kernels and the work they record.
mod context;
pub(crate) mod guard;
pub(crate) mod quirks;
mod record;
pub(crate) mod shader;
mod slice;
mod tensor;
mod variant;
pub(crate) mod wait;

pub use context::Context;
pub(crate) use record::Kernel;
pub use record::{BoundOp, Dispatch};
pub use shader::{Binding, Prelude, Spec, WORKGROUP_BYTES};
pub use slice::Slice;
pub use tensor::Tensor;
pub use variant::{Target, Variant};
