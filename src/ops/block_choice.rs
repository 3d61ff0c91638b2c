//! One block of tokens, or a few small ones, decoded at once: each token's own choice, the election and the choice inside
//! the coresets in one dispatch. It gives what [`token_choice`], [`coreset`] and
//! [`token_choice`] give one after the other, whose CPU twins are its own.
use super::coreset::rule_number;
use super::token_choice::{groups_of, list_of, sizes};
use super::{coreset, not_zero, or_nothing, token_choice};
use crate::device::Kernel;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::routing::{BlockRule, Groups, check};
use crate::{BoundOp, Context, Error, Result, Slice, Target};
use std::sync::Arc;

/// See `shaders/block_choice.wgsl`.
pub const SPEC: Spec = Spec {
    name: "block_choice",
    body: include_str!("../../shaders/block_choice.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("values", 4),
        read("offsets", 8),
        read("voters", 4),
        write("assigned", 4),
        write("members", 4),
    ],
    variants: || {
        let mut all = vec![];
        for target in Target::ALL {
            for rule in coreset::RULES {
                all.extend(sizes().map(|[list, groups]| prelude(target, rule, list, groups)));
            }
        }
        all
    },
};

params! {
    tokens: u32, experts: u32, blocks: u32, own_top: u32, top: u32, group_count: u32, group_top: u32, count: u32, mass: u32,
    has_voters: u32,
}

/// Most tokens: a column of the bit set.
pub const MAX_TOKENS: u32 = 32;
/// Most experts, by workgroup memory.
pub const MAX_EXPERTS: u32 = 384;
/// Most blocks: the loops of one lane go over the experts and tokens of each in turn, and software drivers limit their iterations
/// (`LOOP_ITERATIONS` in `device/quirks.rs`).
pub const MAX_BLOCKS: u32 = 8;

fn prelude(target: Target, rule: &'static str, list: u32, groups: u32) -> Prelude {
    // A software driver's barriers cost by the lane.
    let (wg, lanes) = match target {
        Target::Wide => (256, 8),
        Target::Serial => (8, 1),
    };
    let groups_too = if groups > 1 { ", groups" } else { "" };
    Prelude::new(format!("{rule}, {wg} lanes, {list} experts at a time{groups_too}"))
        .constant("WG", wg)
        .constant("LANES", lanes)
        .constant("LIST", list)
        .constant("GROUPS", groups)
        .constant("MOST", MAX_EXPERTS)
        .constant("RULE", rule_number(rule))
        .piece(piece!("common/grid"))
        .piece(piece!("common/keys"))
        .piece(piece!("common/offsets"))
        .piece(piece!("common/bits"))
        .piece(piece!("election/u64"))
        .piece(piece!("election/votes"))
        .piece(piece!("election/elect"))
        .piece(piece!("choice/experts_of_token"))
}

/// The CPU twin: the bit set `[experts, ceil(tokens / 32)]` and the coresets
/// `[blocks, ceil(experts / 32)]`, of any number of tokens. `values` is `[tokens, experts]`, `offsets`
/// `[blocks + 1]`, `voters` `[tokens]`. It is the twins of [`token_choice`],
/// [`coreset`] and [`token_choice`] one after the other.
///
/// # Panics
///
/// As theirs; the message names the argument.
pub fn cpu(
    rule: BlockRule,
    values: &[f32],
    experts: usize,
    top: usize,
    groups: Option<Groups>,
    offsets: &[u32],
    voters: Option<&[u32]>,
) -> (Vec<u32>, Vec<u32>) {
    let own = rule
        .own_top(top as u32)
        .map(|top| token_choice::cpu(values, experts, top as usize, None, &|_, _| true));
    let own = own.unwrap_or_default();
    let (members, block_of) = coreset::cpu(rule, values, experts, &own, offsets, voters);
    let eligible = |t: usize, e: usize| {
        let row = block_of[t] as usize * experts.div_ceil(32);
        block_of[t] != u32::MAX && members[row + e / 32] >> (e % 32) & 1 == 1
    };
    (token_choice::cpu(values, experts, top, groups, &eligible), members)
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows of `values`, at most [`MAX_TOKENS`]; 0 is a no-op.
    pub tokens: u32,
    /// Blocks, at most [`MAX_BLOCKS`].
    pub blocks: u32,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, experts]` f32, read: selection values.
    pub values: Slice<'a>,
    /// `[blocks + 1]` u32, read: token ranges. Values that decrease or exceed `tokens` are clamped.
    pub offsets: Slice<'a>,
    /// `[tokens]` u32, read: tokens with 0 have no say, as for [`coreset`].
    pub voters: Option<Slice<'a>>,
    /// `[experts]` u32, written whole: the bit set.
    pub assigned: Slice<'a>,
    /// `[blocks, ceil(experts / 32)]` u32, written whole: bit set of the experts elected.
    pub members: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct BlockChoice {
    ctx: Context,
    experts: u32,
    rule: BlockRule,
    top: u32,
    groups: Option<Groups>,
    kernel: Arc<Kernel>,
}

impl BlockChoice {
    /// Compiles the kernel of a rule, for choices of `experts_per_token` experts.
    ///
    /// # Errors
    ///
    /// As [`TokenChoice::new`](super::token_choice::TokenChoice::new) and [`Coreset::new`](coreset::Coreset::new); [`Error::Invalid`] for more than [`MAX_EXPERTS`]
    /// experts.
    pub fn new(
        ctx: &Context,
        experts: u32,
        rule: BlockRule,
        experts_per_token: u32,
        groups: Option<Groups>,
    ) -> Result<Self> {
        if experts > MAX_EXPERTS {
            return Err(Error::invalid("experts", format!("{experts}, at most {MAX_EXPERTS}")));
        }
        check::token_choice(experts, experts_per_token, groups)?;
        rule.check(experts)?;
        let groups = groups.filter(|g| g.count > 1);
        let top = experts_per_token;
        let list = list_of(top.max(rule.own_top(top).unwrap_or(0)));
        let target = ctx.variant().target;
        let of_groups = groups_of(groups);
        let kernel =
            ctx.kernel(&SPEC, prelude(target, coreset::rule_name(rule), list, of_groups))?;
        Ok(Self { ctx: ctx.clone(), experts, rule, top, groups, kernel })
    }

    /// Whether one dispatch can do a batch of this many tokens and blocks.
    pub fn fits(dims: Dims) -> bool {
        dims.tokens <= MAX_TOKENS && dims.blocks <= MAX_BLOCKS
    }

    /// Elects the coresets of blocks, and chooses the experts of tokens inside them.
    ///
    /// # Errors
    ///
    /// Zero or too many blocks, too many tokens, or a slice that does not fit ([`Error`]).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        let Dims { tokens, blocks } = *dims;
        let experts = self.experts;
        not_zero(&[("blocks", blocks)])?;
        if !Self::fits(*dims) {
            let reason = format!("{dims:?}, at most {MAX_TOKENS} tokens and {MAX_BLOCKS} blocks");
            return Err(Error::invalid("dims", reason));
        }
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        args.values.f32s("values", &[tokens.into(), experts.into()])?;
        args.offsets.u32s("offsets", &[u64::from(blocks) + 1])?;
        if let Some(voters) = args.voters {
            voters.u32s("voters", &[tokens.into()])?;
        }
        args.assigned.u32s("assigned", &[experts.into()])?;
        args.members.u32s("members", &[blocks.into(), experts.div_ceil(32).into()])?;
        let (count, mass) = self.rule.count_and_mass();
        let params = Params {
            tokens,
            experts,
            blocks,
            own_top: self.rule.own_top(self.top).unwrap_or(0),
            top: self.top,
            group_count: self.groups.map_or(1, |g| g.count),
            group_top: self.groups.map_or(1, |g| g.per_token),
            count,
            mass,
            has_voters: args.voters.is_some().into(),
        };
        let voters = or_nothing(&self.ctx, args.voters);
        let slices = [args.values, args.offsets, voters, args.assigned, args.members];
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, 1)?.into())
    }
}
