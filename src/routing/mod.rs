//! Routing rules as plain data: nothing here needs a device.
//!
//! | rule | who chooses | for |
//! |---|---|---|
//! | [`TokenChoice`] | each token takes its K highest experts | most models: LLaDA2, SDAR, Qwen3-MoE, DeepSeek-V3 |
//! | [`TokenChoice::with_coreset`] | each block elects experts first ([`BlockRule`]), its tokens choose among them | decoding a block at a time, with fewer weights to read |
//! | [`ExpertChoice`] | each expert takes its C highest tokens of a sequence | models trained so (EC-DLM), and whole sequences: every expert takes a token at least |
//! | [`SequenceTop`] | the highest (token, expert) pairs of a sequence | spending more experts on some tokens than on others |
//!
//! A rule is made by `new`, changed by `with_*` and goes into a
//! [`LayerConfig`](crate::LayerConfig). [`Routing::check`] says what is wrong with one.
//!
//! ```
//! use wgmoe::routing::{BlockRule, ExpertChoice, Routing, Score, TokenChoice};
//!
//! // LLaDA2.0: 8 of 256 experts, from 4 of 8 groups, gates times 2.5.
//! let rule = TokenChoice::new(8).with_score(Score::Sigmoid).with_groups(8, 4).with_scale(2.5);
//! assert!(Routing::from(rule).check(256).is_ok());
//! // The same, inside the coresets that blocks of tokens elect (dMoE).
//! let block = rule.with_coreset(BlockRule::mass(0.6).with_floor(16));
//! assert!(Routing::from(block).check(256).is_ok());
//! // Experts choose tokens: 8 experts a token, and up to 32 where a batch says so.
//! let experts = Routing::from(ExpertChoice::new(8).with_max(32));
//! let error = experts.check(16).unwrap_err().to_string();
//! assert_eq!(error, "`max_experts_per_token`: 32 of only 16 experts");
//! ```
//!
//! [`schedule`] gives expert choice a k for each mask ratio, [`scaling`] EC-DLM's table of gate
//! factors, [`order`] the order of values that all choices follow.
mod block;
pub(crate) mod check;
mod exact;
mod fewer;
pub mod order;
mod rules;
pub mod scaling;
pub mod schedule;

pub use block::BlockRule;
pub(crate) use block::mass_units;
pub use check::MAX_EXPERTS;
pub(crate) use check::few_experts;
pub use rules::{
    Activation, ExpertChoice, GateRule, Groups, MAX_GROUPS, MAX_TOP, Normalise, Routing, Score,
    SequenceTop, TokenChoice,
};
