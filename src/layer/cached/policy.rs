//! Which experts a cache keeps: policies, as plain data.

/// When the experts that a [`CachedLayer`](super::CachedLayer) holds change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CachePolicy {
    /// At every miss: what is missing comes, and the least recently used leaves.
    #[default]
    LeastRecentlyUsed,
    /// Every so many steps, as TIDE does (arXiv 2605.20179): the absent experts that took the most
    /// slots since the last time change places with those there that took the fewest, as many coming as
    /// leaving. What is missing in between passes through places that are set aside, and changes nothing.
    Interval {
        /// Steps from one change to the next, at least 1. The first step fills the cache.
        steps: u32,
        /// Places for experts that pass through, at least 1: they are taken from the cache's.
        passing: u32,
    },
}

impl CachePolicy {
    /// Places that are set aside for experts that pass through.
    pub(super) fn passing(self) -> usize {
        match self {
            Self::LeastRecentlyUsed => 0,
            Self::Interval { passing, .. } => passing as usize,
        }
    }
}

/// Places and the experts that come into them: the absent with the most slots against those there with the
/// fewest, pair by pair while the newcomer has more. Of equals the lower expert comes, and the lower place
/// is left. An empty place counts as less than any slot; `fixed` experts stay.
pub(super) fn exchange(
    held: &[Option<u32>],
    slots: &[u64],
    fixed: impl Fn(u32) -> bool,
) -> Vec<(usize, u32)> {
    let of = |expert: u32| slots[expert as usize];
    let mut coming: Vec<u32> =
        (0..slots.len() as u32).filter(|&e| of(e) > 0 && !held.contains(&Some(e))).collect();
    coming.sort_by_key(|&e| std::cmp::Reverse(of(e)));
    let mut leaving: Vec<usize> =
        (0..held.len()).filter(|&place| held[place].is_none_or(|e| !fixed(e))).collect();
    leaving.sort_by_key(|&place| held[place].map(of));
    let pairs = leaving.into_iter().zip(coming);
    pairs.take_while(|&(place, new)| held[place].is_none_or(|old| of(old) < of(new))).collect()
}

#[cfg(test)]
mod tests {
    use super::exchange;

    #[test]
    fn the_most_used_change_places_with_the_least_used() {
        let held = [Some(0), Some(1), None, Some(3)];
        //              0  1  2  3  4  5  6
        let slots = [4, 1, 2, 2, 9, 0, 2];
        // 4 takes the empty place, 2 that of 1; 6 has no more than 3.
        assert_eq!(exchange(&held, &slots, |_| false), [(2, 4), (1, 2)]);
        // 1 stays: 2 has no more than 3.
        assert_eq!(exchange(&held, &slots, |e| e == 1), [(2, 4)]);
        assert_eq!(exchange(&held, &[0; 7], |_| false), []);
        assert_eq!(exchange(&[], &slots, |_| false), []);
    }

    #[test]
    fn what_is_there_stays_at_equal_use() {
        assert_eq!(exchange(&[Some(0), Some(1)], &[3, 3, 3, 3], |_| false), []);
        assert_eq!(exchange(&[Some(0), Some(1)], &[3, 2, 3, 4], |_| false), [(1, 3)]);
        // Of equals the lower expert.
        assert_eq!(exchange(&[Some(1)], &[5, 0, 5], |_| false), [(0, 0)]);
    }
}
