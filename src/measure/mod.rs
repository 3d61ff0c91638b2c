//! Measuring: where a step's time goes, and which variant of the kernels is the fastest on a device.
pub mod profile;
pub mod tune;
