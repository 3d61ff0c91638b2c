//! The experts that each block of tokens elects, for its tokens to choose among (dMoE, arXiv 2605.30876;
//! DES, arXiv 2602.00879; OEA, arXiv 2511.02237; TEAM, arXiv 2602.08404; LLaDA2.2).
use super::{few_experts, not_zero, or_nothing};
use crate::device::Kernel;
use crate::device::quirks::{LOOP_ITERATIONS, check_loops, offset_iterations};
use crate::device::shader::{Prelude, Spec, params, piece, read, read_uniform, write};
use crate::error::{expect_len, expect_offsets, expect_rows};
use crate::plan::bits;
use crate::routing::order;
use crate::routing::{BlockRule, MAX_EXPERTS, mass_units};
use crate::{BoundOp, Context, Error, Result, Slice, Target};
use std::sync::Arc;

/// See `shaders/coreset.wgsl`.
pub const SPEC: Spec = Spec {
    name: "coreset",
    body: include_str!("../../shaders/coreset.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("values", 4),
        read("own_choice", 4),
        read("offsets", 8),
        read("voters", 4),
        read("rows", 4),
        read_uniform("refresh", 4),
        write("members", 4),
        write("block_of", 4),
    ],
    variants: || {
        LANES.into_iter().flat_map(|n| BlockRule::NAMES.map(|rule| prelude(n, rule))).collect()
    },
};

params! { tokens: u32, experts: u32, blocks: u32, count: u32, mass: u32, has_voters: u32, has_rows: u32, has_refresh: u32 }

/// Tokens of a block that have a say in its coreset, from its first on; the others choose inside it like all.
pub const MAX_BLOCK: u32 = 1024;

/// Lanes of a block: few, since a software driver's barriers cost by the lane, or more, to share out loops.
const LANES: [u32; 3] = [8, 32, 256];

/// Lanes for these sizes.
fn lanes(target: Target, experts: u32, dims: Dims) -> u32 {
    // The votes of a lane's experts may take half of the iterations that there are; 256 experts do with 8 lanes.
    let votes = |lanes: &u32| u64::from(experts.div_ceil(*lanes) * MAX_BLOCK);
    LANES
        .into_iter()
        .filter(|_| target == Target::Serial)
        .filter(|lanes| 2 * votes(lanes) <= LOOP_ITERATIONS + 1)
        .find(|&lanes| iterations(lanes, experts, dims) <= LOOP_ITERATIONS)
        .unwrap_or(LANES[2])
}

/// Iterations of one lane: the offsets, the tokens that it says the block of, and the election.
fn iterations(lanes: u32, experts: u32, dims: Dims) -> u64 {
    let experts = u64::from(experts.div_ceil(lanes));
    // The words of a block's tokens, and their votes.
    let votes = experts * (1 + 33 + u64::from(MAX_BLOCK));
    // The search for the last key: 64 bits, each with a look at the experts and a sum over lanes.
    let search = 64 * (1 + experts + 32);
    // The bits of the electors, if few lanes make them, and of the elected.
    let bits = 33u64.div_ceil(lanes.into()) * 33 + 32u64.div_ceil(lanes.into()) * 97;
    let tokens = u64::from(dims.tokens.div_ceil(lanes)) + 2;
    offset_iterations(dims.blocks, lanes) + tokens + votes + search + bits
}

/// The numbers of the rules, and that of the one to elect by, in front of `election/elect`.
pub(super) fn with_rule(prelude: Prelude, rule: &str) -> Prelude {
    let numbers = || (1..).zip(BlockRule::NAMES);
    let prelude = numbers().fold(prelude, |all, (n, name)| all.constant(&name.to_uppercase(), n));
    let number = numbers().find(|&(_, name)| name == rule).map(|(n, _)| n);
    prelude.constant("RULE", number.expect("a name of a rule"))
}

fn prelude(lanes: u32, rule: &'static str) -> Prelude {
    let prelude = Prelude::new(format!("{rule}, {lanes} lanes a block"))
        .constant("WG", lanes)
        .constant("MOST", MAX_EXPERTS);
    with_rule(prelude, rule)
        .piece(piece!("common/grid"))
        .piece(piece!("common/keys"))
        .piece(piece!("common/offsets"))
        .piece(piece!("common/bits"))
        .piece(piece!("election/u64"))
        .piece(piece!("election/votes"))
        .piece(piece!("election/elect"))
}

/// What a score counts as a vote, in units of 2^-24: clamped to +-2047, half to even, NaN 0.
pub fn vote(values: f32) -> i64 {
    if values.is_nan() {
        0
    } else {
        (f64::from(values).clamp(-2047.0, 2047.0) * f64::from(1 << 24)).round_ties_even() as i64
    }
}

/// Whether an expert lies in the coreset of a token's block, by what [`cpu`] returns.
pub(crate) fn is_inside(
    (members, block_of): (&[u32], &[u32]),
    experts: usize,
    token: usize,
    expert: usize,
) -> bool {
    let row = block_of[token] as usize * experts.div_ceil(32);
    block_of[token] != u32::MAX && members[row + expert / 32] >> (expert % 32) & 1 == 1
}

/// The CPU twin: the coresets `[blocks, ceil(experts / 32)]` and the block of each token (`u32::MAX`: none). `values` is
/// `[tokens, experts]`; `own` the bit set `[experts, ceil(tokens / 32)]` of each token's own choice over all experts, of
/// [`BlockRule::own_top`] experts, unread where that is `None`; `offsets` `[blocks + 1]`; `voters` `[tokens]`.
///
/// # Panics
///
/// If `experts` is 0, if the rule's numbers do not fit `experts` ([`BlockRule::check`]), if `values` are not
/// whole rows of `experts`, if `own_choice` is read and not `experts * ceil(tokens / 32)` long, if there are
/// no `offsets`, or if `voters` are not one a token; the message names the argument.
pub fn cpu(
    rule: BlockRule,
    values: &[f32],
    experts: usize,
    own_choice: &[u32],
    offsets: &[u32],
    voters: Option<&[u32]>,
) -> (Vec<u32>, Vec<u32>) {
    let tokens = expect_rows("values", values.len(), "experts", experts);
    if let Err(error) = rule.check(experts as u32) {
        panic!("{error}");
    }
    if rule.own_top(1).is_some() {
        expect_len("own_choice", own_choice.len(), experts * bits::columns(tokens));
    }
    expect_offsets("offsets", offsets.len());
    if let Some(voters) = voters {
        expect_len("voters", voters.len(), tokens);
    }
    let mut members = vec![];
    let mut block_of = vec![u32::MAX; tokens];
    for (block, range) in super::expert_choice::ranges(offsets, tokens).into_iter().enumerate() {
        block_of[range.clone()].fill(block as u32);
        let voters: Vec<usize> = range
            .clone()
            .take(MAX_BLOCK as usize)
            .filter(|&t| voters.is_none_or(|m| m[t] != 0))
            .collect();
        let chosen: Vec<usize> = if range.is_empty() {
            vec![]
        } else if voters.is_empty() {
            (0..experts).collect()
        } else {
            elect(rule, values, experts, &voters, |e, t| bits::get(own_choice, tokens, e, t))
        };
        let mut row = vec![0u32; experts.div_ceil(32)];
        for e in chosen {
            row[e / 32] |= 1 << (e % 32);
        }
        members.extend(row);
    }
    (members, block_of)
}

/// The coreset that these tokens elect.
fn elect(
    rule: BlockRule,
    values: &[f32],
    experts: usize,
    voters: &[usize],
    own_choice: impl Fn(usize, usize) -> bool,
) -> Vec<usize> {
    let has_vote = |e: usize| voters.iter().any(|&t| own_choice(e, t));
    let votes = || -> Vec<i64> {
        let of = |e: usize| {
            voters
                .iter()
                .filter(|&&t| own_choice(e, t))
                .map(|&t| vote(values[t * experts + e]))
                .sum()
        };
        (0..experts).map(of).collect()
    };
    // Highest first, ties to the lower expert: the sort is stable.
    let ranked = |votes: &[i64]| -> Vec<usize> {
        let mut all: Vec<usize> = (0..experts).collect();
        all.sort_by_key(|&e| std::cmp::Reverse(votes[e]));
        all
    };
    match rule {
        BlockRule::Union(_) => (0..experts).filter(|&e| has_vote(e)).collect(),
        BlockRule::Capacity(count) => {
            let best = |e: usize| {
                let column = voters.iter().map(|&t| values[t * experts + e]);
                column.min_by(|&a, &b| order::descending(a, b)).unwrap_or(f32::NAN)
            };
            order::top(0..experts, count as usize, best)
        }
        BlockRule::Vote(count) => {
            let mut all = ranked(&votes());
            all.truncate(count as usize);
            all
        }
        BlockRule::Mass { p, floor } => {
            let floor = floor.max(1) as usize;
            let units = i128::from(mass_units(p));
            if units >= 1 << 24 {
                let (mut chosen, others): (Vec<usize>, Vec<usize>) =
                    (0..experts).partition(|&e| has_vote(e));
                let missing = floor.saturating_sub(chosen.len());
                chosen.extend(others.into_iter().take(missing));
                return chosen;
            }
            let votes = votes();
            let whole: i128 = votes.iter().map(|&v| i128::from(v)).sum();
            let all = ranked(&votes);
            let mut chosen = vec![];
            let mut sum = 0i128;
            for &e in &all {
                // Past the mass, and past the floor.
                if (whole <= 0 || sum << 24 > units * whole) && chosen.len() >= floor {
                    break;
                }
                chosen.push(e);
                sum += i128::from(votes[e]);
            }
            chosen
        }
    }
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows of `values`; 0 is a no-op.
    pub tokens: u32,
    /// Blocks.
    pub blocks: u32,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, experts]` f32, read: selection values.
    pub values: Slice<'a>,
    /// `[experts, ceil(tokens / 32)]` u32, read: bit set of each token's own choice over all experts, without groups, of
    /// [`BlockRule::own_top`] experts; absent where that is `None`.
    pub own_choice: Option<Slice<'a>>,
    /// `[blocks + 1]` u32, read: token ranges. Values that decrease or exceed `tokens` are clamped.
    pub offsets: Slice<'a>,
    /// `[tokens]` u32, read: tokens with 0 have no say, and a block where no token has one elects all experts (TEAM); all
    /// have one where absent.
    pub voters: Option<Slice<'a>>,
    /// `[blocks]` u32, read: a block with 0 elects nothing, and what `members` holds for it stays; all
    /// elect where absent.
    pub refresh: Option<Slice<'a>>,
    /// `[blocks, ceil(experts / 32)]` u32, written whole: bit set of the experts elected.
    pub members: Slice<'a>,
    /// `[tokens]` u32, written whole: block of each token, `u32::MAX` for tokens outside all blocks.
    pub block_of: Slice<'a>,
}

/// Checks the slices of an election, which the fused kernel has too.
pub(super) fn check_election(
    [tokens, experts, blocks]: [u32; 3],
    [values, offsets, members]: [Slice<'_>; 3],
    voters: Option<Slice<'_>>,
) -> Result<()> {
    values.f32s("values", &[tokens.into(), experts.into()])?;
    offsets.u32s("offsets", &[u64::from(blocks) + 1])?;
    if let Some(voters) = voters {
        voters.u32s("voters", &[tokens.into()])?;
    }
    members.u32s("members", &[blocks.into(), experts.div_ceil(32).into()])
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct Coreset {
    ctx: Context,
    rule: BlockRule,
    experts: u32,
}

impl Coreset {
    /// Compiles the kernel of a rule; [`Coreset::bind`] compiles another one where a software driver needs it for very many
    /// tokens.
    ///
    /// # Errors
    ///
    /// As [`BlockRule::check`]; [`Error::Invalid`] for zero or too many experts; [`Error::Device`] where wgpu refuses it.
    pub fn new(ctx: &Context, experts: u32, rule: BlockRule) -> Result<Self> {
        few_experts(experts)?;
        rule.check(experts)?;
        let op = Self { ctx: ctx.clone(), rule, experts };
        op.kernel(Dims { tokens: 1, blocks: 1 })?;
        Ok(op)
    }

    /// The kernel for these sizes, and the iterations of its loops.
    fn kernel(&self, dims: Dims) -> Result<(Arc<Kernel>, u64)> {
        let lanes = lanes(self.ctx.variant().target, self.experts, dims);
        let kernel = self.ctx.kernel(&SPEC, prelude(lanes, self.rule.name()))?;
        Ok((kernel, iterations(lanes, self.experts, dims)))
    }

    /// Elects the coresets of blocks.
    ///
    /// # Errors
    ///
    /// Zero blocks, or a slice that is missing or does not fit ([`Error`]).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, None)
    }

    /// As [`Coreset::bind`], for the tokens of a bit set `rows`, `[ceil(tokens / 32)]` u32, read
    /// ([`active_rows`](super::active_rows)): the others are padding, and have no say. A block of
    /// padding alone is an empty one: it elects no expert.
    ///
    /// # Errors
    ///
    /// As [`Coreset::bind`].
    pub fn bind_active(&self, dims: &Dims, args: Args<'_>, rows: Slice<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, Some(rows))
    }

    pub(crate) fn bind_among(
        &self,
        dims: &Dims,
        args: Args<'_>,
        rows: Option<Slice<'_>>,
    ) -> Result<BoundOp> {
        let Dims { tokens, blocks } = *dims;
        let experts = self.experts;
        not_zero(&[("blocks", blocks)])?;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        let (kernel, iterations) = self.kernel(*dims)?;
        check_loops(&self.ctx, "tokens", tokens, iterations)?;
        let slices = [args.values, args.offsets, args.members];
        check_election([tokens, experts, blocks], slices, args.voters)?;
        if let Some(own_choice) = args.own_choice {
            own_choice.u32s("own_choice", &[experts.into(), tokens.div_ceil(32).into()])?;
        } else if self.rule.own_top(1).is_some() {
            return Err(Error::invalid(
                "own_choice",
                format!("{:?} needs each token's own choice", self.rule),
            ));
        }
        if let Some(rows) = rows {
            rows.u32s("rows", &[tokens.div_ceil(32).into()])?;
        }
        args.block_of.u32s("block_of", &[tokens.into()])?;
        if let Some(refresh) = args.refresh {
            refresh.u32s("refresh", &[blocks.into()])?;
        }
        let (count, mass) = self.rule.count_and_mass();
        let params = Params {
            tokens,
            experts,
            blocks,
            count,
            mass,
            has_voters: args.voters.is_some().into(),
            has_rows: rows.is_some().into(),
            has_refresh: args.refresh.is_some().into(),
        };
        let own_choice = or_nothing(&self.ctx, args.own_choice);
        let voters = or_nothing(&self.ctx, args.voters);
        let rows = or_nothing(&self.ctx, rows);
        let refresh = or_nothing(&self.ctx, args.refresh);
        let Args { values, offsets, members, block_of, .. } = args;
        let slices = [values, own_choice, offsets, voters, rows, refresh, members, block_of];
        Ok(kernel.dispatch(&self.ctx, &params, &slices, blocks.into())?.into())
    }
}
