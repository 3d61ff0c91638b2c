//! Token choice: each token takes its top `K` experts, within groups and a block's coreset where
//! there are such.
//!
//! Groups: a group's value is the sum of its two highest eligible values, and a group with fewer than two
//! eligible experts is never chosen. Where groups have one expert each, a group's value is that
//! expert's value. One group is the same as no groups.
use super::or_nothing;
use crate::device::Kernel;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::{expect_len, expect_most, expect_rows, expect_some};
use crate::plan::bits;
use crate::routing::{Groups, MAX_EXPERTS, MAX_GROUPS, check, order};
use crate::{BoundOp, Context, Result, Slice, Target, Variant};
use std::sync::Arc;

/// See `shaders/token_choice.wgsl`.
pub const SPEC: Spec =
    Spec {
        name: "token_choice",
        body: include_str!("../../shaders/token_choice.wgsl"),
        params: Params::LAYOUT,
        bindings: &[
            read("values", 4),
            read("coreset", 4),
            read("block_of", 4),
            read("rows", 4),
            read("experts_per_token", 4),
            write("assigned", 4),
        ],
        variants: || {
            Prelude::distinct(Variant::EVERY.into_iter().flat_map(|variant| {
                sizes().map(move |[list, groups]| prelude(variant, list, groups))
            }))
        },
    };

params! { tokens: u32, experts: u32, top: u32, group_count: u32, group_top: u32, blocks: u32, has_rows: u32, has_tops: u32 }

/// How many experts a lane may keep at a time.
const LISTS: [u32; 3] = [4, 8, 16];

/// Experts that a lane keeps at a time, for choices of `top`.
pub(crate) fn list_of(top: u32) -> u32 {
    LISTS.into_iter().find(|&list| top <= list).unwrap_or(LISTS[2])
}

/// Groups that a variant has room for.
pub(crate) fn groups_of(groups: Option<Groups>) -> u32 {
    if groups.is_some() { MAX_GROUPS } else { 1 }
}

/// Every pair of [`list_of`] and [`groups_of`].
pub(crate) fn sizes() -> impl Iterator<Item = [u32; 2]> {
    LISTS.into_iter().flat_map(|list| [1, MAX_GROUPS].map(|groups| [list, groups]))
}

fn prelude(variant: Variant, list: u32, groups: u32) -> Prelude {
    let (label, lanes) = match variant.target {
        Target::Wide => ("eight lanes a token", 8),
        Target::Serial => ("one lane a token", 1),
    };
    let label =
        format!("{label}, {list} experts at a time{}", if groups > 1 { ", groups" } else { "" });
    Prelude::new(label)
        .constant("WG", 32 * lanes)
        .constant("LANES", lanes)
        .constant("LIST", list)
        .constant("GROUPS", groups)
        .constant("MOST", MAX_EXPERTS)
        .piece(piece!("common/grid"))
        .piece(piece!("common/keys"))
        .piece(piece!("common/bits"))
        .piece(piece!("choice/experts_of_token"))
}

/// The coreset of each token's block, on the CPU: `eligible(t, e)`.
pub type Eligible<'a> = &'a dyn Fn(usize, usize) -> bool;

/// The CPU twin: the bit set `[experts, ceil(tokens / 32)]`. `values` is `[tokens, experts]`; `eligible`
/// is asked for every token and expert.
///
/// # Panics
///
/// If `experts` is 0, if `values` are not whole rows of `experts`, if `top` is above `experts`, or if
/// `groups` do not divide `experts` or have more to choose than there are; the message names the
/// argument.
pub fn cpu(
    values: &[f32],
    experts: usize,
    top: usize,
    groups: Option<Groups>,
    eligible: Eligible<'_>,
) -> Vec<u32> {
    let tokens = expect_rows("values", values.len(), "experts", experts);
    cpu_each(values, experts, top, &vec![u32::MAX; tokens], groups, eligible)
}

/// The same where each token takes a number of its own, `experts_per_token` `[tokens]`, but `top` at
/// most.
///
/// # Panics
///
/// As [`cpu`], or if there are not as many `experts_per_token` as tokens.
pub fn cpu_each(
    values: &[f32],
    experts: usize,
    top: usize,
    experts_per_token: &[u32],
    groups: Option<Groups>,
    eligible: Eligible<'_>,
) -> Vec<u32> {
    let tokens = expect_rows("values", values.len(), "experts", experts);
    expect_len("experts_per_token", experts_per_token.len(), tokens);
    expect_most("top", top, experts);
    if let Some(Groups { count, per_token }) = groups {
        expect_some("groups", count as usize);
        assert!(
            experts.is_multiple_of(count as usize),
            "`groups`: {count} groups do not divide {experts} experts"
        );
        expect_most("groups", per_token as usize, count as usize);
    }
    let mut assigned = bits::empty(tokens, experts);
    for t in 0..tokens {
        let row = &values[t * experts..][..experts];
        let mut candidates: Vec<usize> = (0..experts).filter(|&e| eligible(t, e)).collect();
        if let Some(Groups { count, per_token }) = groups.filter(|g| g.count > 1) {
            let size = experts / count as usize;
            // A group's value, where it has as many eligible experts as it needs.
            let value = |g: usize| -> Option<f32> {
                let mine = candidates.iter().copied().filter(|e| e / size == g);
                match order::top(mine, 2, |e| row[e])[..] {
                    [a] if size == 1 => Some(row[a]),
                    [a, b] => Some(row[a] + row[b]),
                    _ => None,
                }
            };
            let valued: Vec<(usize, f32)> =
                (0..count as usize).filter_map(|g| value(g).map(|v| (g, v))).collect();
            let stay: Vec<usize> = order::top(0..valued.len(), per_token as usize, |i| valued[i].1)
                .into_iter()
                .map(|i| valued[i].0)
                .collect();
            candidates.retain(|e| stay.contains(&(e / size)));
        }
        let own = top.min(experts_per_token[t] as usize);
        for e in order::top(candidates, own, |e| row[e]) {
            bits::set(&mut assigned, tokens, e, t);
        }
    }
    assigned
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows of `values`; 0 is a no-op.
    pub tokens: u32,
}

/// Coresets of blocks, for choices inside them.
#[derive(Clone, Copy, Debug)]
pub struct Coresets<'a> {
    /// Blocks.
    pub blocks: u32,
    /// `[blocks, ceil(experts / 32)]` u32, read: bit set of the experts each block elected.
    pub coreset: Slice<'a>,
    /// `[tokens]` u32, read: block of each token; a value of `blocks` or more: none, and no experts.
    pub block_of: Slice<'a>,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, experts]` f32, read: selection values.
    pub values: Slice<'a>,
    /// The experts to choose among; all where absent.
    pub coresets: Option<Coresets<'a>>,
    /// `[tokens]` u32, read: experts of each token, instead of the op's number, which a larger one is
    /// taken for.
    pub experts_per_token: Option<Slice<'a>>,
    /// `[experts, ceil(tokens / 32)]` u32, written whole: the bit set.
    pub assigned: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct TokenChoice {
    ctx: Context,
    experts: u32,
    experts_per_token: u32,
    groups: Option<Groups>,
    kernel: Arc<Kernel>,
}

impl TokenChoice {
    /// Compiles the kernel for choices of this many experts and groups.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for zero or too many experts, `experts_per_token` of 0, above `experts` or
    /// [`MAX_TOP`](crate::routing::MAX_TOP), groups that do not divide the experts, are more than [`MAX_GROUPS`] or too few for K;
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses the kernel.
    pub fn new(
        ctx: &Context,
        experts: u32,
        experts_per_token: u32,
        groups: Option<Groups>,
    ) -> Result<Self> {
        check::token_choice(experts, experts_per_token, groups)?;
        let groups = groups.filter(|g| g.count > 1);
        let of_groups = groups_of(groups);
        let kernel =
            ctx.kernel(&SPEC, prelude(ctx.variant(), list_of(experts_per_token), of_groups))?;
        Ok(Self { ctx: ctx.clone(), experts, experts_per_token, groups, kernel })
    }

    /// Chooses the experts of `tokens` tokens.
    ///
    /// # Errors
    ///
    /// A slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, None)
    }

    /// As [`TokenChoice::bind`], for the tokens of a bit set `rows`, `[ceil(tokens / 32)]` u32, read
    /// ([`active_rows`](super::active_rows)): the others are padding, and take no expert.
    ///
    /// # Errors
    ///
    /// As [`TokenChoice::bind`].
    pub fn bind_active(&self, dims: &Dims, args: Args<'_>, rows: Slice<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, Some(rows))
    }

    pub(crate) fn bind_among(
        &self,
        dims: &Dims,
        args: Args<'_>,
        rows: Option<Slice<'_>>,
    ) -> Result<BoundOp> {
        let Dims { tokens } = *dims;
        let Self { experts, experts_per_token, groups, .. } = *self;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        args.values.f32s("values", &[tokens.into(), experts.into()])?;
        args.assigned.u32s("assigned", &[experts.into(), tokens.div_ceil(32).into()])?;
        if let Some(c) = args.coresets {
            c.coreset.u32s("coreset", &[c.blocks.into(), experts.div_ceil(32).into()])?;
            c.block_of.u32s("block_of", &[tokens.into()])?;
        }
        if let Some(rows) = rows {
            rows.u32s("rows", &[tokens.div_ceil(32).into()])?;
        }
        if let Some(tops) = args.experts_per_token {
            tops.u32s("experts_per_token", &[tokens.into()])?;
        }
        let params = Params {
            tokens,
            experts,
            top: experts_per_token,
            group_count: groups.map_or(1, |g| g.count),
            group_top: groups.map_or(1, |g| g.per_token),
            blocks: args.coresets.map_or(0, |c| c.blocks),
            has_rows: rows.is_some().into(),
            has_tops: args.experts_per_token.is_some().into(),
        };
        let coreset = or_nothing(&self.ctx, args.coresets.map(|c| c.coreset));
        let block_of = or_nothing(&self.ctx, args.coresets.map(|c| c.block_of));
        let rows = or_nothing(&self.ctx, rows);
        let tops = or_nothing(&self.ctx, args.experts_per_token);
        let slices = [args.values, coreset, block_of, rows, tops, args.assigned];
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, tokens.div_ceil(32).into())?.into())
    }
}
