//! The plan: which slots there are, by expert and by token, and the items of work they make.
//!
//! The expert matmuls and the combination read it. It is one `u32` buffer on the device, with
//! sections that the host knows ([`PlanShape::sections`]); nothing of it is read back.
//!
//! | section | words | what |
//! |---|---|---|
//! | head | 8 | slots, active experts, tiles, skinny items, slots cut, ... |
//! | `expert_offsets` | X + 1 | first slot of each expert, exclusive; X = experts + shared experts |
//! | `token_offsets` | T + 1 | first entry of each token in `slot_of` |
//! | `active` | E | routed experts that have a slot, ascending |
//! | `skinny_offsets`, `tile_offsets` | X + 1 each | first item of each expert |
//! | `skinny_items`, `tile_items` | 2 each | (expert, first slot) of each item |
//! | `ranks` | E x ceil(T / 32) | slots of an expert below each word of its bits; one row more where there are shared experts, for tokens that are active |
//! | `token_of`, `gate_of` | S each | token, gate (f32 bits) of each slot |
//! | `slot_of` | S | slots of each token: routed experts ascending, then shared |
//!
//! X is the number of experts, shared ones included. An engine that runs the experts itself reads
//! `expert_offsets`, `token_of` and `gate_of`; [`HostPlan`] is a plan on the host, read back or made
//! by the CPU twin:
//!
//! ```
//! use wgmoe::plan::{HostPlan, PlanShape, bits};
//!
//! // 3 tokens, 2 experts: the first expert takes tokens 0 and 2, the second token 2.
//! let assigned = bits::from_lists(3, &[vec![0, 2], vec![2]]);
//! let gates = [1.0, 0.0, 0.0, 0.0, 0.25, 0.75]; // [tokens, experts]
//! let shape = PlanShape::on_host(3, 2, 3);
//! let plan = HostPlan::cpu(&shape, &assigned, &gates);
//! assert_eq!(plan.expert_offsets, [0, 2, 3]);
//! assert_eq!(plan.token_of, [0, 2, 2]);
//! assert_eq!(plan.gate_of, [1.0, 0.25, 0.75]);
//! // The slots of each token: the first has slot 0, the second none, the third 1 and 2.
//! assert_eq!((&plan.token_offsets[..], &plan.slot_of[..]), (&[0, 1, 1, 3][..], &[0, 1, 2][..]));
//! ```
//!
//! # Slots
//!
//! Slots are ordered by expert, and an expert's by token. Shared experts follow the routed ones:
//! each takes every token, or every active one ([`Batch::active`](crate::layer::Batch::active)).
//!
//! A plan has room for [`PlanShape::routed_slots`] routed slots. Where more pairs are assigned, the
//! last ones in that order are cut: the highest experts lose their tokens first, and of the one
//! expert that keeps some the last tokens go. What is cut is in no list, is not computed, and adds
//! nothing to `out`; [`Stats::cut`] counts it. Shared experts' slots are reserved, and never cut.
//!
//! # Items
//!
//! An item is what one workgroup of a matmul computes: an expert, and its first slot. An expert
//! with n slots has `n / tile_rows` whole items of the tile kernel. The rest, fewer than
//! `tile_rows`, is one item of the skinny kernel where it is at most [`PlanShape::skinny_rows`]
//! slots, and else one more item of the tile kernel. The three kernels that make items, the matmuls
//! that read them and [`HostPlan::cpu`] all follow this rule. On GPUs the matmuls tell one more kind
//! apart, which is no list of its own: an expert's last tile, where it has at most 32 rows and the shape has skinny items.
pub mod bits;
mod host;
mod stats;

pub use host::{HostPlan, Items};
pub use stats::Stats;

use crate::error::{bytes_of, not_zero};
use crate::routing::check;
use crate::{Error, Result};
use std::ops::Range;

/// Sizes of a plan: everything the host must know of it.
///
/// [`PlanShape::new`] makes one for the matmuls of a [`Context`](crate::Context), whose items have
/// as many rows as its kernels take. [`PlanShape::on_host`] is for the CPU twins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct PlanShape {
    /// T: tokens.
    pub tokens: u32,
    /// E: routed experts, at most [`MAX_EXPERTS`](crate::routing::MAX_EXPERTS).
    pub experts: u32,
    /// Shared experts: each takes every token with gate 1.
    pub shared_experts: u32,
    /// Bound of the routed slots; those past it are cut, and counted ([`Stats::cut`]).
    pub routed_slots: u32,
    /// Rows of an item of the tile kernel.
    pub tile_rows: u32,
    /// Most rows of an item of the skinny kernel; 0: all rows are in tiles.
    pub skinny_rows: u32,
}

/// First word of each section of a plan, and its length in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the module's table says what each section holds")]
pub struct Sections {
    pub expert_offsets: u32,
    pub token_offsets: u32,
    pub active: u32,
    pub skinny_offsets: u32,
    pub tile_offsets: u32,
    pub skinny_items: u32,
    pub tile_items: u32,
    pub ranks: u32,
    pub token_of: u32,
    pub gate_of: u32,
    pub slot_of: u32,
    /// Words in all.
    pub words: u32,
}

impl PlanShape {
    /// A plan of tokens, routed experts and at most so many routed slots that is not for the
    /// matmuls of a context: for the CPU twins, or for kernels of the caller's own. Items of 16
    /// rows, and of 8.
    pub const fn on_host(tokens: u32, experts: u32, routed_slots: u32) -> Self {
        let (tile_rows, skinny_rows) = (16, 8);
        Self { tokens, experts, shared_experts: 0, routed_slots, tile_rows, skinny_rows }
    }

    /// The same with shared experts: each takes every token with gate 1.
    #[must_use]
    pub const fn with_shared_experts(self, shared_experts: u32) -> Self {
        Self { shared_experts, ..self }
    }

    /// The same with items of `tile_rows` rows, and rests of at most `skinny_rows` in items of their own: for
    /// kernels of the caller's own. With 0 `skinny_rows` all rows are in tiles, and all sums have one order.
    #[must_use]
    pub const fn with_item_rows(self, tile_rows: u32, skinny_rows: u32) -> Self {
        Self { tile_rows, skinny_rows, ..self }
    }

    /// Routed and shared experts.
    pub fn all_experts(&self) -> u32 {
        self.experts.saturating_add(self.shared_experts)
    }

    /// Bound of all slots, shared experts' included.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where it does not fit `u32`.
    pub fn slots(&self) -> Result<u32> {
        u64::from(self.shared_experts)
            .checked_mul(self.tokens.into())
            .and_then(|s| u32::try_from(s + u64::from(self.routed_slots)).ok())
            .ok_or_else(|| {
                Error::invalid("tokens", "too many slots: shared experts times tokens overflow")
            })
    }

    /// Bound of the items of the tile kernel.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::slots`].
    pub fn tiles(&self) -> Result<u32> {
        let slots = self.slots()?;
        let experts = self.experts.saturating_add(self.shared_experts);
        (slots / self.tile_rows.max(1))
            .checked_add((slots / self.skinny_rows.saturating_add(1)).min(experts))
            .ok_or_else(|| Error::invalid("tokens", "too many slots: their tiles overflow"))
    }

    /// Bounds of the places, among all items of the tile kernel, of those that hold one of these slots.
    /// They are wider than need be by up to an item an expert: the host does not know how many slots each has.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::slots`].
    pub(crate) fn tiles_of(&self, slots: Range<u32>) -> Result<Range<u32>> {
        let [rows, skinny, experts] =
            [self.tile_rows.max(1), self.skinny_rows, self.all_experts()].map(u64::from);
        // Of an expert's slots so many at most are in no tile; or its last tile lacks so many.
        let [left, lacking] = [skinny.min(rows - 1), (rows - 1).saturating_sub(skinny)];
        let before = u64::from(slots.start).saturating_sub(experts * left + rows - 1);
        let until = (u64::from(slots.end) + experts * lacking).div_ceil(rows);
        let end = until.min(self.tiles()?.into()) as u32;
        Ok(before.div_ceil(rows).min(end.into()) as u32..end)
    }

    /// Bound of the items of the skinny kernel.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::slots`].
    pub fn skinny(&self) -> Result<u32> {
        let experts = self.experts.saturating_add(self.shared_experts);
        Ok(if self.skinny_rows == 0 { 0 } else { self.slots()?.min(experts) })
    }

    /// Where each section lies.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for zero tokens, experts or tile rows, more experts than
    /// [`MAX_EXPERTS`](crate::routing::MAX_EXPERTS), or a plan of 2^32 words or more.
    pub fn sections(&self) -> Result<Sections> {
        not_zero(&[("tokens", self.tokens), ("tile_rows", self.tile_rows)])?;
        check::few_experts(self.experts)?;
        check::few_shared(self.shared_experts)?;
        let (e, x, t) =
            (u64::from(self.experts), u64::from(self.all_experts()), u64::from(self.tokens));
        let s = u64::from(self.slots()?);
        let own_row = u64::from(self.shared_experts.min(1));
        let mut at = 8u64;
        let mut section = |words: u64| {
            let first = at;
            at += words;
            u32::try_from(first)
                .map_err(|_| Error::invalid("tokens", "the plan would not fit 2^32 words"))
        };
        let sections = Sections {
            expert_offsets: section(x + 1)?,
            token_offsets: section(t + 1)?,
            active: section(e)?,
            skinny_offsets: section(x + 1)?,
            tile_offsets: section(x + 1)?,
            skinny_items: section(2 * u64::from(self.skinny()?))?,
            tile_items: section(2 * u64::from(self.tiles()?))?,
            ranks: section(bytes_of("tokens", &[e + own_row, t.div_ceil(32)], 1)?)?,
            token_of: section(s)?,
            gate_of: section(s)?,
            slot_of: section(s)?,
            words: section(0)?,
        };
        Ok(sections)
    }

    /// Bytes of the plan's buffer.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`].
    pub fn bytes(&self) -> Result<u64> {
        Ok(u64::from(self.sections()?.words) * 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Experts of all sizes, empty ones among them.
    fn lists(tokens: u32, experts: u32, spread: u32) -> Vec<Vec<u32>> {
        let lists = (0..experts).map(|e| {
            let list = (0..tokens).filter(|t| (t * 7 + e * e) % (spread + e) == 0);
            list.collect::<Vec<u32>>()
        });
        lists.map(|list| if list.len() % 5 == 3 { vec![] } else { list }).collect()
    }

    #[test]
    fn tiles_of_slots_lie_within_their_bounds() {
        let (tokens, experts) = (97, 11);
        let gates = vec![0.0; (tokens * experts) as usize];
        for [tile_rows, skinny_rows] in [[16, 8], [8, 0], [4, 8], [16, 15], [32, 3], [1, 0]] {
            for (spread, shared_experts, cut) in [(1, 0, 0), (2, 2, 0), (3, 1, 60), (6, 0, 20)] {
                let lists = lists(tokens, experts, spread);
                let slots: u32 = lists.iter().map(|list| list.len() as u32).sum();
                let shape = PlanShape::on_host(tokens, experts, slots - cut)
                    .with_shared_experts(shared_experts)
                    .with_item_rows(tile_rows, skinny_rows);
                let assigned = bits::from_lists(tokens as usize, &lists);
                let plan = HostPlan::cpu(&shape, &assigned, &gates);
                let all = shape.slots().unwrap();
                assert_eq!(plan.token_of.len(), all as usize);
                for start in (0..all).step_by(23) {
                    for end in [start + 1, (start + 40).min(all), all] {
                        let bounds = shape.tiles_of(start..end).unwrap();
                        let slack = shape.all_experts() * tile_rows;
                        assert!(bounds.len() as u32 <= (end - start + slack) / tile_rows + 2);
                        for (i, &[expert, first]) in plan.tiles.items.iter().enumerate() {
                            let last = plan.expert_offsets[expert as usize + 1];
                            let last = last.min(first + tile_rows);
                            let inside = first < end && last > start;
                            assert!(
                                !inside || bounds.contains(&(i as u32)),
                                "tile {i} of {shape:?} holds some of {start}..{end}: {bounds:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}
