//! Routing rules as plain data: nothing here needs a device.
pub(crate) mod check;
mod exact;
mod fewer;
pub mod order;
mod rules;
pub mod scaling;
pub mod schedule;

pub use check::MAX_EXPERTS;
pub(crate) use check::few_experts;
pub(crate) use rules::mass_units;
pub use rules::{
    Activation, BlockRule, ExpertChoice, GateRule, Groups, MAX_GROUPS, MAX_TOP, Normalise, Routing,
    Score, SequenceTop, TokenChoice,
};
