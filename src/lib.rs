#![doc = include_str!("../docs/crate.md")]

pub mod bits;
mod error;
mod exact;
mod gpu;
pub mod kernel;
//LATER pub mod layer;
pub mod ops;
pub mod order;
pub mod plan;
pub mod report;
pub mod routing;
pub mod scaling;
pub mod schedule;
mod slice;
//LATER pub mod weights;

pub use error::{Error, Result};
pub use gpu::Gpu;
pub use kernel::{Context, Dispatch, SPECS, Step, Target, Variant};
//LATER pub use layer::{MoeLayer, Settings};
pub use plan::PlanShape;
pub use routing::{Activation, Score};
pub use slice::Slice;
//LATER pub use weights::{ExpertWeights, WeightType};
pub use wgpu;
