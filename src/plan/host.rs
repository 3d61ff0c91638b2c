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
        Self::cpu_active(
            shape,
            assigned,
            gates,
            &vec![u32::MAX; bits::columns(shape.tokens as usize)],
        )
    }

    /// The same where shared experts take the tokens of a bit set `active`, `[ceil(tokens / 32)]`, alone.
    ///
    /// # Panics
    ///
    /// As [`HostPlan::cpu`], or if `active` is not `ceil(tokens / 32)` long.
    pub fn cpu_active(shape: &PlanShape, assigned: &[u32], gates: &[f32], active: &[u32]) -> Self {
        let (tokens, experts) = (shape.tokens as usize, shape.experts as usize);
        expect_some("tile_rows", shape.tile_rows as usize);
        expect_len("assigned", assigned.len(), experts * bits::columns(tokens));
        expect_len("gates", gates.len(), tokens * experts);
        expect_len("active", active.len(), bits::columns(tokens));
        let shared: Vec<usize> =
            (0..tokens).filter(|t| active[t / 32] >> (t % 32) & 1 == 1).collect();
        let mut plan = Self::empty();
        let mut slots_of_token = vec![vec![]; tokens];
        for e in 0..experts + shape.shared_experts as usize {
            let routed = e < experts;
            let mut of_expert: Vec<usize> =
                if routed { bits::tokens_of(assigned, tokens, e) } else { shared.clone() };
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
            plan.end_expert(shape, e as u32);
        }
        for slots in slots_of_token {
            plan.slot_of.extend(slots);
            plan.token_offsets.push(plan.slot_of.len() as u32);
        }
        plan
    }

    fn empty() -> Self {
        Self {
            expert_offsets: vec![0],
            token_offsets: vec![0],
            active: vec![],
            skinny: Items { items: vec![], offsets: vec![0] },
            tiles: Items { items: vec![], offsets: vec![0] },
            token_of: vec![],
            gate_of: vec![],
            slot_of: vec![],
        }
    }

    /// Ends an expert whose slots are those since the last one ended: its items and offsets.
    fn end_expert(&mut self, shape: &PlanShape, e: u32) {
        let mut row = self.expert_offsets.last().copied().unwrap_or(0);
        let end = self.token_of.len() as u32;
        while row < end {
            let rest = end - row;
            if rest < shape.tile_rows && rest <= shape.skinny_rows {
                self.skinny.items.push([e, row]);
                row = end;
            } else {
                self.tiles.items.push([e, row]);
                row += shape.tile_rows;
            }
        }
        self.expert_offsets.push(end);
        self.skinny.offsets.push(self.skinny.items.len() as u32);
        self.tiles.offsets.push(self.tiles.items.len() as u32);
    }

    /// The plan of rows whose experts the host knows, such as those that came from other devices:
    /// `rows_of[e]` are the rows that expert e takes, in the order in which its slots are to be. What
    /// the matmuls read is there; the lists by token and the gates are left empty, since what combines
    /// such rows is elsewhere.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for other experts than the shape's, for more rows than its slots, for a row
    /// that is none of its tokens, or for 0 `tile_rows`.
    pub fn of_rows(shape: &PlanShape, rows_of: &[impl AsRef<[u32]>]) -> Result<Self> {
        let (experts, slots) = (shape.all_experts() as usize, shape.slots()? as usize);
        crate::error::not_zero(&[("tile_rows", shape.tile_rows)])?;
        if rows_of.len() != experts {
            let reason = format!("of {} experts, the plan has {experts}", rows_of.len());
            return Err(Error::invalid("rows_of", reason));
        }
        let mut plan = Self::empty();
        for (e, rows) in (0..).zip(rows_of) {
            let rows = rows.as_ref();
            if let Some(row) = rows.iter().find(|row| **row >= shape.tokens) {
                let reason = format!("row {row} of {}, for expert {e}", shape.tokens);
                return Err(Error::invalid("rows_of", reason));
            }
            plan.token_of.extend(rows);
            if plan.token_of.len() > slots {
                let reason = format!("more than the plan's {slots} slots, with expert {e}");
                return Err(Error::invalid("rows_of", reason));
            }
            if !rows.is_empty() && e < shape.experts {
                plan.active.push(e);
            }
            plan.end_expert(shape, e);
        }
        Ok(plan)
    }

    /// The words of a plan's buffer, as [`HostPlan::from_words`] takes them apart: for a plan that the
    /// host makes. What a list does not fill is 0.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`]; [`Error::Invalid`] where the plan is not one of this shape.
    pub fn to_words(&self, shape: &PlanShape) -> Result<Vec<u32>> {
        let at = shape.sections()?;
        let x = shape.all_experts() as usize;
        let gates: Vec<u32> = self.gate_of.iter().map(|g| g.to_bits()).collect();
        let flat = |items: &Items| items.items.concat();
        let [skinny, tiles] = [&self.skinny, &self.tiles].map(flat);
        let mut words = vec![0; at.words as usize];
        for (first, end, list) in [
            (at.expert_offsets, at.token_offsets, &self.expert_offsets),
            (at.token_offsets, at.active, &self.token_offsets),
            (at.active, at.skinny_offsets, &self.active),
            (at.skinny_offsets, at.tile_offsets, &self.skinny.offsets),
            (at.tile_offsets, at.skinny_items, &self.tiles.offsets),
            (at.skinny_items, at.tile_items, &skinny),
            (at.tile_items, at.ranks, &tiles),
            (at.token_of, at.gate_of, &self.token_of),
            (at.gate_of, at.slot_of, &gates),
            (at.slot_of, at.words, &self.slot_of),
        ] {
            let section = &mut words[first as usize..end as usize];
            let place = section.get_mut(..list.len());
            let fits = place.filter(|_| self.expert_offsets.len() == x + 1);
            let no = || Error::invalid("shape", format!("{shape:?} is not of this plan"));
            fits.ok_or_else(no)?.copy_from_slice(list);
        }
        let counts = [self.token_of.len(), self.active.len(), tiles.len() / 2, skinny.len() / 2];
        for (word, count) in words.iter_mut().zip(counts) {
            *word = count as u32;
        }
        Ok(words)
    }
}
