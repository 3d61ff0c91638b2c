//! Which cases there are: models, loads, rules and parts.
use crate::file::{CaseId, Load, Part};
use testkit::rules::rules;
use wgmoe::layer::LayerConfig;
use wgmoe::models::{self, MODELS, Model};
use wgmoe::{Routing, WeightType};

/// A model's layer with the experts that fit, under every load.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) model: Model,
    pub(crate) config: LayerConfig,
    /// Why fewer experts than the model has.
    pub(crate) reduced: Option<String>,
    /// What the experts are stored as.
    pub(crate) weights: WeightType,
    pub(crate) loads: Vec<(Load, u32)>,
}

/// A layer under one rule and one load: what is prepared and checked together.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) load: Load,
    pub(crate) tokens: u32,
    pub(crate) rule: String,
    pub(crate) own_rule: bool,
    pub(crate) routing: Routing,
    pub(crate) parts: Vec<Part>,
}

const LOADS: [(Load, u32); 5] = [
    (Load::Block, 32),
    (Load::Batch, 8 * 32),
    (Load::Batch, 64 * 32),
    (Load::Prefill, 512),
    (Load::Prefill, 4096),
];

/// A quick run: models, experts at most, and how many of the loads, so few that a software driver
/// is done in time.
const QUICK: [(&str, u32, usize); 2] = [("llada2-mini", 32, 1), ("ec-dlm", 64, 2)];

/// The layers of a run, whole.
pub(crate) fn layers(quick: bool, weights: WeightType) -> Vec<Layer> {
    let whole = |model: &Model, loads: usize| Layer {
        model: *model,
        config: model.config,
        reduced: None,
        weights,
        loads: LOADS[..loads].to_vec(),
    };
    if !quick {
        return MODELS.iter().map(|model| whole(model, LOADS.len())).collect();
    }
    let quick = QUICK.iter().filter_map(|&(name, experts, loads)| {
        Some(whole(&models::find(name)?, loads).with_experts(experts, "quick run"))
    });
    quick.collect()
}

impl Layer {
    /// With at most this many routed experts, and the reason if that is fewer than there are.
    pub(crate) fn with_experts(self, most: u32, why: &str) -> Self {
        if most >= self.config.experts {
            return self;
        }
        Self { config: self.model.with_experts(most), reduced: Some(why.into()), ..self }
    }

    /// Its groups, load by load, the model's own rule first.
    ///
    /// Every part under the model's own rule; under the others, what differs: the routing, and in
    /// decoding, where the choice decides which weights are read, the layer.
    pub(crate) fn groups(&self) -> Vec<Group> {
        let own = self.config.routing;
        let mut all = rules(own, self.config.experts);
        // A rule of the model's own that is none of these, or is one of them under its name.
        let own_name = match all.iter().position(|(_, routing)| *routing == own) {
            Some(i) => all.remove(i).0,
            None => "the model's own".into(),
        };
        all.insert(0, (own_name, own));
        let mut groups = vec![];
        for &(load, tokens) in &self.loads {
            for (i, (rule, routing)) in all.iter().enumerate() {
                let parts = if i == 0 {
                    vec![Part::Routing, Part::Plan, Part::Gather, Part::Experts, Part::Layer]
                } else if load == Load::Prefill {
                    vec![Part::Routing]
                } else {
                    vec![Part::Routing, Part::Layer]
                };
                let rule = rule.clone();
                groups.push(Group {
                    load,
                    tokens,
                    rule,
                    own_rule: i == 0,
                    routing: *routing,
                    parts,
                });
            }
        }
        groups
    }

    pub(crate) fn case(&self, group: &Group, part: Part) -> CaseId {
        CaseId {
            model: self.model.name.into(),
            experts: self.config.experts,
            experts_of_model: self.model.config.experts,
            load: group.load,
            tokens: group.tokens,
            rule: group.rule.clone(),
            own_rule: group.own_rule,
            part,
            weights: self.weights.name().to_lowercase(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own_and_a_rule_that_holds() {
        for quick in [false, true] {
            let mut seen = std::collections::HashSet::new();
            for layer in layers(quick, WeightType::Bf16) {
                for group in layer.groups() {
                    group.routing.check(layer.config.experts).expect("a rule");
                    for &part in &group.parts {
                        assert!(seen.insert(layer.case(&group, part)), "{group:?} {part:?}");
                    }
                }
                assert_eq!(layer.reduced.is_some(), quick);
            }
            let own = |c: &&CaseId| c.own_rule && c.part == Part::Layer;
            let want = if quick { 3 } else { MODELS.len() * LOADS.len() };
            assert_eq!(seen.iter().filter(own).count(), want);
        }
    }
}
