#![doc = include_str!("../docs/crate.md")]

pub mod bits;
mod error;
mod gpu;
pub mod kernel;
pub mod layer;
pub mod model;
pub mod ops;
pub mod order;
pub mod plan;
pub mod profile;
pub mod routing;
mod slice;
pub mod weights;

pub use error::{Error, Result};
pub use gpu::Gpu;
pub use kernel::{Context, Dispatch, SPECS, Step, Target, Variant};
pub use layer::{MoeLayer, Settings};
pub use plan::PlanShape;
pub use routing::{Activation, Routing, Score};
pub use slice::Slice;
pub use weights::{ExpertWeights, WeightType};
pub use wgpu;
