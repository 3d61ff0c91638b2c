//! Rules of a model for a layer that has fewer experts than the model's.
use super::{BlockRule, Groups, Routing};

impl Routing {
    /// The rule of a model of `from` experts for a layer of only `to` of them, for machines that cannot hold all. K and k are
    /// cut to the experts there are. Groups keep their size, and the share of them that a token may use (enough for its K
    /// experts); where they no longer divide the experts, there are none. A block elects its share of the experts, but at
    /// least K where it did before. For `from` experts and more, the rule as it is.
    #[must_use]
    pub fn with_fewer_experts(self, from: u32, to: u32) -> Self {
        if to >= from {
            return self;
        }
        match self {
            Self::TokenChoice(mut rule) => {
                rule.experts_per_token = rule.experts_per_token.min(to);
                let k = rule.experts_per_token;
                rule.groups = rule.groups.and_then(|groups| fewer_groups(groups, from, to, k));
                rule.coreset = rule.coreset.map(|block| fewer_elected(block, from, to, k));
                rule.into()
            }
            Self::ExpertChoice(mut rule) => {
                rule.experts_per_token = rule.experts_per_token.min(to);
                rule.max_experts_per_token = rule.max_experts_per_token.min(to);
                rule.into()
            }
            Self::SequenceTop(mut rule) => {
                rule.experts_per_token = rule.experts_per_token.min(to);
                rule.into()
            }
        }
    }
}

/// `n` of `from`, for `to` of them, rounded down.
fn share(n: u32, from: u32, to: u32) -> u32 {
    (u64::from(n) * u64::from(to) / u64::from(from)) as u32 // at most `n`: `to` is less than `from`
}

fn fewer_groups(groups: Groups, from: u32, to: u32, k: u32) -> Option<Groups> {
    let Groups { count, per_token } = groups;
    let size = from.checked_div(count).filter(|&size| size > 0)?;
    let left = to / size;
    let per_token = share(per_token, count, left).max(k.div_ceil(size)).max(1);
    (to.is_multiple_of(size) && per_token <= left).then_some(Groups::new(left, per_token))
}

fn fewer_elected(rule: BlockRule, from: u32, to: u32, k: u32) -> BlockRule {
    let part = |n: u32| share(n, from, to).max(n.min(k));
    match rule {
        BlockRule::Mass { p, floor } => BlockRule::Mass { p, floor: part(floor) },
        BlockRule::Capacity(n) => BlockRule::Capacity(part(n)),
        BlockRule::Vote(n) => BlockRule::Vote(part(n)),
        BlockRule::Union(n) => BlockRule::Union(n.min(to)),
    }
}
