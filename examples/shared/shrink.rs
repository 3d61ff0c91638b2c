//! Layers of the models with fewer experts.
use wgmoe::layer::Settings;
use wgmoe::ops::token_choice::Groups;
use wgmoe::routing::{BlockRule, Routing};

/// A layer with fewer experts than its model's. Groups keep their size, and the share of them that a token may use (at least
/// one, and enough for its experts); where they no longer divide the experts, there are none.
pub(crate) fn shrink(model: &Settings, experts: u32) -> Settings {
    let mut settings = Settings { experts, ..*model };
    match &mut settings.routing {
        Routing::TokenChoice(rule) => {
            rule.groups = rule.groups.and_then(|Groups { count, top }| {
                let size = model.experts / count;
                let groups = experts / size;
                let fits = experts.is_multiple_of(size);
                let top = (groups * top / count).max(rule.top.div_ceil(size)).max(1);
                (fits && top <= groups).then_some(Groups { count: groups, top })
            });
            if let Some(BlockRule::Capacity(capacity)) = &mut rule.coreset {
                *capacity = (*capacity).min(experts);
            }
        }
        Routing::ExpertChoice(rule) => {
            rule.experts_per_token = rule.experts_per_token.min(experts);
            rule.max_experts_per_token = rule.max_experts_per_token.min(experts);
        }
        _ => {}
    }
    settings
}
