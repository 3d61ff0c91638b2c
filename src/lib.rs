#![doc = include_str!("../docs/crate.md")]

pub mod bits;
pub mod cache;
#[cfg(feature = "checkpoint")]
pub mod checkpoint;
#[doc = include_str!("../docs/embedding.md")]
pub mod embedding {}
mod error;
mod exact;
mod gpu;
pub mod kernel;
pub mod layer;
pub mod model;
pub mod ops;
pub mod order;
mod pack;
pub mod plan;
pub mod profile;
pub mod report;
pub mod routing;
pub mod scaling;
pub mod schedule;
mod slice;
#[cfg(feature = "checkpoint")]
mod staging;
pub mod tune;
pub mod weights;

pub use cache::{CachedLayer, ExpertSource};
pub use error::{Error, Result};
pub use gpu::Gpu;
pub use kernel::{Context, Dispatch, SPECS, Step, Target, Variant};
pub use layer::{MoeExperts, MoeLayer, MoeRouting, Settings};
pub use plan::PlanShape;
pub use routing::{Activation, BlockRule, Routing, Score};
pub use slice::Slice;
pub use weights::{ExpertWeights, WeightType};
pub use wgpu;
