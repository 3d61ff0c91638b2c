//! Which rank holds which experts, and in which chunks rows travel to them. Plain data, the same on
//! every rank.
use crate::{Error, Result};
use std::ops::Range;

/// Which experts each rank holds: neighbours, in the order of the ranks.
///
/// ```
/// use wgmoe_mpi::Split;
///
/// let split = Split::even(5, 2);
/// assert_eq!((split.experts_of(0), split.experts_of(1)), (0..3, 3..5));
/// assert_eq!(Split::new(&[1, 4]).unwrap().experts_of(1), 1..5);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// First expert of each rank, and their number.
    first: Vec<u32>,
}

impl Split {
    /// As many experts for each rank, those left over one each for the first ranks.
    ///
    /// # Panics
    ///
    /// For zero ranks.
    pub fn even(experts: u32, ranks: usize) -> Self {
        assert!(ranks > 0, "`ranks`: expected 1 or more, got 0");
        let ranks = ranks as u32;
        let each = |r: u32| experts / ranks + u32::from(r < experts % ranks);
        let counts: Vec<u32> = (0..ranks).map(each).collect();
        Self::of(&counts)
    }

    /// So many experts for each rank; a rank may hold none.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for no ranks, or more experts than a `u32` counts.
    pub fn new(counts: &[u32]) -> Result<Self> {
        let all: u64 = counts.iter().map(|&n| u64::from(n)).sum();
        if counts.is_empty() || all > u64::from(u32::MAX) {
            return Err(Error::invalid("split", format!("{} ranks, {all} experts", counts.len())));
        }
        Ok(Self::of(counts))
    }

    fn of(counts: &[u32]) -> Self {
        let mut first = vec![0];
        let mut sum = 0;
        for n in counts {
            sum += n;
            first.push(sum);
        }
        Self { first }
    }

    /// Ranks.
    pub fn ranks(&self) -> usize {
        self.first.len() - 1
    }

    /// Experts of all ranks.
    pub fn experts(&self) -> u32 {
        self.first[self.ranks()]
    }

    /// Experts of a rank.
    ///
    /// # Panics
    ///
    /// If there is no such rank.
    pub fn experts_of(&self, rank: usize) -> Range<u32> {
        self.first[rank]..self.first[rank + 1]
    }

    /// The rank that holds an expert.
    ///
    /// # Panics
    ///
    /// If there is no such expert.
    pub fn rank_of(&self, expert: u32) -> usize {
        assert!(expert < self.experts(), "`expert`: {expert} of {}", self.experts());
        self.first.partition_point(|first| *first <= expert) - 1
    }

    /// Slots of the rank with the most, over the mean of all ranks: the others wait for it. 1 where
    /// nothing was routed.
    ///
    /// # Panics
    ///
    /// If `tokens_per_expert` are not one an expert.
    pub fn slowest_over_mean(&self, tokens_per_expert: &[u32]) -> f64 {
        assert_eq!(tokens_per_expert.len(), self.experts() as usize, "`tokens_per_expert`");
        let slots: Vec<u64> = (0..self.ranks())
            .map(|r| {
                let experts = self.experts_of(r);
                let of = &tokens_per_expert[experts.start as usize..experts.end as usize];
                of.iter().map(|&n| u64::from(n)).sum()
            })
            .collect();
        let (most, sum) = (slots.iter().max().copied().unwrap_or(0), slots.iter().sum::<u64>());
        if sum == 0 { 1.0 } else { most as f64 * self.ranks() as f64 / sum as f64 }
    }
}

/// Some rows of an expert, by their places among all that it takes: those of rank 0's tokens first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) expert: u32,
    pub(crate) rows: Range<u32>,
}

/// What an expert's owner computes at once.
pub(crate) type Chunk = Vec<Piece>;

/// How the rows of one step travel.
#[derive(Debug)]
pub(crate) struct Schedule {
    /// Rows of each rank for each expert, `[rank][expert]`.
    pub(crate) counts: Vec<Vec<u32>>,
    /// Where each expert's slots begin on each rank, and where they end.
    slots: Vec<Vec<u32>>,
    /// Where the rows of each rank begin among those of an expert.
    places: Vec<Vec<u32>>,
    /// Chunks of each owner.
    chunks: Vec<Vec<Chunk>>,
}

fn running(counts: &[u32]) -> Vec<u32> {
    let mut sum = 0;
    let mut all = vec![0];
    for n in counts {
        sum += n;
        all.push(sum);
    }
    all
}

impl Schedule {
    /// Chunks of at most `chunk_rows` rows, a multiple of `tile_rows`.
    ///
    /// An expert's rows are cut at multiples of `tile_rows` alone. A chunk then makes the items of work
    /// that the expert makes with all its rows at once, and each row meets the kernel that it would
    /// meet on one device.
    pub(crate) fn new(
        counts: Vec<Vec<u32>>,
        split: &Split,
        tile_rows: u32,
        chunk_rows: u32,
    ) -> Self {
        let experts = split.experts() as usize;
        let slots = counts.iter().map(|c| running(c)).collect();
        let mut places = vec![vec![0; experts]];
        for of_rank in &counts {
            let last = &places[places.len() - 1];
            places.push(last.iter().zip(of_rank).map(|(sum, n)| sum + n).collect());
        }
        let all = &places[counts.len()];
        let chunks = (0..split.ranks())
            .map(|owner| {
                let of = split.experts_of(owner).map(|e| (e, all[e as usize]));
                cut(of, tile_rows, chunk_rows)
            })
            .collect();
        Self { counts, slots, places, chunks }
    }

    /// Rounds until every owner has all its rows.
    pub(crate) fn rounds(&self) -> usize {
        self.chunks.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// What an owner computes in a round.
    pub(crate) fn chunk(&self, owner: usize, round: usize) -> &[Piece] {
        self.chunks[owner].get(round).map_or(&[], Vec::as_slice)
    }

    /// The rows of a piece that a rank's tokens have, by their places among that rank's rows for the
    /// expert.
    fn part(&self, rank: usize, piece: &Piece) -> Range<u32> {
        let e = piece.expert as usize;
        let (first, end) = (self.places[rank][e], self.places[rank + 1][e]);
        let start = piece.rows.start.clamp(first, end) - first;
        start..piece.rows.end.clamp(first, end) - first
    }

    /// The slots of a rank that travel to an owner in a round. They are neighbours: slots are ordered
    /// by expert, and so is a chunk, which has all rows of its experts but for a tail or a head.
    pub(crate) fn segment(&self, rank: usize, owner: usize, round: usize) -> Range<u32> {
        let mut segment: Option<Range<u32>> = None;
        for piece in self.chunk(owner, round) {
            let part = self.part(rank, piece);
            if part.is_empty() {
                continue;
            }
            let first = self.slots[rank][piece.expert as usize];
            let (start, end) = (first + part.start, first + part.end);
            let begin = segment.map_or(start, |s| s.start);
            segment = Some(begin..end);
        }
        segment.unwrap_or(0..0)
    }

    /// For each expert of an owner's chunk (counted from its first): the rows it takes, by their places
    /// among all that come, rank after rank.
    pub(crate) fn rows(&self, split: &Split, owner: usize, round: usize) -> Vec<Vec<u32>> {
        let experts = split.experts_of(owner);
        let mut rows = vec![vec![]; experts.len()];
        let mut next = 0;
        for rank in 0..self.counts.len() {
            for piece in self.chunk(owner, round) {
                let n = self.part(rank, piece).len() as u32;
                rows[(piece.expert - experts.start) as usize].extend(next..next + n);
                next += n;
            }
        }
        rows
    }

    /// Slots of a rank's tokens.
    pub(crate) fn slots_of(&self, rank: usize) -> u32 {
        self.slots[rank].last().copied().unwrap_or(0)
    }

    /// Tokens of each expert.
    pub(crate) fn tokens_per_expert(&self) -> &[u32] {
        &self.places[self.counts.len()]
    }
}

/// Experts and their rows in chunks.
fn cut(experts: impl Iterator<Item = (u32, u32)>, tile_rows: u32, chunk_rows: u32) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = vec![];
    let mut chunk: Chunk = vec![];
    let mut space = chunk_rows;
    for (expert, all) in experts {
        let mut start = 0;
        while start < all {
            let left = all - start;
            let n = if left <= space { left } else { space / tile_rows * tile_rows };
            if n > 0 {
                chunk.push(Piece { expert, rows: start..start + n });
                start += n;
                space -= n;
            }
            if start < all {
                chunks.push(std::mem::take(&mut chunk));
                space = chunk_rows;
            }
        }
    }
    if !chunk.is_empty() {
        chunks.push(chunk);
    }
    chunks
}

#[cfg(test)]
#[expect(clippy::needless_range_loop, reason = "ranks and owners are what the loops are over")]
mod tests {
    use super::*;

    fn counts(ranks: usize, experts: usize, seed: u32) -> Vec<Vec<u32>> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let n = state >> 24;
            if n < 80 { 0 } else { n % 57 }
        };
        (0..ranks).map(|_| (0..experts).map(|_| next()).collect()).collect()
    }

    /// Every row travels once, in slot order, and is computed among the rows of its expert in the
    /// order of ranks and slots.
    #[test]
    fn every_row_travels_once() {
        for (ranks, experts, seed) in [(1, 4, 1), (3, 7, 2), (4, 64, 3), (8, 5, 4), (5, 1, 5)] {
            let split = Split::even(experts, ranks);
            let counts = counts(ranks, experts as usize, seed);
            for chunk_rows in [16, 32, 48, 4096] {
                let s = Schedule::new(counts.clone(), &split, 16, chunk_rows);
                // Of each rank: slots sent so far. Of each expert: what came, as (rank, place there).
                let mut sent = vec![vec![0; ranks]; ranks];
                let mut came = vec![vec![]; experts as usize];
                for round in 0..s.rounds() {
                    for owner in 0..ranks {
                        let mut arrived = vec![];
                        for rank in 0..ranks {
                            let segment = s.segment(rank, owner, round);
                            if !segment.is_empty() {
                                let own = split.experts_of(owner);
                                let first = s.slots[rank][own.start as usize];
                                assert_eq!(segment.start, first + sent[rank][owner]);
                                sent[rank][owner] += segment.len() as u32;
                            }
                            arrived.extend(segment.map(|slot| (rank, slot)));
                        }
                        assert!(arrived.len() <= chunk_rows as usize);
                        let rows = s.rows(&split, owner, round);
                        for (e, rows) in split.experts_of(owner).zip(rows) {
                            came[e as usize].extend(rows.iter().map(|&r| arrived[r as usize]));
                        }
                    }
                }
                for (e, came) in came.iter().enumerate() {
                    let want: Vec<_> = (0..ranks)
                        .flat_map(|r| (s.slots[r][e]..s.slots[r][e + 1]).map(move |slot| (r, slot)))
                        .collect();
                    assert_eq!(came, &want, "expert {e} of {ranks} ranks, chunks of {chunk_rows}");
                }
            }
        }
    }

    /// Chunks begin at whole tiles of an expert.
    #[test]
    fn experts_are_cut_at_tiles() {
        let chunks = cut([(0, 20), (1, 0), (2, 100), (3, 5)].into_iter(), 16, 48);
        let piece = |expert, rows| Piece { expert, rows };
        assert_eq!(
            chunks,
            [
                vec![piece(0, 0..20), piece(2, 0..16)],
                vec![piece(2, 16..64)],
                vec![piece(2, 64..100), piece(3, 0..5)],
            ]
        );
    }

    #[test]
    fn ranks_of_experts() {
        let split = Split::even(5, 8);
        assert_eq!((0..8).map(|r| split.experts_of(r).len()).sum::<usize>(), 5);
        assert_eq!((0..5).map(|e| split.rank_of(e)).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert_eq!(Split::new(&[0, 3, 0, 2]).unwrap().rank_of(3), 3);
        assert_eq!(Split::new(&[2, 2]).unwrap().slowest_over_mean(&[1, 2, 0, 3]), 1.0);
        assert_eq!(Split::new(&[1, 3]).unwrap().slowest_over_mean(&[5, 1, 0, 0]), 10.0 / 6.0);
    }
}
