#![doc = include_str!("../README.md")]

mod ffn;
mod op;
mod reference;
mod shared;

pub use ffn::{MoeFfn, MoeTensors};
pub use op::{Place, place};
pub use reference::Reference;
pub use shared::{MoeDevice, Traffic};
pub use wgmoe;
