//! What makes a rule senseless for a number of experts. Each check is here once; the rules, the ops and the plan call it.
use super::{
    BlockRule, ExpertChoice, Groups, MAX_GROUPS, MAX_TOP, Routing, SequenceTop, TokenChoice,
};
use crate::error::not_zero;
use crate::{Error, Result};

/// Experts that one bit-set row of a token can hold, a limit of the kernels' workgroup memory.
pub const MAX_EXPERTS: u32 = 1024;

impl Routing {
    /// Checks the rule for this many experts.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], naming the rule's field: zero experts or more than [`MAX_EXPERTS`]; a K of 0 or above the experts
    /// (tokens choosing: or above [`MAX_TOP`]); a `max_experts_per_token` below k or above the experts; groups that do not
    /// divide the experts, or too few for K; a factor that is not finite, a `capacity_factor` that is not positive; a coreset
    /// as of [`BlockRule::check`].
    pub fn check(&self, experts: u32) -> Result<()> {
        few_experts(experts)?;
        match self {
            Self::ExpertChoice(rule) => expert_choice(rule, experts),
            Self::TokenChoice(rule) => {
                let TokenChoice { experts_per_token, groups, scale, .. } = *rule;
                token_choice(experts, experts_per_token, groups)?;
                finite("scale", scale)?;
                if let Some(f) = rule.capacity_factor.filter(|f| !f.is_finite() || *f <= 0.0) {
                    let reason = format!("{f}, must be positive and finite");
                    return Err(Error::invalid("capacity_factor", reason));
                }
                rule.coreset.map_or(Ok(()), |coreset| coreset.check(experts))
            }
            Self::SequenceTop(rule) => {
                let SequenceTop { experts_per_token, scale, .. } = *rule;
                sequence_top(experts, experts_per_token)?;
                finite("scale", scale)
            }
        }
    }
}

impl BlockRule {
    /// Checks the rule's numbers against the experts.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a share outside 0 to 1 (NaN too), a count of 0, a count or floor above `experts`, or a union of
    /// more than [`MAX_TOP`] experts a token.
    pub fn check(self, experts: u32) -> Result<()> {
        match self {
            Self::Mass { p, .. } if !(0.0..=1.0).contains(&p) => {
                let reason = format!("{p}, must be 0 to 1; 1 elects every expert with a vote");
                Err(Error::invalid("p", reason))
            }
            Self::Mass { floor, .. } => at_most_experts("floor", floor, experts),
            Self::Capacity(count) => elected("capacity", count, experts),
            Self::Vote(count) => elected("vote", count, experts),
            Self::Union(count) => {
                elected("union", count, experts)?;
                at_most("union", count, MAX_TOP)
            }
        }
    }
}

/// Errors for more experts than the kernels' workgroup memory holds.
pub(crate) fn few_experts(experts: u32) -> Result<()> {
    not_zero(&[("experts", experts)])?;
    at_most("experts", experts, MAX_EXPERTS)
}

/// Errors for more shared experts than a plan takes.
pub(crate) fn few_shared(shared_experts: u32) -> Result<()> {
    at_most("shared_experts", shared_experts, MAX_EXPERTS)
}

/// Errors where the last `shared_experts` of `all` experts leave none that is routed, or too many.
pub(crate) fn shared_of(all: u32, shared_experts: u32) -> Result<()> {
    if all > 0 && shared_experts >= all {
        let reason = format!("{shared_experts} of only {all} experts, and one must be routed");
        return Err(Error::invalid("shared_experts", reason));
    }
    few_shared(shared_experts)?;
    few_experts(all - shared_experts.min(all))
}

/// Errors for a choice of K experts of a token, perhaps from groups, that cannot be made.
pub(crate) fn token_choice(
    experts: u32,
    experts_per_token: u32,
    groups: Option<Groups>,
) -> Result<()> {
    few_experts(experts)?;
    not_zero(&[("experts_per_token", experts_per_token)])?;
    at_most_experts("experts_per_token", experts_per_token, experts)?;
    at_most("experts_per_token", experts_per_token, MAX_TOP)?;
    let Some(Groups { count, per_token }) = groups else { return Ok(()) };
    let wrong = |reason: String| Err(Error::invalid("groups", reason));
    if count == 0 || count > MAX_GROUPS {
        return wrong(format!("{count}, must be 1 to {MAX_GROUPS}"));
    }
    if !experts.is_multiple_of(count) {
        return wrong(format!("{count} do not divide {experts} experts"));
    }
    if per_token == 0 {
        return wrong("a token must be allowed at least 1".into());
    }
    if per_token > count {
        return wrong(format!("{per_token} of only {count} groups"));
    }
    let allowed = experts / count * per_token;
    if experts_per_token > allowed {
        let of = format!("{per_token} of {count} groups");
        let reason = format!("{experts_per_token} of only {allowed} experts, those of {of}");
        return Err(Error::invalid("experts_per_token", reason));
    }
    Ok(())
}

/// Errors for a choice of the highest pairs of a sequence that cannot be made.
pub(crate) fn sequence_top(experts: u32, experts_per_token: u32) -> Result<()> {
    few_experts(experts)?;
    not_zero(&[("experts_per_token", experts_per_token)])?;
    at_most_experts("experts_per_token", experts_per_token, experts)
}

fn expert_choice(rule: &ExpertChoice, experts: u32) -> Result<()> {
    let ExpertChoice { experts_per_token, max_experts_per_token, .. } = *rule;
    not_zero(&[("experts_per_token", experts_per_token)])?;
    at_most_experts("experts_per_token", experts_per_token, experts)?;
    if max_experts_per_token < experts_per_token {
        let reason = format!(
            "{max_experts_per_token} is less than `experts_per_token`, {experts_per_token}"
        );
        return Err(Error::invalid("max_experts_per_token", reason));
    }
    at_most_experts("max_experts_per_token", max_experts_per_token, experts)
}

fn elected(name: &'static str, count: u32, experts: u32) -> Result<()> {
    not_zero(&[(name, count)])?;
    at_most_experts(name, count, experts)
}

fn at_most_experts(name: &'static str, n: u32, experts: u32) -> Result<()> {
    if n > experts {
        return Err(Error::invalid(name, format!("{n} of only {experts} experts")));
    }
    Ok(())
}

fn at_most(name: &'static str, n: u32, most: u32) -> Result<()> {
    if n > most { Err(Error::invalid(name, format!("{n}, at most {most}"))) } else { Ok(()) }
}

fn finite(name: &'static str, value: f32) -> Result<()> {
    if value.is_finite() {
        Ok(())
    } else {
        Err(Error::invalid(name, format!("{value}, must be finite")))
    }
}
