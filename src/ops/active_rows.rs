//! Which tokens of a batch take part in a choice, a bit a token: those that are not padding, and active where the caller
//! says which are. Choices read it to leave the others out.
use super::not_zero;
use crate::device::Kernel;
use crate::device::quirks::check_loops;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::expect_len;
use crate::{BoundOp, Context, Result, Slice};
use std::sync::Arc;

/// See `shaders/active_rows.wgsl`.
pub const SPEC: Spec = Spec {
    name: "active_rows",
    body: include_str!("../../shaders/active_rows.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("offsets", 8),
        read("lengths", 4),
        read("capacity_of", 4),
        read("active_bits", 4),
        write("rows", 4),
        write("capacity", 4),
    ],
    variants: || vec![prelude()],
};

params! { tokens: u32, sequences: u32, has_capacity: u32, has_active: u32, counts: u32 }

/// Lanes of a workgroup, as in the WGSL.
const WG: u64 = 32;

fn prelude() -> Prelude {
    Prelude::new("one lane a word").piece(piece!("common/grid"))
}

/// The CPU twin: the bit set `[ceil(tokens / 32)]` of the tokens that are not padding. `offsets` are
/// `[sequences + 1]` (made monotone and at most `tokens`), `lengths` `[sequences]`.
///
/// ```
/// // Two sequences of 4 tokens, the last token of the first and two of the second are padding.
/// let rows = wgmoe::ops::active_rows::cpu(8, &[0, 4, 8], &[3, 2]);
/// assert_eq!(rows, [0b0011_0111]);
/// ```
///
/// # Panics
///
/// If there are not as many lengths as sequences.
pub fn cpu(tokens: usize, offsets: &[u32], lengths: &[u32]) -> Vec<u32> {
    assert_eq!(offsets.len(), lengths.len() + 1, "`offsets` and `lengths`");
    let mut rows = vec![0u32; tokens.div_ceil(32)];
    for (range, &length) in super::expert_choice::ranges(offsets, tokens).into_iter().zip(lengths) {
        for t in range.take(length as usize) {
            rows[t / 32] |= 1 << (t % 32);
        }
    }
    rows
}

/// The CPU twin where the caller says which tokens are `active`, `[ceil(tokens / 32)]`: those of them that
/// are not padding.
///
/// # Panics
///
/// As [`cpu`], or if `active` is not `ceil(tokens / 32)` long.
pub fn cpu_active(tokens: usize, offsets: &[u32], lengths: &[u32], active: &[u32]) -> Vec<u32> {
    expect_len("active", active.len(), tokens.div_ceil(32));
    cpu(tokens, offsets, lengths).iter().zip(active).map(|(row, active)| row & active).collect()
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Tokens; 0 is a no-op.
    pub tokens: u32,
    /// Sequences.
    pub sequences: u32,
}

/// A value that hangs on how many tokens are not padding: most tokens of an expert.
#[derive(Clone, Copy, Debug)]
pub struct Capacities<'a> {
    /// `[tokens + 1]` u32, read: the capacity for a batch of so many tokens.
    pub capacity_of: Slice<'a>,
    /// `[1]` u32, written: that for the tokens that are not padding.
    pub capacity: Slice<'a>,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[sequences + 1]` u32, read: token ranges. Values that decrease or exceed `tokens` are
    /// clamped; tokens outside all ranges are padding.
    pub offsets: Slice<'a>,
    /// `[sequences]` u32, read: tokens of each that are not padding.
    pub lengths: Slice<'a>,
    /// `[ceil(tokens / 32)]` u32, written whole: bit set of the tokens that are not padding.
    pub rows: Slice<'a>,
    /// A capacity to look up.
    pub capacities: Option<Capacities<'a>>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct ActiveRows {
    ctx: Context,
    kernel: Arc<Kernel>,
}

impl ActiveRows {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        Ok(Self { ctx: ctx.clone(), kernel: ctx.kernel(&SPEC, prelude())? })
    }

    /// Says which tokens are not padding.
    ///
    /// # Errors
    ///
    /// Zero sequences, more than a software driver's loops can pass, or a slice that does not fit
    /// ([`Error`](crate::Error)).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, None)
    }

    /// As [`ActiveRows::bind`], of a bit set `active`, `[ceil(tokens / 32)]` u32, read: the tokens that
    /// are in it and not padding. A capacity takes a second dispatch, which counts them.
    ///
    /// # Errors
    ///
    /// As [`ActiveRows::bind`].
    pub fn bind_active(&self, dims: &Dims, args: Args<'_>, active: Slice<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, Some(active))
    }

    pub(crate) fn bind_among(
        &self,
        dims: &Dims,
        args: Args<'_>,
        active: Option<Slice<'_>>,
    ) -> Result<BoundOp> {
        let Dims { tokens, sequences } = *dims;
        not_zero(&[("sequences", sequences)])?;
        // Lanes that run in step pass different sequences in turn: at most all before their first
        // token, all once more between them, and the one that counts all again.
        check_loops(&self.ctx, "sequences", sequences, 3 * u64::from(sequences) + 32)?;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        let columns = u64::from(tokens.div_ceil(32));
        args.offsets.u32s("offsets", &[u64::from(sequences) + 1])?;
        args.lengths.u32s("lengths", &[sequences.into()])?;
        args.rows.u32s("rows", &[columns])?;
        if let Some(c) = args.capacities {
            c.capacity_of.u32s("capacity_of", &[u64::from(tokens) + 1])?;
            c.capacity.u32s("capacity", &[1])?;
        }
        if let Some(active) = active {
            active.u32s("active", &[columns])?;
            let counting = columns.div_ceil(WG) + WG;
            check_loops(&self.ctx, "tokens", tokens, counting)?;
        }
        let has_capacity = args.capacities.is_some().into();
        // The stand-in is written in the place of `capacity`: it cannot be bound a second time.
        let [capacity_of, capacity] = match args.capacities {
            Some(c) => [c.capacity_of, c.capacity],
            None => [args.lengths, self.ctx.nothing()],
        };
        let has_active = active.is_some().into();
        let active_tokens = active.unwrap_or(args.lengths);
        let Args { offsets, lengths, rows, .. } = args;
        let slices = [offsets, lengths, capacity_of, active_tokens, rows, capacity];
        let params = Params { tokens, sequences, has_capacity, has_active, counts: 0 };
        let groups = (columns + 1).div_ceil(WG);
        let mut step: BoundOp = self.kernel.dispatch(&self.ctx, &params, &slices, groups)?.into();
        if active.is_some() && args.capacities.is_some() {
            let params = Params { counts: 1, ..params };
            step = step.then(self.kernel.dispatch(&self.ctx, &params, &slices, 1)?.into());
        }
        Ok(step)
    }
}
