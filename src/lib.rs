#![doc = include_str!("../docs/crate.md")]

pub mod bits;
mod error;
mod gpu;
pub mod kernel;
//LATER pub mod layer;
pub mod ops;
pub mod order;
pub mod plan;
pub mod routing;
mod slice;
//LATER pub mod weights;

pub use error::{Error, Result};
pub use gpu::Gpu;
pub use kernel::{Context, Dispatch, SPECS, Step, Target, Variant};
//LATER pub use layer::{MoeLayer, Settings};
pub use plan::PlanShape;
pub use routing::{Activation, BlockRule, Score};
pub use slice::Slice;
//LATER pub use weights::{ExpertWeights, WeightType};
pub use wgpu;
