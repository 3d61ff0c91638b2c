//! Shared experts: every token's, computed where the token is.
use crate::Result;
use crate::owner::buffer;
use wgmoe::layer::{LayerConfig, Tensor};
use wgmoe::ops::grouped_matmul::{Args, GroupedMatmul, Rows, Stage, few_rows};
use wgmoe::plan::HostPlan;
use wgmoe::{BoundOp, Context, ExpertWeights, PlanShape, Slice, wgpu};

/// The shared experts of one rank's tokens.
///
/// On one device with the whole batch the last tokens, where they are few, make a skinny or a small item,
/// and all others items of the tile matmul; the sums of the two have another order. So that each token's
/// sums have the order they would have there, a rank's tokens are taken in two parts.
#[derive(Debug)]
pub(crate) struct Shared {
    parts: Vec<Part>,
    experts: u32,
    tokens: u32,
    width: u64,
}

#[derive(Debug)]
struct Part {
    /// First token.
    first: u32,
    tokens: u32,
    /// `[experts * tokens, D]`.
    y: wgpu::Buffer,
    work: BoundOp,
    /// Kept for as long as it is bound.
    _plan: Tensor,
}

/// Where the last tokens of a batch begin, which make no item of tiles: at the end where there are none.
fn rest_of(tokens: u32, tile_rows: u32, few_rows: u32) -> u32 {
    let rest = tokens % tile_rows;
    if rest <= few_rows { tokens - rest } else { tokens }
}

impl Shared {
    /// Of `tokens` tokens of `hidden`, which are those from `first` on of `whole`.
    pub(crate) fn new(
        ctx: &Context,
        config: &LayerConfig,
        weights: &ExpertWeights,
        hidden: Slice<'_>,
        [first, tokens, whole]: [u32; 3],
    ) -> Result<Self> {
        let experts = weights.shape();
        let gate_up = GroupedMatmul::new(ctx, &experts, Stage::GateUp(config.activation))?;
        let down = GroupedMatmul::new(ctx, &experts, Stage::Down)?;
        let all = experts.experts;
        let own = PlanShape::new(ctx, tokens.max(1), all, 1);
        let middle =
            rest_of(whole, own.tile_rows, few_rows(ctx, &own)).clamp(first, first + tokens) - first;
        let mut parts = vec![];
        for (of, skinny_rows) in [(0..middle, 0), (middle..tokens, own.skinny_rows)] {
            if of.is_empty() {
                continue;
            }
            let rows = of.end - of.start;
            let slots = u64::from(all) * u64::from(rows);
            let many = |_| wgmoe::Error::Invalid {
                name: "tokens",
                reason: format!("{slots} slots of shared experts do not fit 32 bits"),
            };
            let slots = u32::try_from(slots).map_err(many)?;
            let shape =
                PlanShape::new(ctx, tokens, all, slots).with_item_rows(own.tile_rows, skinny_rows);
            let token_of: Vec<u32> = of.clone().collect();
            let plan = HostPlan::of_rows(&shape, &vec![token_of; all as usize])?;
            let plan = Tensor::new(ctx, "plan", &plan.to_words(&shape)?)?;
            let bytes = |width: u32| 4 * u64::from(slots) * u64::from(width);
            let h = buffer(ctx, "h of shared experts", bytes(config.intermediate))?;
            let y = buffer(ctx, "y of shared experts", bytes(config.hidden))?;
            let args = |x, out, columns| Args {
                x,
                plan: plan.slice(),
                weights,
                places: None,
                out,
                slots: 0..slots,
                columns,
            };
            let first_args = args(Rows::Tokens(hidden.into()), (&h).into(), 0..config.intermediate);
            let second = args(Rows::Slots((&h).into()), (&y).into(), 0..config.hidden);
            let work = gate_up.bind(&shape, first_args)?.then(down.bind(&shape, second)?);
            parts.push(Part { first: of.start, tokens: rows, y, work, _plan: plan });
        }
        Ok(Self { parts, experts: all, tokens, width: 4 * u64::from(config.hidden) })
    }

    /// Records the experts.
    pub(crate) fn encode(&self, encoder: &mut wgpu::CommandEncoder) {
        for part in &self.parts {
            part.work.record(&mut encoder.begin_compute_pass(&Default::default()));
        }
    }

    /// Records copies of what they made behind the `routed` slots of the tokens, where the combination
    /// reads it.
    pub(crate) fn encode_copies(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        rows: &wgpu::Buffer,
        routed: u32,
    ) {
        for part in &self.parts {
            let bytes = u64::from(part.tokens) * self.width;
            for e in 0..self.experts {
                let slot = u64::from(routed)
                    + u64::from(e) * u64::from(self.tokens)
                    + u64::from(part.first);
                let from = u64::from(e) * bytes;
                encoder.copy_buffer_to_buffer(&part.y, from, rows, slot * self.width, bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_tokens() {
        let skinny = |tokens| rest_of(tokens, 64, 8);
        assert_eq!([5, 64, 70, 72, 73, 128].map(skinny), [0, 64, 64, 64, 73, 128]);
        let small = |tokens| rest_of(tokens, 64, 32);
        assert_eq!([5, 64, 73, 96, 97, 128].map(small), [0, 64, 64, 64, 97, 128]);
    }
}
