//! Expert weights: storage types, packing, pages on the device, and uploads.
mod blocks;
mod format;
mod gradients;
mod host;
mod pack;
mod pages;
pub(crate) mod upload;
mod view;

pub use format::{PANEL, WeightType};
pub use gradients::ExpertGradients;
pub use host::HostWeights;
pub(crate) use pages::Page;
pub use pages::{ExpertShape, ExpertTypes, ExpertWeights, Projection};
pub use view::{MatrixView, TileScales};
