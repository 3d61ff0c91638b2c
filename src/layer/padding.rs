//! Which tokens of a batch take part in token choice, where its sequences have lengths or the caller says which
//! are active.
use super::batch::Batch;
use super::choice::ChoiceInput;
use super::scratch::Scratch;
use crate::device::Tensor;
use crate::ops::active_rows::{ActiveRows, Args, Capacities, Dims};
use crate::routing::TokenChoice;
use crate::{BoundOp, Context, Result, Slice};

/// The tokens of a batch that take part.
pub(super) struct Rows {
    /// What makes them; none where the caller's own bits serve.
    pub(super) part: BoundOp,
    /// `[ceil(T / 32)]` u32: a bit a token.
    pub(super) rows: Tensor,
    /// `[1]` u32: most tokens of an expert, under a capacity factor: a share of these tokens alone.
    pub(super) capacity: Option<Tensor>,
}

impl Rows {
    /// Those of a batch; none where all its tokens take part.
    pub(super) fn bind(
        op: &ActiveRows,
        rule: &TokenChoice,
        ctx: &Context,
        scratch: &Scratch,
        batch: &Batch<'_>,
        input: &ChoiceInput<'_>,
    ) -> Result<Option<Self>> {
        let ChoiceInput { tokens, experts, .. } = *input;
        let padded = batch.sequences.and_then(|s| Some((s.count, s.offsets, s.lengths?)));
        let whole;
        let (sequences, offsets, lengths): (u32, Slice<'_>, Slice<'_>) =
            match (padded, batch.active) {
                (Some(padded), _) => padded,
                (None, None) => return Ok(None),
                (None, Some(active)) if rule.capacity(tokens, experts).is_none() => {
                    let (part, rows) = (BoundOp::default(), active.into());
                    return Ok(Some(Self { part, rows, capacity: None }));
                }
                (None, Some(_)) => {
                    let of = |name, words: &[u32]| Tensor::new(ctx, name, words);
                    whole = (of("offsets", &[0, tokens])?, of("lengths", &[tokens])?);
                    (1, whole.0.slice(), whole.1.slice())
                }
            };
        let rows = scratch.get("rows", u64::from(tokens.div_ceil(32)) * 4)?;
        // The host has the formula, the device the number of tokens: a table needs neither twice.
        let of: Option<Vec<u32>> = (0..=tokens).map(|n| rule.capacity(n, experts)).collect();
        let table = of.map(|of| Tensor::new(ctx, "capacity_of", &of)).transpose()?;
        let capacity = match table {
            Some(_) => Some(scratch.get("capacity", 4)?),
            None => None,
        };
        let args = Args {
            offsets,
            lengths,
            rows: rows.slice(),
            capacities: table.as_ref().zip(capacity.as_ref()).map(|(table, capacity)| Capacities {
                capacity_of: table.slice(),
                capacity: capacity.slice(),
            }),
        };
        let part = op.bind_among(&Dims { tokens, sequences }, args, batch.active)?;
        Ok(Some(Self { part, rows, capacity }))
    }
}
