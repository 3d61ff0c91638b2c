//! Expert parallelism for [wgmoe] on MPI: layers whose experts lie on several ranks.
#![doc = include_str!("../README.md")]
mod batch;
mod bound;
pub mod cluster;
mod error;
mod exchange;
mod layer;
mod owner;
mod route;
mod shared;
mod split;
mod step;
mod wire;
mod world;

pub use batch::{Batch, Options, Sequences};
pub use bound::BoundParallel;
pub use error::{Error, Result};
pub use exchange::{Exchange, Part, Staged};
pub use layer::{ExpertParallel, RankWeights};
pub use mpi;
pub use split::Split;
pub use step::{Step, Times};
pub use wgmoe;
pub use world::{LIMIT, World};
