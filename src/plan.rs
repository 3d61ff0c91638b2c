//! The plan: what the expert matmuls and the combination read, in one `u32` buffer with sections known to the host.
//!
//! | section | words | what |
//! |---|---|---|
//! | head | 8 | slots, active experts, tiles, skinny items, 0... |
//! | `expert_offsets` | X + 1 | first slot of each expert, exclusive; X = experts + shared experts |
//! | `token_offsets` | T + 1 | first entry of each token in `slot_of` |
//! | `active` | E | routed experts that have a token, ascending |
//! | `skinny_offsets`, `tile_offsets` | X + 1 each | first item of each expert |
//! | `skinny_items`, `tile_items` | 2 each | (expert, first slot) of each item |
//! | `ranks` | E x ceil(T / 32) | slots of an expert below each word of its bits |
//! | `token_of`, `gate_of` | S each | token, gate (f32 bits) of each slot |
//! | `slot_of` | S | slots of each token: routed experts ascending, then shared; `u32::MAX`: cut off |
use crate::slice::bytes_of;
use crate::{Error, Result};

/// Experts that one bit-set row of a token can hold, a limit of the kernels' workgroup memory.
pub const MAX_EXPERTS: u32 = 1024;

/// Sizes of a plan: everything the host must know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PlanShape {
    /// T: tokens.
    pub tokens: u32,
    /// E: routed experts, at most [`MAX_EXPERTS`].
    pub experts: u32,
    /// Shared experts: each takes every token with gate 1.
    pub shared_experts: u32,
    /// Bound of the routed slots; work past it is cut off and counted as ignored.
    pub routed_slots: u32,
    /// Rows of an item of the tile kernel.
    pub tile_rows: u32,
    /// Most rows of an item of the skinny kernel; 0: none.
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
    /// [`Error::Invalid`] for zero tokens, experts or tile rows, more experts than [`MAX_EXPERTS`], or a plan of 2^32
    /// words or more.
    pub fn sections(&self) -> Result<Sections> {
        for (name, n) in
            [("tokens", self.tokens), ("experts", self.experts), ("tile_rows", self.tile_rows)]
        {
            if n == 0 {
                return Err(Error::invalid(name, "must not be 0"));
            }
        }
        if self.experts > MAX_EXPERTS || self.shared_experts > MAX_EXPERTS {
            return Err(Error::invalid("experts", format!("at most {MAX_EXPERTS}")));
        }
        let (e, x, t) =
            (u64::from(self.experts), u64::from(self.all_experts()), u64::from(self.tokens));
        let s = u64::from(self.slots()?);
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
            ranks: section(bytes_of("tokens", &[e, t.div_ceil(32)], 1)?)?,
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

/// A plan read back, in host types: for tests, reports, and engines that want to look.
#[derive(Clone, Debug, PartialEq)]
pub struct HostPlan {
    /// First slot of each expert, exclusive, `[X + 1]`.
    pub expert_offsets: Vec<u32>,
    /// First entry of each token in `slot_of`, `[T + 1]`.
    pub token_offsets: Vec<u32>,
    /// Routed experts that have a token.
    pub active: Vec<u32>,
    /// (expert, first slot) of each item of the skinny kernel, and the first item of each expert `[X + 1]`.
    pub skinny: (Vec<[u32; 2]>, Vec<u32>),
    /// The same of the tile kernel.
    pub tiles: (Vec<[u32; 2]>, Vec<u32>),
    /// Token of each slot.
    pub token_of: Vec<u32>,
    /// Gate of each slot.
    pub gate_of: Vec<f32>,
    /// Slots of each token.
    pub slot_of: Vec<u32>,
}

impl HostPlan {
    /// Takes apart the words of a plan of this shape.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`]; [`Error::Size`] if `words` are fewer than the shape's, or hold no plan.
    pub fn from_words(shape: &PlanShape, words: &[u32]) -> Result<Self> {
        let at = shape.sections()?;
        let short =
            Error::Size { name: "words", expected: shape.bytes()?, got: words.len() as u64 * 4 };
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
            skinny: (
                pairs(take(at.skinny_items, 2 * head[3].min(shape.skinny()?))?),
                take(at.skinny_offsets, x + 1)?,
            ),
            tiles: (
                pairs(take(at.tile_items, 2 * head[2].min(shape.tiles()?))?),
                take(at.tile_offsets, x + 1)?,
            ),
            token_of: take(at.token_of, head[0].min(shape.slots()?))?,
            gate_of: take(at.gate_of, head[0].min(shape.slots()?))?
                .into_iter()
                .map(f32::from_bits)
                .collect(),
            slot_of: take(at.slot_of, head[0].min(shape.slots()?))?,
        })
    }

    /// The CPU twin of the three plan kernels: the plan of a bit set and its gates `[tokens, experts]`.
    ///
    /// # Panics
    ///
    /// If `assigned` or `gates` are not of the shape's sizes.
    pub fn cpu(shape: &PlanShape, assigned: &[u32], gates: &[f32]) -> Self {
        let (tokens, experts) = (shape.tokens as usize, shape.experts as usize);
        let bound = u64::from(shape.routed_slots)
            + u64::from(shape.shared_experts) * u64::from(shape.tokens);
        let mut plan = Self {
            expert_offsets: vec![0],
            token_offsets: vec![0],
            active: vec![],
            skinny: (vec![], vec![0]),
            tiles: (vec![], vec![0]),
            token_of: vec![],
            gate_of: vec![],
            slot_of: vec![],
        };
        let mut slots_of_token = vec![vec![]; tokens];
        for e in 0..experts + shape.shared_experts as usize {
            let routed = e < experts;
            let of_expert: Vec<usize> = if routed {
                crate::bits::tokens_of(assigned, tokens, e)
            } else {
                (0..tokens).collect()
            };
            if routed && !of_expert.is_empty() {
                plan.active.push(e as u32);
            }
            let first = plan.token_of.len();
            for &t in &of_expert {
                let slot = plan.token_of.len();
                if slot as u64 >= bound {
                    slots_of_token[t].push(u32::MAX);
                    continue;
                }
                slots_of_token[t].push(slot as u32);
                plan.token_of.push(t as u32);
                plan.gate_of.push(if routed { gates[t * experts + e] } else { 1.0 });
            }
            let mut row = first;
            let end = plan.token_of.len();
            while row < end {
                let rest = end - row;
                let item = [e as u32, row as u32];
                if rest < shape.tile_rows as usize && rest <= shape.skinny_rows as usize {
                    plan.skinny.0.push(item);
                    row = end;
                } else {
                    plan.tiles.0.push(item);
                    row += shape.tile_rows as usize;
                }
            }
            plan.expert_offsets.push(end as u32);
            plan.skinny.1.push(plan.skinny.0.len() as u32);
            plan.tiles.1.push(plan.tiles.0.len() as u32);
        }
        for slots in slots_of_token {
            plan.slot_of.extend(slots);
            plan.token_offsets.push((plan.slot_of.len() as u64).min(bound) as u32);
        }
        plan.slot_of.truncate(bound as usize);
        plan
    }
}
