//! One block of tokens, or a few small ones, decoded at once: each token's own choice, the election
//! and the choice inside the coresets in one dispatch. It gives what [`token_choice`], [`coreset`]
//! and [`token_choice`] give one after the other, whose CPU twins are its own.
use super::token_choice::{groups_of, list_of, sizes};
use super::{coreset, not_zero, or_nothing, token_choice};
use crate::device::Kernel;
use crate::device::quirks::{LOOP_ITERATIONS, offset_iterations};
use crate::device::shader::{Prelude, Spec, params, piece, read, read_uniform, write};
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
        read("experts_per_token", 4),
        read_uniform("refresh", 4),
        read("rows", 4),
        write("assigned", 4),
        write("members", 4),
    ],
    variants: || {
        let mut all = vec![];
        for target in Target::ALL {
            for rule in BlockRule::NAMES {
                all.extend(sizes().map(|[list, groups]| prelude(target, rule, list, groups)));
            }
        }
        all
    },
};

params! {
    tokens: u32, experts: u32, blocks: u32, own_top: u32, top: u32, group_count: u32, group_top: u32,
    count: u32, mass: u32, has_voters: u32, has_tops: u32, has_refresh: u32, has_rows: u32,
}

/// Most tokens: a column of the bit set.
pub const MAX_TOKENS: u32 = 32;
/// Most experts, by workgroup memory.
pub const MAX_EXPERTS: u32 = 384;
/// Most blocks: one workgroup goes over them in turn, so that for more small ones the three kernels
/// are the better choice. Choices of very many experts may have room for fewer: see
/// [`BlockChoice::max_blocks`].
pub const MAX_BLOCKS: u32 = 8;

/// Lanes of the workgroup, and of a token. A software driver's barriers cost by the lane.
fn lanes(target: Target) -> [u32; 2] {
    match target {
        Target::Wide => [256, 8],
        Target::Serial => [8, 1],
    }
}

/// The numbers that the kernel's loops go by.
#[derive(Clone, Copy)]
struct Loops {
    target: Target,
    experts: u32,
    /// Of each token's own choice; 0: none.
    own_top: u32,
    top: u32,
    /// Groups that tokens choose first; 1: none.
    groups: u32,
}

impl Loops {
    /// Iterations of one lane for so many blocks, at most, whatever the values: every rule may
    /// elect every expert.
    fn iterations(self, blocks: u32) -> u64 {
        let Self { target, experts, own_top, top, .. } = self;
        let [wg, lanes] = lanes(target);
        let (mine, chunks) = (each(experts, wg), each(experts, 32));
        // Tokens that choose at a time, of one block. Blocks share no token, but two neighbours may
        // share the tokens of a turn.
        let turns = u64::from(MAX_TOKENS * lanes / wg);
        let tokens = (turns + u64::from(blocks.saturating_sub(1))).min(MAX_TOKENS.into());
        let own = if own_top > 0 { turns * (1 + self.choice(own_top, 1)) } else { 0 };
        let inside = tokens * (1 + self.group_choice() + self.choice(top, self.groups));
        // Each token's vote for each of a lane's experts, in one block; words set up and written.
        let votes = mine * u64::from(MAX_TOKENS) + 2 * mine;

        // A total over lanes, and the search for the last key: 64 bits, each with a look at the
        // experts and a total.
        let total = u64::from(wg.min(16) + wg / 16);
        let search = 65 * (1 + mine + total);
        // The marks of a word; the experts, with a loop over one word; two totals and the part of
        // one; those that share the last key.
        let election = 36 + 2 * mine + 2 * total + 24 + search + u64::from(experts);
        // The bits of the elected, those of the chunks before, and their places.
        let elected = each(experts.div_ceil(32), wg) * (33 + chunks + 34);
        let block = offset_iterations(blocks, wg) + election + elected + chunks + mine + 1;
        own + inside + votes + u64::from(blocks) * block
    }

    /// Of one token's choice of `top` experts: passes over the experts, `LIST` at a time, and what
    /// the lanes of a token show each other.
    fn choice(self, top: u32, groups: u32) -> u64 {
        let [_, lanes] = lanes(self.target);
        let chunks = each(self.experts, 32);
        // A chunk reaches into one group more than it holds whole.
        let words = 2 * chunks + u64::from(groups);
        let shown = if lanes > 1 { u64::from(top) * u64::from(1 + lanes) } else { 0 };
        each(top, list_of(self.top.max(self.own_top))) * (1 + words + each(self.experts, lanes))
            + shown
    }

    /// Of one token's choice of groups: the experts of each, and its rank.
    fn group_choice(self) -> u64 {
        if self.groups <= 1 {
            return 0;
        }
        let [_, lanes] = lanes(self.target);
        let size = self.experts / self.groups;
        let words = each(size, 32) + 2;
        each(self.groups, lanes) * (1 + words + u64::from(size) + 1 + u64::from(self.groups))
    }

    /// Most blocks whose loops stay within what software drivers allow.
    fn max_blocks(self) -> u32 {
        let fits = |blocks: &u32| self.iterations(*blocks) <= LOOP_ITERATIONS;
        (1..=MAX_BLOCKS).rev().find(fits).unwrap_or(0)
    }
}

/// Items of one lane, or turns, where `lanes` share `items`.
fn each(items: u32, lanes: u32) -> u64 {
    items.div_ceil(lanes).into()
}

fn prelude(target: Target, rule: &'static str, list: u32, groups: u32) -> Prelude {
    let [wg, lanes] = lanes(target);
    let groups_too = if groups > 1 { ", groups" } else { "" };
    let prelude = Prelude::new(format!("{rule}, {wg} lanes, {list} experts at a time{groups_too}"))
        .constant("WG", wg)
        .constant("LANES", lanes)
        .constant("LIST", list)
        .constant("GROUPS", groups)
        .constant("MOST", MAX_EXPERTS);
    coreset::with_rule(prelude, rule)
        .piece(piece!("common/grid"))
        .piece(piece!("common/keys"))
        .piece(piece!("common/offsets"))
        .piece(piece!("common/bits"))
        .piece(piece!("election/u64"))
        .piece(piece!("election/votes"))
        .piece(piece!("election/elect"))
        .piece(piece!("choice/experts_of_token"))
}

/// The CPU twin: the bit set `[experts, ceil(tokens / 32)]` and the coresets `[blocks, ceil(experts
/// / 32)]`, of any number of tokens. `values` is `[tokens, experts]`, `offsets` `[blocks + 1]`,
/// `voters` `[tokens]`. It is the twins of [`token_choice`], [`coreset`] and [`token_choice`] one
/// after the other.
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
    let inside = |t, e| coreset::is_inside((&members, &block_of), experts, t, e);
    (token_choice::cpu(values, experts, top, groups, &inside), members)
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows of `values`, at most [`MAX_TOKENS`]; 0 is a no-op.
    pub tokens: u32,
    /// Blocks, at most [`BlockChoice::max_blocks`].
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
    /// `[tokens]` u32, read: experts that each token takes inside, instead of the op's number, which a
    /// larger one is taken for.
    pub experts_per_token: Option<Slice<'a>>,
    /// `[blocks]` u32, read: a block with 0 elects nothing, and what `members` holds for it stays; all
    /// elect where absent.
    pub refresh: Option<Slice<'a>>,
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
    max_blocks: u32,
    kernel: Arc<Kernel>,
}

impl BlockChoice {
    /// Compiles the kernel of a rule, for choices of `experts_per_token` experts.
    ///
    /// # Errors
    ///
    /// As [`TokenChoice::new`](super::token_choice::TokenChoice::new) and
    /// [`Coreset::new`](coreset::Coreset::new); [`Error::Invalid`] for more than [`MAX_EXPERTS`]
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
        let own_top = rule.own_top(top).unwrap_or(0);
        let list = list_of(top.max(own_top));
        let target = ctx.variant().target;
        let of_groups = groups_of(groups);
        let kernel = ctx.kernel(&SPEC, prelude(target, rule.name(), list, of_groups))?;
        let loops = Loops { target, experts, own_top, top, groups: groups.map_or(1, |g| g.count) };
        let max_blocks = loops.max_blocks();
        Ok(Self { ctx: ctx.clone(), experts, rule, top, groups, max_blocks, kernel })
    }

    /// Most blocks of one dispatch: [`MAX_BLOCKS`], or as many as one lane's loops can go over on a
    /// software driver. That is the same on every device, so that layers record the same work.
    pub fn max_blocks(&self) -> u32 {
        self.max_blocks
    }

    /// Whether one dispatch can do a batch of this many tokens and blocks.
    pub fn fits(&self, dims: Dims) -> bool {
        dims.tokens <= MAX_TOKENS && dims.blocks <= self.max_blocks
    }

    /// Elects the coresets of blocks, and chooses the experts of tokens inside them.
    ///
    /// # Errors
    ///
    /// Zero or too many blocks, too many tokens, or a slice that does not fit ([`Error`]).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, None)
    }

    /// As [`BlockChoice::bind`], for the tokens of a bit set `rows`, `[1]` u32, read
    /// ([`active_rows`](super::active_rows)): the others have no say and take no expert.
    ///
    /// # Errors
    ///
    /// As [`BlockChoice::bind`].
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
        for (name, got, most) in
            [("tokens", tokens, MAX_TOKENS), ("blocks", blocks, self.max_blocks)]
        {
            if got > most {
                return Err(Error::invalid(name, format!("{got}, at most {most}")));
            }
        }
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        let slices = [args.values, args.offsets, args.members];
        coreset::check_election([tokens, experts, blocks], slices, args.voters)?;
        args.assigned.u32s("assigned", &[experts.into()])?;
        if let Some(tops) = args.experts_per_token {
            tops.u32s("experts_per_token", &[tokens.into()])?;
        }
        if let Some(refresh) = args.refresh {
            refresh.u32s("refresh", &[blocks.into()])?;
        }
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
            has_tops: args.experts_per_token.is_some().into(),
            has_refresh: args.refresh.is_some().into(),
            has_rows: rows.is_some().into(),
        };
        if let Some(rows) = rows {
            rows.u32s("rows", &[1])?;
        }
        let rows = or_nothing(&self.ctx, rows);
        let voters = or_nothing(&self.ctx, args.voters);
        let tops = or_nothing(&self.ctx, args.experts_per_token);
        let refresh = or_nothing(&self.ctx, args.refresh);
        let Args { values, offsets, assigned, members, .. } = args;
        let slices = [values, offsets, voters, tops, refresh, rows, assigned, members];
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, 1)?.into())
    }
}
