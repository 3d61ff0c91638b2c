//! Known limits of single drivers, each in one place.
use super::Context;
use crate::{Error, Result};

/// Iterations that all loops of an invocation may take together.
///
/// lavapipe (Mesa 22.3) counts them, those of inner loops too, and ends every loop without a word
/// once they are so many: what the kernel writes from there on is wrong. Loops that the driver
/// unrolls do not count. More workgroups or lanes help, another level of loops does not. Ops for
/// software drivers choose a variant with more lanes or workgroups by this limit, and
/// [`check_loops`] where there is none. (Others end a loop after 2^32 iterations at the earliest, as
/// naga's and the browsers' guards against endless loops do.)
pub(crate) const LOOP_ITERATIONS: u64 = 65_535;

/// Fails where the loops of one invocation could take more than [`LOOP_ITERATIONS`], on software
/// drivers alone. `name` and `value` are the argument that makes them so many.
pub(crate) fn check_loops(
    ctx: &Context,
    name: &'static str,
    value: impl Into<u64>,
    iterations: u64,
) -> Result<()> {
    if iterations <= LOOP_ITERATIONS || ctx.info().device_type != wgpu::DeviceType::Cpu {
        return Ok(());
    }
    Err(Error::invalid(
        name,
        format!(
            "{}: one invocation could loop {iterations} times, and software drivers end its loops after \
             {LOOP_ITERATIONS}",
            value.into()
        ),
    ))
}

/// Iterations of `common/offsets`: one lane's share of the offsets, and the first lane's look at
/// what all found.
pub(crate) fn offset_iterations(ranges: u32, lanes: u32) -> u64 {
    u64::from(ranges.div_ceil(lanes)) + u64::from(lanes.min(ranges))
}
