//! How the experts' work is cut, so that what lies between its kernels fits bindings and the caller's limit.
use crate::weights::PANEL;
use crate::{Error, Result};

/// What a cut follows from.
pub(super) struct Sizes {
    pub(super) tokens: u32,
    pub(super) slots: u32,
    pub(super) hidden: u32,
    pub(super) intermediate: u32,
    /// Bytes of a row of `hidden` that is copied for each slot; 0 where matmuls read it in place.
    pub(super) gathered: u64,
    /// Whether sums over slots that are made in turn need a place of their own: `out` is not f32, or it is
    /// added to.
    pub(super) sums: bool,
    /// Most bytes of a binding.
    pub(super) binding: u64,
}

/// Where the work is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Slots whose rows of `h` lie in one buffer.
    pub(super) slots: u32,
    /// Columns of `y` at a time.
    pub(super) columns: u32,
    /// Whether stretches of slots take turns: each is combined before the next takes its place. Otherwise `h`
    /// is there as a whole, and stretches of columns take turns.
    pub(super) in_turn: bool,
}

/// Fewest slots of a turn: below, launching work is all it costs.
const LEAST: u64 = 64;

impl Sizes {
    /// Slots whose rows of `h`, and copied rows, fit a binding.
    fn slots_of_buffer(&self) -> u64 {
        let row = self.gathered.max(4 * u64::from(self.intermediate));
        (self.binding / row).clamp(1, self.slots.into())
    }

    /// Bytes that lie beside columns of `y`, where `h` is there as a whole.
    fn beside_columns(&self) -> u64 {
        let h = 4 * u64::from(self.slots) * u64::from(self.intermediate);
        h + self.slots_of_buffer() * self.gathered
    }

    /// `h` as a whole, and as many columns of `y` as fit, in `room` where there is a limit.
    fn whole(&self, room: u64) -> Option<Cut> {
        let (slots, most) = (u64::from(self.slots), self.slots_of_buffer());
        let columns = (self.binding.min(room.saturating_sub(self.beside_columns())) / 4 / slots)
            .min(u64::from(self.hidden).next_multiple_of(PANEL.into()));
        let columns = columns as u32 / PANEL * PANEL;
        (columns > 0).then_some(Cut { slots: most as u32, columns, in_turn: false })
    }

    /// Bytes that lie beside the slots of a turn, and those of one of its slots.
    fn of_turns(&self) -> [u64; 2] {
        let row = 4 * u64::from(self.hidden);
        let beside = if self.sums { row * u64::from(self.tokens) } else { 0 };
        [beside, self.gathered + row + 4 * u64::from(self.intermediate)]
    }

    /// Fewest and most slots of a turn.
    fn slots_of_turn(&self) -> [u64; 2] {
        let wide = self.gathered.max(4 * u64::from(self.hidden.max(self.intermediate)));
        let most = (self.binding / wide).min(self.slots.into());
        [LEAST.min(most).max(1), most]
    }

    /// Stretches of slots that take turns in `room`.
    fn in_turn(&self, room: u64) -> Option<Cut> {
        let [beside, each] = self.of_turns();
        let [least, most] = self.slots_of_turn();
        let slots = (room.saturating_sub(beside) / each).min(most);
        let columns = self.hidden.next_multiple_of(PANEL);
        (slots >= least).then_some(Cut { slots: slots as u32, columns, in_turn: true })
    }

    /// Second matmuls of a cut: what the number of dispatches grows with.
    fn pieces(&self, cut: &Cut) -> u64 {
        let stretches = u64::from(self.slots.div_ceil(cut.slots));
        stretches * if cut.in_turn { 1 } else { self.hidden.div_ceil(cut.columns).into() }
    }

    /// The cut within the caller's `limit` of scratch, of which `used` bytes are taken; without one whatever
    /// fits a binding.
    pub(super) fn cut(&self, limit: Option<u64>, used: u64) -> Result<Cut> {
        let Some(limit) = limit else {
            return self.whole(u64::MAX).ok_or(Error::Limit {
                name: "tokens",
                limit: "max_storage_buffer_binding_size",
                need: u64::from(self.slots) * 4 * u64::from(PANEL),
                have: self.binding,
            });
        };
        let room = limit.saturating_sub(used);
        // Where both fit: which makes fewer dispatches.
        let both = [self.whole(room), self.in_turn(room)];
        both.into_iter().flatten().min_by_key(|cut| self.pieces(cut)).ok_or_else(|| {
            let [beside, each] = self.of_turns();
            let turns = beside + each * self.slots_of_turn()[0];
            let columns = 4 * u64::from(self.slots) * u64::from(PANEL);
            let need = used + turns.min(self.beside_columns() + columns);
            Error::invalid("scratch_limit", format!("{limit} bytes, at least {need} are needed"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// LLaDA2.0-mini's shape with one shared expert, on WebGPU's default bindings.
    fn of(tokens: u32, sums: bool) -> Sizes {
        let (hidden, intermediate, binding) = (2048, 512, 128 << 20);
        Sizes { tokens, slots: 9 * tokens, hidden, intermediate, gathered: 0, sums, binding }
    }

    fn bytes(sizes: &Sizes, cut: Cut) -> u64 {
        let rows = u64::from(if cut.in_turn { cut.slots } else { sizes.slots });
        let beside = if cut.in_turn { sizes.of_turns()[0] } else { 0 };
        beside + rows * 4 * u64::from(cut.columns + sizes.intermediate)
    }

    #[test]
    fn cuts_stay_within_their_room() {
        for tokens in [1, 7, 512, 16_384, 65_536] {
            for sums in [false, true] {
                let sizes = of(tokens, sums);
                let mut last = u64::MAX;
                for limit in (20..32).map(|shift| 1u64 << shift) {
                    let Ok(cut) = sizes.cut(Some(limit), 1000) else { continue };
                    assert!(bytes(&sizes, cut) + 1000 <= limit, "{tokens} {sums} {limit}: {cut:?}");
                    let pieces = sizes.pieces(&cut);
                    assert!(pieces <= last, "{tokens} {sums} {limit}: {cut:?}");
                    last = pieces;
                }
                assert!(last < u64::MAX);
                let whole = sizes.cut(None, 0).unwrap();
                assert!(!whole.in_turn);
            }
        }
    }

    #[test]
    fn the_least_that_is_said_is_enough() {
        for sums in [false, true] {
            let sizes = of(16_384, sums);
            let Err(Error::Invalid { name, reason }) = sizes.cut(Some(5), 70) else { panic!() };
            assert_eq!(name, "scratch_limit");
            let need: u64 =
                reason.split(' ').find_map(|word| word.parse().ok().filter(|n| *n > 5)).unwrap();
            assert!(sizes.cut(Some(need), 70).unwrap().in_turn);
            assert!(sizes.cut(Some(need - 1), 70).is_err());
        }
    }
}
