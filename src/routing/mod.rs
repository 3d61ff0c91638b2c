//! Routing rules as plain data: nothing here needs a device.
mod exact;
pub mod order;
mod rules;
pub mod scaling;
pub mod schedule;

pub(crate) use rules::mass_units;
pub use rules::{
    Activation, BlockRule, ExpertChoice, GateRule, Groups, MAX_GROUPS, MAX_TOP, Normalise, Routing,
    Scope, Score, SequenceTop, TokenChoice,
};

use crate::error::not_zero;
use crate::{Error, Result};

/// Experts that one bit-set row of a token can hold, a limit of the kernels' workgroup memory.
pub const MAX_EXPERTS: u32 = 1024;

/// Errors for more experts than the kernels' workgroup memory holds.
pub(crate) fn few_experts(experts: u32) -> Result<()> {
    not_zero(&[("experts", experts)])?;
    let max = MAX_EXPERTS;
    if experts > max {
        Err(Error::invalid("experts", format!("{experts}, at most {max}")))
    } else {
        Ok(())
    }
}
