//! The kernels of a layer's routing rule: from selection values to the bit set.
use super::batch::{BLOCK, Batch, Blocks, Sequences};
use super::padding::Rows;
use super::scratch::Scratch;
use crate::device::Tensor;
use crate::ops::{
    active_rows, block_choice, capacity, coreset, coverage, expert_choice, sequence_top,
    token_choice,
};
use crate::routing::{self, Routing};
use crate::{BoundOp, Context, Error, Result, Slice};

/// A rule with its kernels.
#[derive(Debug)]
pub(super) enum Choice {
    /// Experts choose tokens.
    Experts {
        rule: routing::ExpertChoice,
        choice: expert_choice::ExpertChoice,
        capacity: capacity::Capacity,
    },
    /// Tokens choose experts.
    Tokens {
        rule: routing::TokenChoice,
        choice: token_choice::TokenChoice,
        coreset: Option<Box<Election>>,
        drop: Option<expert_choice::ExpertChoice>,
        /// For batches not all of whose tokens take part.
        rows_of: active_rows::ActiveRows,
    },
    /// The highest pairs of a sequence.
    Pairs { rule: routing::SequenceTop, choice: sequence_top::SequenceTop },
}

/// What a block elects its coreset with.
#[derive(Debug)]
pub(super) struct Election {
    /// Each token's own choice, for the votes.
    own: Option<token_choice::TokenChoice>,
    coreset: coreset::Coreset,
    /// Own choice, election and the choice inside at once, for few tokens; none where there are too
    /// many experts.
    fused: Option<block_choice::BlockChoice>,
    coverage: coverage::Coverage,
}

/// The tensors of one choice.
pub(super) struct ChoiceInput<'a> {
    pub(super) tokens: u32,
    pub(super) experts: u32,
    /// `[T, E]` f32: what experts are chosen by.
    pub(super) values: &'a Tensor,
    /// `[E, ceil(T / 32)]` u32, written.
    pub(super) assigned: &'a Tensor,
}

/// What a choice made beside the bit set.
#[derive(Default)]
pub(super) struct Chosen<'a> {
    pub(super) parts: Vec<BoundOp>,
    pub(super) coreset: Option<Tensor>,
    /// The caller's offsets, whose clamped ones are counted.
    pub(super) offsets: Option<Slice<'a>>,
    /// `[1]` u32: most tokens of an expert under a capacity factor, where the device must tell.
    pub(super) capacity: Option<Tensor>,
}

impl Choice {
    /// Compiles what the rule can need.
    pub(super) fn new(ctx: &Context, experts: u32, routing: Routing) -> Result<Self> {
        Ok(match routing {
            Routing::ExpertChoice(rule) => Self::Experts {
                rule,
                choice: expert_choice::ExpertChoice::new(ctx)?,
                capacity: capacity::Capacity::new(ctx)?,
            },
            Routing::TokenChoice(rule) => Self::Tokens {
                rule,
                choice: token_choice::TokenChoice::new(
                    ctx,
                    experts,
                    rule.experts_per_token,
                    rule.groups,
                )?,
                coreset: match rule.coreset {
                    Some(_) => Some(Box::new(Election::new(ctx, experts, &rule)?)),
                    None => None,
                },
                drop: match rule.capacity_factor {
                    Some(_) => Some(expert_choice::ExpertChoice::new(ctx)?),
                    None => None,
                },
                rows_of: active_rows::ActiveRows::new(ctx)?,
            },
            Routing::SequenceTop(rule) => {
                Self::Pairs { rule, choice: sequence_top::SequenceTop::new(ctx)? }
            }
        })
    }

    /// Errors for what the rule would not read.
    pub(super) fn check(&self, batch: &Batch<'_>) -> Result<()> {
        let (sequences, blocks) = (batch.sequences, batch.blocks);
        let elects = matches!(self, Self::Tokens { coreset: Some(_), .. });
        Batch::unused("blocks", blocks.is_some() && !elects, "this rule elects no coreset")?;
        let each = batch.experts_per_token.is_some() && !matches!(self, Self::Tokens { .. });
        Batch::unused("experts_per_token", each, "only token choice reads it")?;
        if let Some(sequences) = sequences {
            let chooses = matches!(self, Self::Experts { .. });
            let given = sequences.capacity.is_some();
            Batch::unused("capacity", given && !chooses, "only expert choice has capacities")?;
            let padded = sequences.lengths.is_some();
            let ignores = matches!(self, Self::Tokens { .. }) && !padded;
            Batch::unused("sequences", ignores, "token choice reads them for `lengths` alone")?;
        }
        Ok(())
    }

    /// Binds the choice.
    pub(super) fn bind<'a>(
        &self,
        ctx: &Context,
        scratch: &Scratch,
        batch: &Batch<'a>,
        input: &ChoiceInput<'_>,
    ) -> Result<Chosen<'a>> {
        match self {
            Self::Experts { rule, choice, capacity } => {
                bind_experts((rule, choice, capacity), ctx, scratch, batch, input)
            }
            Self::Tokens { rule, choice, coreset, rows_of, .. } => {
                let taking_part = Rows::bind(rows_of, rule, ctx, scratch, batch, input)?;
                let rows = taking_part.as_ref().map(|of| of.rows.slice());
                let tops = batch.experts_per_token;
                let mut chosen = match coreset {
                    None => Chosen {
                        parts: vec![choose(choice, input, None, (rows, tops))?],
                        ..Chosen::default()
                    },
                    Some(election) => election.bind(choice, ctx, scratch, batch, input, rows)?,
                };
                if let Some(of) = taking_part {
                    chosen.parts.insert(0, of.part);
                    chosen.capacity = of.capacity;
                    chosen.offsets = chosen.offsets.or(batch.sequences.map(|s| s.offsets));
                }
                Ok(chosen)
            }
            Self::Pairs { rule, choice } => {
                let whole = Tensor::new(ctx, "offsets", &[0, input.tokens])?;
                let (sequences, offsets) =
                    batch.sequences.map_or((1, whole.slice()), |s| (s.count, s.offsets));
                let ChoiceInput { tokens, experts, .. } = *input;
                let dims = sequence_top::Dims {
                    tokens,
                    experts,
                    sequences,
                    experts_per_token: rule.experts_per_token,
                };
                let args = sequence_top::Args {
                    values: input.values.slice(),
                    offsets,
                    assigned: input.assigned.slice(),
                };
                let lengths = batch.sequences.and_then(|s| s.lengths);
                let parts = vec![choice.bind_among(&dims, args, lengths, batch.active)?];
                let offsets = batch.sequences.map(|s| s.offsets);
                Ok(Chosen { parts, offsets, ..Chosen::default() })
            }
        }
    }

    /// Upper bound of the slots that the rule makes of tokens, in so many sequences where it knows of
    /// such.
    pub(super) fn slots(&self, tokens: u32, sequences: Option<u32>, experts: u32) -> Result<u32> {
        let each = |k: u32| {
            let slots = u64::from(tokens) * u64::from(k);
            let many = format!("{slots} slots do not fit 32 bits");
            u32::try_from(slots).map_err(|_| Error::invalid("tokens", many))
        };
        match self {
            Self::Tokens { rule, .. } => each(rule.experts_per_token),
            Self::Pairs { rule, .. } => each(rule.experts_per_token),
            Self::Experts { rule, .. } => {
                let k = rule.max_experts_per_token;
                match sequences {
                    Some(count) => routing::schedule::slot_bound_of_any(tokens, count, experts, k),
                    None => routing::schedule::slot_bound([tokens], experts, k),
                }
            }
        }
    }
}

/// Token choice, of the tokens that take part, each with its own number of experts.
fn choose(
    choice: &token_choice::TokenChoice,
    input: &ChoiceInput<'_>,
    coresets: Option<token_choice::Coresets<'_>>,
    (rows, experts_per_token): (Option<Slice<'_>>, Option<Slice<'_>>),
) -> Result<BoundOp> {
    let (values, assigned) = (input.values.slice(), input.assigned.slice());
    let args = token_choice::Args { values, coresets, experts_per_token, assigned };
    choice.bind_among(&token_choice::Dims { tokens: input.tokens }, args, rows)
}

fn bind_experts<'a>(
    (rule, choice, capacity): (
        &routing::ExpertChoice,
        &expert_choice::ExpertChoice,
        &capacity::Capacity,
    ),
    ctx: &Context,
    scratch: &Scratch,
    batch: &Batch<'a>,
    input: &ChoiceInput<'_>,
) -> Result<Chosen<'a>> {
    let ChoiceInput { tokens, experts, .. } = *input;
    let k = rule.experts_per_token;
    let mut parts = vec![];
    let (whole, own);
    let sequences = match batch.sequences {
        Some(given) => given,
        None => {
            whole = Tensor::new(ctx, "offsets", &[0, tokens])?;
            Sequences::new(1, whole.slice())
        }
    };
    let sequences = match sequences.capacity {
        // All tokens take part: the host knows how many.
        None if batch.sequences.is_none() && batch.active.is_none() => {
            own = Tensor::new(ctx, "capacity", &[routing::schedule::capacity(tokens, k, experts)])?;
            sequences.with_capacity(own.slice())
        }
        None => {
            let count = sequences.count;
            let rows = u64::from(count) * 4;
            let per_token = Tensor::new(ctx, "experts per token", &vec![k; count as usize])?;
            let k_of = scratch.get("k_of", rows)?;
            own = scratch.get("capacity", rows)?;
            let args = capacity::Args {
                source: capacity::Source::ExpertsPerToken(per_token.slice()),
                offsets: sequences.offsets,
                lengths: sequences.lengths,
                capacity_of: own.slice(),
                k_of: k_of.slice(),
            };
            let dims = capacity::Dims { tokens, experts, sequences: count };
            parts.push(capacity.bind_among(&dims, args, batch.active)?);
            sequences.with_capacity(own.slice())
        }
        Some(_) => sequences,
    };
    let missing = || Error::invalid("capacity", "missing");
    let dims = expert_choice::Dims { tokens, experts, sequences: sequences.count };
    let args = expert_choice::Args {
        values: input.values.slice(),
        offsets: sequences.offsets,
        lengths: sequences.lengths,
        capacity: sequences.capacity.ok_or_else(missing)?,
        assigned: input.assigned.slice(),
    };
    parts.push(choice.bind_among(&dims, args, batch.active)?);
    let offsets = batch.sequences.map(|s| s.offsets);
    Ok(Chosen { parts, offsets, ..Chosen::default() })
}

impl Election {
    fn new(ctx: &Context, experts: u32, rule: &routing::TokenChoice) -> Result<Self> {
        let block = rule.coreset.ok_or_else(|| Error::invalid("coreset", "missing"))?;
        let fused = if experts <= block_choice::MAX_EXPERTS {
            let (top, groups) = (rule.experts_per_token, rule.groups);
            Some(block_choice::BlockChoice::new(ctx, experts, block, top, groups)?)
        } else {
            None
        };
        let own = |top| token_choice::TokenChoice::new(ctx, experts, top, None);
        Ok(Self {
            own: block.own_top(rule.experts_per_token).map(own).transpose()?,
            coreset: coreset::Coreset::new(ctx, experts, block)?,
            fused,
            coverage: coverage::Coverage::new(ctx)?,
        })
    }

    fn bind<'a>(
        &self,
        inside: &token_choice::TokenChoice,
        ctx: &Context,
        scratch: &Scratch,
        batch: &Batch<'a>,
        input: &ChoiceInput<'_>,
        rows: Option<Slice<'_>>,
    ) -> Result<Chosen<'a>> {
        let ChoiceInput { tokens, experts, .. } = *input;
        let count = tokens.div_ceil(BLOCK);
        let ends: Vec<u32> = (0..=count).map(|i| i.saturating_mul(BLOCK).min(tokens)).collect();
        let alone = Tensor::new(ctx, "blocks", &ends)?;
        let blocks = batch.blocks.unwrap_or_else(|| Blocks::new(count, alone.slice()));
        let words = u64::from(experts.div_ceil(32));
        let members = match blocks.kept {
            Some(kept) => kept.coresets.into(),
            None => scratch.get("coreset", u64::from(blocks.count) * words * 4)?,
        };
        let tops = batch.experts_per_token;
        let made = self.bind_choice(inside, scratch, (&blocks, tops), input, (&members, rows));
        let mut parts = made.map_err(|e| e.renamed(&[("members", "coresets")]))?;
        if let Some(coverage) = blocks.coverage {
            let columns = u64::from(tokens.div_ceil(32));
            let own = scratch.get("own choice", u64::from(experts) * columns * 4)?;
            let own_input = ChoiceInput { assigned: &own, ..*input };
            parts.push(choose(inside, &own_input, None, (rows, tops))?);
            let args = coverage::Args {
                own_choice: own.slice(),
                members: members.slice(),
                offsets: blocks.offsets,
                coverage,
            };
            let dims = coverage::Dims { tokens, experts, blocks: blocks.count };
            let own = [("members", "coresets"), ("coverage_of", "coverage")];
            parts.push(self.coverage.bind(&dims, args).map_err(|e| e.renamed(&own))?);
        }
        let offsets = batch.blocks.map(|b| b.offsets);
        Ok(Chosen { parts, coreset: Some(members), offsets, ..Chosen::default() })
    }

    /// The election and the choice inside, at once where the batch is small.
    fn bind_choice(
        &self,
        inside: &token_choice::TokenChoice,
        scratch: &Scratch,
        (blocks, tops): (&Blocks<'_>, Option<Slice<'_>>),
        input: &ChoiceInput<'_>,
        (members, rows): (&Tensor, Option<Slice<'_>>),
    ) -> Result<Vec<BoundOp>> {
        let tokens = input.tokens;
        let (values, assigned) = (input.values.slice(), input.assigned.slice());
        let refresh = blocks.kept.map(|kept| kept.refresh);
        let dims = block_choice::Dims { tokens, blocks: blocks.count };
        if let Some(fused) = self.fused.as_ref().filter(|fused| fused.fits(dims)) {
            let args = block_choice::Args {
                values,
                offsets: blocks.offsets,
                voters: blocks.voters,
                experts_per_token: tops,
                refresh,
                assigned,
                members: members.slice(),
            };
            return Ok(vec![fused.bind_among(&dims, args, rows)?]);
        }
        let mut parts = vec![];
        let block_of = scratch.get("block_of", u64::from(tokens) * 4)?;
        // Each token's own choice stands where the final one will: it is read before that is
        // written.
        if let Some(own) = &self.own {
            parts.push(choose(own, input, None, (rows, None))?);
        }
        let args = coreset::Args {
            values,
            own_choice: self.own.as_ref().map(|_| assigned),
            offsets: blocks.offsets,
            voters: blocks.voters,
            refresh,
            members: members.slice(),
            block_of: block_of.slice(),
        };
        let dims = coreset::Dims { tokens, blocks: blocks.count };
        parts.push(self.coreset.bind_among(&dims, args, rows)?);
        let coresets = token_choice::Coresets {
            blocks: blocks.count,
            coreset: members.slice(),
            block_of: block_of.slice(),
        };
        parts.push(choose(inside, input, Some(coresets), (rows, tops))?);
        Ok(parts)
    }
}
