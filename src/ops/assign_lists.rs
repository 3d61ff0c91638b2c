//! Imports another router's choice into the bit set: the tokens and gates of each expert.
use super::{few_experts, or_nothing};
use crate::device::Kernel;
use crate::device::quirks::{check_loops, offset_iterations};
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::{expect_len, expect_offsets};
use crate::plan::bits;
use crate::{BoundOp, Context, Result, Slice};
use std::sync::Arc;

/// See `shaders/assign_lists.wgsl`.
pub const SPEC: Spec = Spec {
    name: "assign_lists",
    body: include_str!("../../shaders/assign_lists.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("offsets", 8),
        read("list", 4),
        read("weights", 4),
        read("rows", 4),
        write("assigned", 4),
        write("gates", 4),
        write("ignored", 4),
    ],
    variants: || vec![prelude()],
};

params! { tokens: u32, experts: u32, entries: u32, has_rows: u32 }

const LANES: u32 = 64;

fn prelude() -> Prelude {
    Prelude::new("64 lanes an expert")
        .constant("WG", LANES)
        .piece(piece!("common/grid"))
        .piece(piece!("common/offsets"))
}

/// The CPU twin: the bit set, the gates `[tokens, experts]` (0 elsewhere), and how many entries of
/// each expert were ignored. `list` and `weights` are of one length; `offsets` hold one value more
/// than there are experts.
///
/// # Panics
///
/// If there are no `offsets`, or if `weights` are not as many as `list`; the message names the
/// argument.
pub fn cpu(
    offsets: &[u32],
    list: &[u32],
    weights: &[f32],
    tokens: usize,
) -> (Vec<u32>, Vec<f32>, Vec<u32>) {
    let experts = expect_offsets("offsets", offsets.len());
    expect_len("weights", weights.len(), list.len());
    let mut assigned = bits::empty(tokens, experts);
    let mut gates = vec![0.0; tokens * experts];
    let mut ignored = vec![0; experts];
    for (e, range) in super::expert_choice::ranges(offsets, list.len()).into_iter().enumerate() {
        for (&entry, &weight) in list[range.clone()].iter().zip(&weights[range]) {
            let t = entry as usize;
            if t < tokens && !bits::get(&assigned, tokens, e, t) {
                bits::set(&mut assigned, tokens, e, t);
                gates[t * experts + e] = weight;
            } else if entry != u32::MAX {
                ignored[e] += 1;
            }
        }
    }
    (assigned, gates, ignored)
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Tokens; 0 is a no-op.
    pub tokens: u32,
    /// Experts, at most [`MAX_EXPERTS`](crate::routing::MAX_EXPERTS).
    pub experts: u32,
    /// Entries of all lists, empty places included.
    pub entries: u32,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[experts + 1]` u32, read: the entries of each expert. Values that decrease or exceed
    /// `entries` are clamped.
    pub offsets: Slice<'a>,
    /// `[entries]` u32, read: tokens. Out of range or repeated for an expert: ignored and counted;
    /// `u32::MAX`: empty.
    pub list: Slice<'a>,
    /// `[entries]` f32, read: gates.
    pub weights: Slice<'a>,
    /// `[experts, ceil(tokens / 32)]` u32, written whole: the bit set.
    pub assigned: Slice<'a>,
    /// `[tokens, experts]` f32, written at assigned pairs.
    pub gates: Slice<'a>,
    /// `[experts]` u32, written whole: entries ignored.
    pub ignored: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct AssignLists {
    ctx: Context,
    kernel: Arc<Kernel>,
}

impl AssignLists {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        Ok(Self { ctx: ctx.clone(), kernel: ctx.kernel(&SPEC, prelude())? })
    }

    /// Brings lists into the bit set. Without entries the bit set is empty; `list` and `weights`
    /// must hold one all the same.
    ///
    /// # Errors
    ///
    /// Zero or too many experts, on a software driver too many tokens or entries, or a slice that
    /// does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, None)
    }

    /// As [`AssignLists::bind`], for the tokens of a bit set `rows`, `[ceil(tokens / 32)]` u32, read
    /// ([`active_rows`](super::active_rows)): entries of the others are left out, and not counted.
    ///
    /// # Errors
    ///
    /// As [`AssignLists::bind`].
    pub fn bind_active(&self, dims: &Dims, args: Args<'_>, rows: Slice<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, Some(rows))
    }

    pub(crate) fn bind_among(
        &self,
        dims: &Dims,
        args: Args<'_>,
        rows: Option<Slice<'_>>,
    ) -> Result<BoundOp> {
        let Dims { tokens, experts, entries } = *dims;
        few_experts(experts)?;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        // A lane's share of the columns, of the offsets, and of the entries, which may all be one
        // expert's.
        let share = |n: u32| u64::from(n.div_ceil(LANES));
        let iterations = share(tokens.div_ceil(32)) + offset_iterations(experts, LANES);
        check_loops(&self.ctx, "tokens", tokens, iterations)?;
        check_loops(&self.ctx, "entries", entries, iterations + share(entries))?;
        args.offsets.u32s("offsets", &[u64::from(experts) + 1])?;
        args.list.u32s("list", &[entries.max(1).into()])?;
        args.weights.f32s("weights", &[entries.max(1).into()])?;
        args.assigned.u32s("assigned", &[experts.into(), tokens.div_ceil(32).into()])?;
        args.gates.f32s("gates", &[tokens.into(), experts.into()])?;
        args.ignored.u32s("ignored", &[experts.into()])?;
        let Args { offsets, list, weights, assigned, gates, ignored } = args;
        if let Some(rows) = rows {
            rows.u32s("rows", &[tokens.div_ceil(32).into()])?;
        }
        let params = Params { tokens, experts, entries, has_rows: rows.is_some().into() };
        let rows = or_nothing(&self.ctx, rows);
        let slices = [offsets, list, weights, rows, assigned, gates, ignored];
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, experts.into())?.into())
    }
}
