//! What a routing rule chooses, found by sorting whole lists: the plainest program of the rules as
//! their papers have them. It shares no code with the kernels or with the CPU twins, so that both
//! being wrong alike is seen. Blocks have 32 tokens, and the batch is one sequence.
use wgmoe::Routing;
use wgmoe::routing::{BlockRule, ExpertChoice, GateRule, Groups, Normalise, Score, TokenChoice};

const BLOCK: usize = 32;

/// Of each token, its experts in ascending order, each with its gate.
pub type Chosen = Vec<Vec<(usize, f64)>>;

/// Logits, scores and selection values, `[tokens, experts]` each.
#[derive(Clone, Copy)]
struct Values<'a> {
    experts: usize,
    logits: &'a [f32],
    scores: &'a [f32],
    values: &'a [f32],
}

/// The `n` of `among` with the highest values; equal ones in ascending order, NaN last.
fn best<T: PartialOrd>(n: usize, mut among: Vec<usize>, value: impl Fn(usize) -> T) -> Vec<usize> {
    among.sort_unstable();
    // Stable, so that equal values stay in ascending order.
    among.sort_by(|&a, &b| {
        let (a, b) = (value(a), value(b));
        let is_nan = |v: &T| v.partial_cmp(v).is_none();
        is_nan(&a).cmp(&is_nan(&b)).then(b.partial_cmp(&a).unwrap_or(std::cmp::Ordering::Equal))
    });
    among.truncate(n);
    among
}

impl Values<'_> {
    fn tokens(&self) -> usize {
        self.values.len() / self.experts
    }

    fn value(&self, t: usize, e: usize) -> f32 {
        self.values[t * self.experts + e]
    }

    fn every_expert(&self) -> Vec<usize> {
        (0..self.experts).collect()
    }

    /// A token's `k` best of some experts.
    fn top(&self, t: usize, k: usize, among: Vec<usize>) -> Vec<usize> {
        best(k, among, |e| self.value(t, e))
    }

    /// Those of a token's best groups: a group is worth its two best experts.
    fn of_groups(&self, t: usize, groups: Option<Groups>, among: Vec<usize>) -> Vec<usize> {
        let Some(Groups { count, per_token, .. }) = groups.filter(|g| g.count > 1) else {
            return among;
        };
        let size = self.experts / count as usize;
        let worth = |group: usize| {
            let own = among.iter().copied().filter(|e| e / size == group).collect();
            match self.top(t, 2, own)[..] {
                [a] if size == 1 => Some(self.value(t, a)),
                [a, b] => Some(self.value(t, a) + self.value(t, b)),
                _ => None,
            }
        };
        let there = (0..count as usize).filter(|&g| worth(g).is_some()).collect();
        let kept = best(per_token as usize, there, worth);
        among.into_iter().filter(|e| kept.contains(&(e / size))).collect()
    }

    /// The experts that a block elects.
    fn elect(&self, rule: BlockRule, k: usize, block: std::ops::Range<usize>) -> Vec<usize> {
        let own = |t, k| self.top(t, k, self.every_expert());
        let is_own = |e: &usize, k| block.clone().any(|t| own(t, k).contains(e));
        // Votes are counted in units of 2^-24.
        let mut votes = vec![0i64; self.experts];
        for t in block.clone() {
            for e in own(t, k) {
                votes[e] +=
                    (f64::from(self.value(t, e)) * f64::from(1 << 24)).round_ties_even() as i64;
            }
        }
        let by_votes = best(self.experts, self.every_expert(), |e| votes[e]);
        match rule {
            BlockRule::Mass { p, floor } => {
                let total: i64 = votes.iter().sum();
                let share = (f64::from(p) * f64::from(1 << 24)).round() as i64;
                let (mut sum, mut n) = (0, 0);
                while total > 0 && n < self.experts {
                    sum += votes[by_votes[n]];
                    n += 1;
                    if i128::from(sum) << 24 > i128::from(share) * i128::from(total) {
                        break;
                    }
                }
                if p >= 1.0 {
                    n = (0..self.experts).filter(|e| is_own(e, k)).count();
                }
                by_votes[..n.max(floor as usize).min(self.experts)].to_vec()
            }
            BlockRule::Vote(n) => by_votes[..n as usize].to_vec(),
            BlockRule::Capacity(n) => {
                let highest = |e| block.clone().map(|t| self.value(t, e)).fold(f32::NAN, f32::max);
                best(n as usize, self.every_expert(), highest)
            }
            BlockRule::Union(n) => {
                self.every_expert().into_iter().filter(|e| is_own(e, n as usize)).collect()
            }
            _ => panic!("no oracle of {rule:?}"),
        }
    }

    fn by_tokens(&self, rule: TokenChoice) -> Vec<Vec<usize>> {
        let k = rule.experts_per_token as usize;
        let mut chosen = vec![];
        for first in (0..self.tokens()).step_by(BLOCK) {
            let block = first..(first + BLOCK).min(self.tokens());
            let elected = match rule.coreset {
                None => self.every_expert(),
                Some(coreset) => self.elect(coreset, k, block.clone()),
            };
            for t in block {
                chosen.push(self.top(t, k, self.of_groups(t, rule.groups, elected.clone())));
            }
        }
        chosen
    }

    fn by_experts(&self, k: u32) -> Vec<Vec<usize>> {
        let tokens = self.tokens();
        let capacity = (tokens * k as usize / self.experts).clamp(1, tokens);
        let mut chosen = vec![vec![]; tokens];
        for e in 0..self.experts {
            for t in best(capacity, (0..tokens).collect(), |t| self.value(t, e)) {
                chosen[t].push(e);
            }
        }
        chosen
    }

    fn by_pairs(&self, k: u32) -> Vec<Vec<usize>> {
        let mut chosen = vec![vec![]; self.tokens()];
        let all = (0..self.values.len()).collect();
        for i in best(self.tokens() * k as usize, all, |i| self.values[i]) {
            chosen[i / self.experts].push(i % self.experts);
        }
        chosen
    }

    /// The gates of a token's experts.
    fn weigh(&self, t: usize, experts: &[usize], gate: GateRule, scale: f32) -> Vec<(usize, f64)> {
        let of = |values: &[f32], e: usize| f64::from(values[t * self.experts + e]);
        let weight = |e| match gate {
            GateRule::Softmax => of(self.logits, e).exp(),
            _ => of(self.scores, e),
        };
        let sum = match gate {
            GateRule::Unnormalised => 1.0,
            _ => experts.iter().map(|&e| weight(e)).sum::<f64>() + 1e-20,
        };
        experts.iter().map(|&e| (e, weight(e) / sum * f64::from(scale))).collect()
    }
}

/// Experts over their capacity keep the tokens that weigh most.
fn drop_over(capacity: usize, experts: usize, chosen: &mut Chosen) {
    for e in 0..experts {
        let gate = |t: usize| chosen[t].iter().find(|pair| pair.0 == e).map(|pair| pair.1);
        let takers = (0..chosen.len()).filter(|&t| gate(t).is_some()).collect();
        let kept = best(capacity, takers, gate);
        for (t, pairs) in chosen.iter_mut().enumerate() {
            pairs.retain(|pair| pair.0 != e || kept.contains(&t));
        }
    }
}

/// What a rule chooses, by logits, scores and selection values `[tokens, experts]`.
///
/// # Panics
///
/// Where no oracle is written for the rule.
pub fn choose(routing: Routing, experts: usize, [logits, scores, values]: [&[f32]; 3]) -> Chosen {
    let of = Values { experts, logits, scores, values };
    let (chosen, gate, scale) = match routing {
        Routing::TokenChoice(rule) => (of.by_tokens(rule), rule.gate, rule.scale),
        Routing::ExpertChoice(ExpertChoice { score, normalise, experts_per_token, .. }) => {
            let gate = match (normalise, score) {
                (Normalise::BeforeSelection, _) => GateRule::Unnormalised,
                (_, Score::Softmax) => GateRule::Softmax,
                _ => GateRule::Normalised,
            };
            (of.by_experts(experts_per_token), gate, 1.0)
        }
        Routing::SequenceTop(rule) => (of.by_pairs(rule.experts_per_token), rule.gate, rule.scale),
        _ => panic!("no oracle of {routing:?}"),
    };
    let mut weighed: Chosen = vec![];
    for (t, mut ids) in chosen.into_iter().enumerate() {
        ids.sort_unstable();
        weighed.push(of.weigh(t, &ids, gate, scale));
    }
    if let Routing::TokenChoice(TokenChoice {
        capacity_factor: Some(factor),
        experts_per_token,
        ..
    }) = routing
    {
        let share = of.tokens() as f64 * f64::from(experts_per_token) / experts as f64;
        let capacity = (share * f64::from(factor) - 1e-6).ceil().max(1.0);
        drop_over(capacity as usize, experts, &mut weighed);
    }
    weighed
}

/// Compares a choice, a bit set `[experts, ceil(tokens / 32)]`, and the gates `[tokens, experts]` of
/// its pairs with what [`choose`] found.
///
/// # Errors
///
/// The first token that differs.
pub fn compare(
    assigned: &[u32],
    gates: &[f32],
    experts: usize,
    want: &Chosen,
) -> Result<(), String> {
    let columns = want.len().div_ceil(32);
    for (t, want) in want.iter().enumerate() {
        let is_set = |e: &usize| assigned[e * columns + t / 32] >> (t % 32) & 1 == 1;
        let got: Vec<usize> = (0..experts).filter(is_set).collect();
        let ids: Vec<usize> = want.iter().map(|pair| pair.0).collect();
        if got != ids {
            return Err(format!("token {t}: experts {got:?}, by sorting {ids:?}"));
        }
        for &(e, want) in want {
            let got = f64::from(gates[t * experts + e]);
            let near = (got - want).abs() <= 1e-7 + 1e-5 * want.abs();
            if !near {
                return Err(format!("token {t}, expert {e}: gate {got}, by sorting {want}"));
            }
        }
    }
    Ok(())
}
