//! Which tokens of a batch take part in token choice, where its sequences have lengths.
use super::batch::Batch;
use super::choice::ChoiceInput;
use super::scratch::Scratch;
use crate::device::Tensor;
use crate::ops::active_rows::{ActiveRows, Args, Capacities, Dims};
use crate::routing::TokenChoice;
use crate::{BoundOp, Context, Result};

/// The tokens of a batch that are not padding.
pub(super) struct Active {
    pub(super) part: BoundOp,
    /// `[ceil(T / 32)]` u32: a bit a token.
    pub(super) rows: Tensor,
    /// `[1]` u32: most tokens of an expert, under a capacity factor: a share of these tokens alone.
    pub(super) capacity: Option<Tensor>,
}

impl Active {
    /// Those of a batch with lengths; none where all its tokens take part.
    pub(super) fn bind(
        op: &ActiveRows,
        rule: &TokenChoice,
        ctx: &Context,
        scratch: &Scratch,
        batch: &Batch<'_>,
        input: &ChoiceInput<'_>,
    ) -> Result<Option<Self>> {
        let Some((sequences, lengths)) = batch.sequences.and_then(|s| Some((s, s.lengths?))) else {
            return Ok(None);
        };
        let ChoiceInput { tokens, experts, .. } = *input;
        let rows = scratch.get("rows", u64::from(tokens.div_ceil(32)) * 4)?;
        // The host has the formula, the device the number of tokens: a table needs neither twice.
        let of: Option<Vec<u32>> = (0..=tokens).map(|n| rule.capacity(n, experts)).collect();
        let table = of.map(|of| Tensor::new(ctx, "capacity_of", &of)).transpose()?;
        let capacity = match table {
            Some(_) => Some(scratch.get("capacity", 4)?),
            None => None,
        };
        let args = Args {
            offsets: sequences.offsets,
            lengths,
            rows: rows.slice(),
            capacities: table.as_ref().zip(capacity.as_ref()).map(|(table, capacity)| Capacities {
                capacity_of: table.slice(),
                capacity: capacity.slice(),
            }),
        };
        let part = op.bind(&Dims { tokens, sequences: sequences.count }, args)?;
        Ok(Some(Self { part, rows, capacity }))
    }
}
