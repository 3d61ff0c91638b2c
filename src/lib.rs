#![doc = include_str!("../docs/crate.md")]

#[cfg(feature = "checkpoint")]
pub mod checkpoint;
pub mod device;
#[doc = include_str!("../docs/embedding.md")]
pub mod embedding {}
mod error;
pub mod headless;
pub mod layer;
pub mod measure;
pub mod models;
pub mod ops;
pub mod plan;
pub mod reference;
pub mod report;
pub mod routing;
pub mod weights;

pub use device::{BoundOp, Context, Dispatch, Slice, Target, Variant};
pub use error::{Error, Result};
pub use headless::Gpu;
pub use layer::cached::{CachedLayer, ExpertSource};
pub use layer::{LayerConfig, MoeExperts, MoeLayer, MoeRouting};
pub use ops::SPECS;
pub use plan::PlanShape;
pub use routing::{Activation, BlockRule, Routing, Score};
pub use weights::{ExpertWeights, WeightType};
pub use wgpu;
