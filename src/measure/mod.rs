//! Measuring: where a step's time goes, and which variant of the kernels is the fastest on a device.
//!
//! - [`profile`] gives the time of each kernel of a step, between timestamps of the GPU.
//! - [`tune`] runs a layer in every [`Variant`](crate::Variant) that the device can run, and names
//!   the fastest.
//!
//! Both are for development: a step that runs needs neither. To compare whole devices there is the
//! program `wgmoe-bench`.
mod matrix_check;
pub mod profile;
pub mod tune;
