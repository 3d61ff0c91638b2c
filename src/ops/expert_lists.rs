//! The bit set as index lists: the tokens of each expert in token order, for kernels of the caller's
//! own and for other libraries, which take either form:
//!
//! - one list after the other with offsets (CSR): [`ExpertLists::bind`];
//! - a padded table of so many places an expert, with counts: [`ExpertLists::bind_padded`].
//!
//! What finds no room is left out and counted, by expert. The way back is
//! [`assign_lists`](super::assign_lists).
use super::{few_experts, not_zero};
use crate::device::Kernel;
use crate::device::quirks::check_loops;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::expect_len;
use crate::plan::bits;
use crate::{BoundOp, Context, Error, Result, Slice, Target, Variant};
use std::sync::Arc;

/// See `shaders/expert_lists.wgsl`.
pub const SPEC: Spec = Spec {
    name: "expert_lists",
    body: include_str!("../../shaders/expert_lists.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("assigned", 4),
        write("counts", 4),
        write("offsets", 4),
        write("list", 4),
        write("lost", 4),
    ],
    variants: || {
        [Target::Wide, Target::Serial]
            .map(|target| prelude(Variant { target, ..Variant::PORTABLE }))
            .into()
    },
};

params! { tokens: u32, experts: u32, room: u32, round: u32 }

/// What `round` is in the WGSL.
const COUNT: u32 = 0;
const JOIN: u32 = 1;
const PAD: u32 = 2;

fn lanes(target: Target) -> u32 {
    if target == Target::Serial { 32 } else { 256 }
}

/// Iterations of one lane, at most: the words of its stretch twice and all their bits, the counts of
/// experts, and the places it pads.
fn iterations(lanes: u32, dims: &Dims, places: u32) -> u64 {
    let stretch = dims.tokens.div_ceil(32).div_ceil(lanes);
    let once = |n: u32| u64::from(n.div_ceil(lanes));
    34 * u64::from(stretch) + once(dims.experts) + once(places)
}

fn prelude(variant: Variant) -> Prelude {
    let wg = lanes(variant.target);
    Prelude::new(format!("{wg} lanes an expert"))
        .constant("WG", wg)
        .piece(piece!("common/grid"))
        .piece(piece!("common/bits"))
        .piece(piece!("plan/prefix_sums"))
}

/// The CPU twin: the offsets `[experts + 1]`, the tokens `[room]` of all experts one after the other,
/// `u32::MAX` past the last, and how many tokens of each expert found no room `[experts]`.
///
/// # Panics
///
/// If `assigned` is not `experts * ceil(tokens / 32)` long; the message names it.
pub fn cpu(
    assigned: &[u32],
    tokens: usize,
    experts: usize,
    room: usize,
) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    expect_len("assigned", assigned.len(), experts * bits::columns(tokens));
    let (mut offsets, mut list, mut lost) = (vec![0], vec![], vec![]);
    for e in 0..experts {
        let mine = bits::tokens_of(assigned, tokens, e);
        let kept = mine.len().min(room - list.len());
        list.extend(mine[..kept].iter().map(|&t| t as u32));
        offsets.push(list.len() as u32);
        lost.push((mine.len() - kept) as u32);
    }
    list.resize(room, u32::MAX);
    (offsets, list, lost)
}

/// The CPU twin of padded lists: the tokens `[experts, room]`, `u32::MAX` past an expert's last, how
/// many each list holds `[experts]`, and how many tokens of each expert found no room `[experts]`.
///
/// # Panics
///
/// As [`cpu`].
pub fn cpu_padded(
    assigned: &[u32],
    tokens: usize,
    experts: usize,
    room: usize,
) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    expect_len("assigned", assigned.len(), experts * bits::columns(tokens));
    let (mut list, mut counts, mut lost) = (vec![], vec![], vec![]);
    for e in 0..experts {
        let mine = bits::tokens_of(assigned, tokens, e);
        let kept = mine.len().min(room);
        list.extend(mine[..kept].iter().map(|&t| t as u32));
        list.resize((e + 1) * room, u32::MAX);
        counts.push(kept as u32);
        lost.push((mine.len() - kept) as u32);
    }
    (list, counts, lost)
}

/// Sizes of one op.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Tokens; 0 gives empty lists.
    pub tokens: u32,
    /// Experts, at most [`MAX_EXPERTS`](crate::routing::MAX_EXPERTS).
    pub experts: u32,
    /// Places: of the one list ([`ExpertLists::bind`]), or of each expert
    /// ([`ExpertLists::bind_padded`]).
    pub room: u32,
}

/// Buffers of lists one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[experts, ceil(tokens / 32)]` u32, read: the bit set; not looked at for zero tokens.
    pub assigned: Slice<'a>,
    /// `[experts + 1]` u32, written whole: first place of each expert's list, and the end of the last.
    pub offsets: Slice<'a>,
    /// `[room]` u32, written whole: tokens, `u32::MAX` past the last list.
    pub list: Slice<'a>,
    /// `[experts]` u32, written whole: tokens of each expert that found no room.
    pub lost: Slice<'a>,
}

/// Buffers of padded lists.
#[derive(Clone, Copy, Debug)]
pub struct PaddedArgs<'a> {
    /// `[experts, ceil(tokens / 32)]` u32, read: the bit set; not looked at for zero tokens.
    pub assigned: Slice<'a>,
    /// `[experts, room]` u32, written whole: tokens, `u32::MAX` past an expert's last.
    pub list: Slice<'a>,
    /// `[experts]` u32, written whole: tokens in each list.
    pub counts: Slice<'a>,
    /// `[experts]` u32, written whole: tokens of each expert that found no room.
    pub lost: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct ExpertLists {
    ctx: Context,
}

impl ExpertLists {
    /// Compiles the kernel, for few tokens and for many.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        let op = Self { ctx: ctx.clone() };
        for iterations in [0, u64::MAX] {
            op.kernel(ctx.variant().within_loops(iterations))?;
        }
        Ok(op)
    }

    fn kernel(&self, variant: Variant) -> Result<Arc<Kernel>> {
        self.ctx.kernel(&SPEC, prelude(variant))
    }

    /// Lists one after the other: two dispatches.
    ///
    /// # Errors
    ///
    /// Zero or too many experts, no room, 2^32 pairs or more, more tokens or room than a software
    /// driver's loops can take, or a slice that does not fit ([`Error`]).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        let Dims { experts, room, .. } = *dims;
        few_experts(experts)?;
        args.offsets.u32s("offsets", &[u64::from(experts) + 1])?;
        args.list.u32s("list", &[room.into()])?;
        args.lost.u32s("lost", &[experts.into()])?;
        let counts = self.ctx.scratch("counts", u64::from(experts) * 4)?;
        let slices = [(&counts).into(), args.offsets, args.list, args.lost];
        let places = room.div_ceil(experts);
        let count = self.dispatch(dims, COUNT, places, args.assigned, slices)?;
        Ok(count.then(self.dispatch(dims, JOIN, places, args.assigned, slices)?))
    }

    /// Padded lists: one dispatch.
    ///
    /// # Errors
    ///
    /// As [`ExpertLists::bind`].
    pub fn bind_padded(&self, dims: &Dims, args: PaddedArgs<'_>) -> Result<BoundOp> {
        let Dims { experts, room, .. } = *dims;
        few_experts(experts)?;
        args.list.u32s("list", &[experts.into(), room.into()])?;
        args.counts.u32s("counts", &[experts.into()])?;
        args.lost.u32s("lost", &[experts.into()])?;
        let nothing = self.ctx.scratch("no offsets", 16)?;
        let slices = [args.counts, (&nothing).into(), args.list, args.lost];
        self.dispatch(dims, PAD, room, args.assigned, slices)
    }

    fn dispatch(
        &self,
        dims: &Dims,
        round: u32,
        places: u32,
        assigned: Slice<'_>,
        [counts, offsets, list, lost]: [Slice<'_>; 4],
    ) -> Result<BoundOp> {
        let Dims { tokens, experts, room } = *dims;
        not_zero(&[("room", room)])?;
        if tokens.checked_mul(experts).is_none() {
            return Err(Error::invalid(
                "tokens",
                format!("{tokens} of {experts} experts: 2^32 pairs or more"),
            ));
        }
        let fewest = iterations(lanes(Target::Wide), dims, places);
        let (name, most) = if tokens > places { ("tokens", tokens) } else { ("room", room) };
        check_loops(&self.ctx, name, most, fewest)?;
        let mut words = self.ctx.nothing();
        if tokens > 0 {
            assigned.u32s("assigned", &[experts.into(), tokens.div_ceil(32).into()])?;
            words = assigned;
        }
        let variant = self.ctx.variant();
        let kernel =
            self.kernel(variant.within_loops(iterations(lanes(Target::Serial), dims, places)))?;
        let params = Params { tokens, experts, room, round };
        let slices = [words, counts, offsets, list, lost];
        Ok(kernel.dispatch(&self.ctx, &params, &slices, experts.into())?.into())
    }
}
