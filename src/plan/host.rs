//! Plans on the host.
use super::{PlanShape, bits};
use crate::error::{expect_len, expect_some};
use crate::{Error, Result};

/// The items of one kernel, of all experts one after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Items {
    /// (expert, first slot) of each.
    pub items: Vec<[u32; 2]>,
    /// First item of each expert, exclusive, `[X + 1]`.
    pub offsets: Vec<u32>,
}

/// A plan read back, in host types: for tests, reports, and engines that want to look.
#[derive(Clone, Debug, PartialEq)]
pub struct HostPlan {
    /// First slot of each expert, exclusive, `[X + 1]`.
    pub expert_offsets: Vec<u32>,
    /// First entry of each token in `slot_of`, `[T + 1]`.
    pub token_offsets: Vec<u32>,
    /// Routed experts that have a slot.
    pub active: Vec<u32>,
    /// Items of the skinny kernel.
    pub skinny: Items,
    /// Items of the tile kernel.
    pub tiles: Items,
    /// Token of each slot.
    pub token_of: Vec<u32>,
    /// Gate of each slot.
    pub gate_of: Vec<f32>,
    /// Slots of each token, those that are cut left out.
    pub slot_of: Vec<u32>,
}

impl HostPlan {
    /// Takes apart the words of a plan of this shape.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`]; [`Error::Size`] if `words` are fewer than the shape's, or hold
    /// no plan.
    pub fn from_words(shape: &PlanShape, words: &[u32]) -> Result<Self> {
        let at = shape.sections()?;
        let short = Error::size("words", shape.bytes()?, words.len() as u64 * 4);
        let take = |first: u32, n: u32| -> Result<Vec<u32>> {
            let first = first as usize;
            words.get(first..first + n as usize).map(<[u32]>::to_vec).ok_or_else(|| short.clone())
        };
        let head = take(0, 8)?;
        let x = shape.all_experts();
        let pairs = |v: Vec<u32>| v.chunks_exact(2).map(|c| [c[0], c[1]]).collect();
        Ok(Self {
            expert_offsets: take(at.expert_offsets, x + 1)?,
            token_offsets: take(at.token_offsets, shape.tokens + 1)?,
            active: take(at.active, head[1].min(shape.experts))?,
            skinny: Items {
                items: pairs(take(at.skinny_items, 2 * head[3].min(shape.skinny()?))?),
                offsets: take(at.skinny_offsets, x + 1)?,
            },
            tiles: Items {
                items: pairs(take(at.tile_items, 2 * head[2].min(shape.tiles()?))?),
                offsets: take(at.tile_offsets, x + 1)?,
            },
            token_of: take(at.token_of, head[0].min(shape.slots()?))?,
            gate_of: take(at.gate_of, head[0].min(shape.slots()?))?
                .into_iter()
                .map(f32::from_bits)
                .collect(),
            slot_of: take(at.slot_of, head[0].min(shape.slots()?))?,
        })
    }

    /// The CPU twin of the three plan kernels: the plan of a bit set and its gates
    /// `[tokens, experts]`.
    ///
    /// # Panics
    ///
    /// If the shape has 0 `tile_rows`, if `assigned` is not `experts * ceil(tokens / 32)` long, or
    /// if `gates` are not `tokens * experts`; the message names the argument.
    pub fn cpu(shape: &PlanShape, assigned: &[u32], gates: &[f32]) -> Self {
        let (tokens, experts) = (shape.tokens as usize, shape.experts as usize);
        expect_some("tile_rows", shape.tile_rows as usize);
        expect_len("assigned", assigned.len(), experts * bits::columns(tokens));
        expect_len("gates", gates.len(), tokens * experts);
        let mut plan = Self {
            expert_offsets: vec![0],
            token_offsets: vec![0],
            active: vec![],
            skinny: Items { items: vec![], offsets: vec![0] },
            tiles: Items { items: vec![], offsets: vec![0] },
            token_of: vec![],
            gate_of: vec![],
            slot_of: vec![],
        };
        let mut slots_of_token = vec![vec![]; tokens];
        for e in 0..experts + shape.shared_experts as usize {
            let routed = e < experts;
            let mut of_expert: Vec<usize> =
                if routed { bits::tokens_of(assigned, tokens, e) } else { (0..tokens).collect() };
            let first = plan.token_of.len();
            if routed {
                // Past the bound, slots are cut.
                of_expert.truncate(shape.routed_slots as usize - first);
            }
            if routed && !of_expert.is_empty() {
                plan.active.push(e as u32);
            }
            for &t in &of_expert {
                slots_of_token[t].push(plan.token_of.len() as u32);
                plan.token_of.push(t as u32);
                plan.gate_of.push(if routed { gates[t * experts + e] } else { 1.0 });
            }
            let mut row = first;
            let end = plan.token_of.len();
            while row < end {
                let rest = end - row;
                let item = [e as u32, row as u32];
                if rest < shape.tile_rows as usize && rest <= shape.skinny_rows as usize {
                    plan.skinny.items.push(item);
                    row = end;
                } else {
                    plan.tiles.items.push(item);
                    row += shape.tile_rows as usize;
                }
            }
            plan.expert_offsets.push(end as u32);
            plan.skinny.offsets.push(plan.skinny.items.len() as u32);
            plan.tiles.offsets.push(plan.tiles.items.len() as u32);
        }
        for slots in slots_of_token {
            plan.slot_of.extend(slots);
            plan.token_offsets.push(plan.slot_of.len() as u32);
        }
        plan
    }
}
