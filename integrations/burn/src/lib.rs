#![doc = include_str!("../README.md")]

mod backward;
mod ffn;
mod learning;
mod op;
mod pack;
mod reference;
mod shared;

pub use ffn::{MoeFfn, MoeTensors, MoeWeights};
pub use op::{Place, place};
pub use reference::Reference;
pub use shared::{MoeDevice, Traffic};
pub use wgmoe;
