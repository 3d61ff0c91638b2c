//! The CPU twins: what every kernel, and a whole layer, computes, as plain loops on the host. A
//! twin is the specification of its kernel, of order, ties and NaN too, and what a device is tested
//! against.
//!
//! Each panics where its arguments do not fit together, with the name of the argument, what was
//! expected and what was given. Shapes: T tokens, E experts, S slots, D hidden, B sequences.
//!
//! | twin | kernel | from | to |
//! |---|---|---|---|
//! | [`logits`] | [`ops::logits`](crate::ops::logits) | x `[T, D]`, weights `[E, D]` | logits `[T, E]` |
//! | [`scores`] | [`ops::scores`](crate::ops::scores) | logits `[T, E]`, bias `[E]` | scores, selection values `[T, E]` each |
//! | [`capacity`] | [`ops::capacity`](crate::ops::capacity) | mask ratios `[B]`, offsets `[B + 1]` | capacities, experts per token `[B]` each |
//! | [`active_rows`] | [`ops::active_rows`](crate::ops::active_rows) | offsets `[B + 1]`, lengths `[B]` | rows that are not padding `[ceil(T / 32)]` |
//! | [`active_rows_of`] | the same | the same, and active tokens `[ceil(T / 32)]` | active rows that are not padding |
//! | [`expert_choice`] | [`ops::expert_choice`](crate::ops::expert_choice) | values `[T, E]`, offsets `[B + 1]`, capacities `[B]` | bit set |
//! | [`token_choice`] | [`ops::token_choice`](crate::ops::token_choice) | values `[T, E]` | bit set |
//! | [`token_choice_of_each`] | the same | the same, and experts of each token `[T]` | bit set |
//! | [`sequence_top`] | [`ops::sequence_top`](crate::ops::sequence_top) | values `[T, E]`, offsets `[B + 1]` | bit set |
//! | [`coreset`] | [`ops::coreset`](crate::ops::coreset) | values `[T, E]`, own choice (bit set), offsets `[blocks + 1]` | coresets `[blocks, ceil(E / 32)]`, block of each token `[T]` |
//! | [`coverage`] | [`ops::coverage`](crate::ops::coverage) | own choice (bit set), coresets `[blocks, ceil(E / 32)]`, offsets `[blocks + 1]` | pairs, those inside `[blocks, 2]` |
//! | [`block_choice`] | [`ops::block_choice`](crate::ops::block_choice) | values `[T, E]`, offsets `[blocks + 1]` | bit set, coresets |
//! | [`assign`] | [`ops::assign`](crate::ops::assign) | ids, weights `[T, K]` each | bit set, gates `[T, E]`, ignored `[ceil(T / 32)]` |
//! | [`assign_lists`] | [`ops::assign_lists`](crate::ops::assign_lists) | offsets `[E + 1]`, tokens, weights | bit set, gates `[T, E]`, ignored `[E]` |
//! | [`gates`] | [`ops::plan_count`](crate::ops::plan_count) | bit set, logits or scores `[T, E]` | gates `[T, E]` |
//! | [`drop_over_capacity`] | [`ops::expert_choice`](crate::ops::expert_choice) | gates `[T, E]`, bit set | bit set, dropped `[E]` |
//! | [`expert_union`] | [`ops::expert_union`](crate::ops::expert_union) | bit set, offsets `[blocks + 1]` | members, counts, bytes of each block |
//! | [`expert_lists`] | [`ops::expert_lists`](crate::ops::expert_lists) | bit set | offsets `[E + 1]`, tokens `[room]`, lost `[E]` |
//! | [`padded_expert_lists`] | [`ops::expert_lists`](crate::ops::expert_lists) | bit set | tokens `[E, room]`, counts, lost `[E]` each |
//! | [`plan`] | [`ops::plan_scan`](crate::ops::plan_scan) and its neighbours | bit set, gates `[T, E]` | the plan |
//! | [`plan_active`] | the same | the same, and active tokens `[ceil(T / 32)]` | the plan, whose shared experts take those alone |
//! | [`gather`] | [`ops::gather`](crate::ops::gather) | x `[T, D]`, tokens `[S]` | rows `[S, D]` |
//! | [`matmul_row`] | [`ops::grouped_matmul`](crate::ops::grouped_matmul) | x `[K]`, weights `[N, K]` as a function | row `[N]`, f64 |
//! | [`expert`] | [`ops::grouped_matmul`](crate::ops::grouped_matmul) | x `[D]`, weights as functions | y `[D]` |
//! | [`combine`] | [`ops::combine`](crate::ops::combine) | plan, y `[S, D]` | out `[T, D]` |
//! | [`combine_active`] | the same | the same, and active tokens `[ceil(T / 32)]` | the rows of those |
//! | [`activation`] | [`ops::activation`](crate::ops::activation) | z `[S, 2F]` | a `[S, F]` |
//! | [`activation_gradient`] | [`ops::activation_gradient`](crate::ops::activation_gradient) | z `[S, 2F]`, gates `[S]`, gradient of a `[S, F]` | gradients of z and of the gates |
//! | [`activation_slope`] | the same | the activation, a value | its value and slope, f64 |
//! | [`matmul_transposed`] | [`ops::matmul_transposed`](crate::ops::matmul_transposed) | plan, rows `[S, N]`, weights `[N, K]` of each expert | rows `[S, K]` |
//! | [`matmul_transposed_row`] | the same | g `[N]`, weights `[N, K]` as a function | row `[K]`, f64 |
//! | [`weight_gradient`] | [`ops::weight_gradient`](crate::ops::weight_gradient) | plan, rows `[S, N]` and `[S, K]` (one of them by token) | gradients `[N, K]` of each expert |
//! | [`outer_products`] | the same | rows `[.., N]`, `[.., K]`, pairs of them | the sum of their outer products `[N, K]` |
//! | [`gates_backward`] | [`ops::gates_backward`](crate::ops::gates_backward) | plan, gradients of gates `[S]`, bit set, logits or scores `[T, E]` | gradients of logits `[T, E]` |
//! | [`sum_of_slots`] | [`ops::combine`](crate::ops::combine) | plan, rows `[S, D]` | their sums `[T, D]` |
//! | [`router_loss`] | [`ops::router_loss`](crate::ops::router_loss) | logits `[T, E]`, counts `[E]` | values of two losses, gradients of logits |
//! | [`balance_loss`] | [`ops::balance_loss`](crate::ops::balance_loss) | logits `[T, E]`, experts of each token `[T]` | value, gradients of logits |
//! | [`cross_entropy`] | [`ops::cross_entropy`](crate::ops::cross_entropy) | logits `[T, V]`, targets, weights `[T]` each | losses `[T]`, gradients of logits |
//! | [`masked_weights`] | the same | masked tokens, ratios | weights of the rows `[T]` |
//! | [`loss_sum`] | [`ops::loss_sum`](crate::ops::loss_sum) | terms | their sum |
//! | [`bias_update`] | [`ops::bias_update`](crate::ops::bias_update) | bias, counts `[E]` each | bias |
//! | [`layer`], [`layer_routing`], [`layer_token`] | [`MoeLayer`](crate::MoeLayer) | x `[T, D]`, router, experts | out `[T, D]` |
//! | [`layer_backward`] | [`MoeLayer::bind_training`](crate::MoeLayer::bind_training) | what the forward pass made, gradient of out `[T, D]` | gradients of all |
//!
//! A bit set is `[E, ceil(T / 32)]` words ([`plan::bits`](crate::plan::bits)).
//!
//! ```
//! use wgmoe::ops::plan_count::Scales;
//! use wgmoe::plan::{PlanShape, bits};
//! use wgmoe::reference;
//! use wgmoe::routing::{GateRule, Score};
//!
//! // Two tokens, three experts: each token takes two.
//! let logits = [2.0, 0.0, 1.0, 0.0, 3.0, 3.0];
//! let (scores, values) = reference::scores(&logits, 3, Score::Softmax, false, None);
//! let assigned = reference::token_choice(&values, 3, 2, None, &|_, _| true);
//! assert_eq!(bits::experts_of(&assigned, 2, 0), [0, 2]);
//! assert_eq!(bits::experts_of(&assigned, 2, 1), [1, 2]);
//!
//! let rule = GateRule::Normalised;
//! let gates = reference::gates(&assigned, &scores, 3, rule, 1.0, Scales::default());
//! assert_eq!(gates[3..], [0.0, 0.5, 0.5]);
//!
//! let shape = PlanShape::on_host(2, 3, 4);
//! let plan = reference::plan(&shape, &assigned, &gates);
//! assert_eq!(plan.token_of, [0, 1, 0, 1]);
//!
//! // Experts that give back what they get: a token's gates add up to 1.
//! let x = [1.0, 10.0, 2.0, 20.0];
//! let y = reference::gather(&x, 2, &plan.token_of);
//! let out = reference::combine(&plan, &y, 2, None);
//! assert!(out.iter().zip(x).all(|(out, x)| (out - x).abs() < 1e-5));
//! ```
use crate::plan::{HostPlan, PlanShape};

pub use crate::layer::{
    HostBatch, HostBlocks, HostExperts, HostForward, HostGradients, HostRouter, HostRouting,
    HostSequences, cpu as layer, cpu_backward as layer_backward, cpu_routing as layer_routing,
    cpu_token as layer_token,
};
pub use crate::ops::activation::cpu as activation;
pub use crate::ops::activation_gradient::{
    cpu as activation_gradient, cpu_slope as activation_slope,
};
pub use crate::ops::active_rows::{cpu as active_rows, cpu_active as active_rows_of};
pub use crate::ops::assign::cpu as assign;
pub use crate::ops::assign_lists::cpu as assign_lists;
pub use crate::ops::balance_loss::cpu as balance_loss;
pub use crate::ops::bias_update::cpu as bias_update;
pub use crate::ops::block_choice::cpu as block_choice;
pub use crate::ops::capacity::{HostSource, cpu as capacity};
pub use crate::ops::combine::{
    cpu as combine, cpu_active as combine_active, cpu_sum as sum_of_slots,
};
pub use crate::ops::coreset::cpu as coreset;
pub use crate::ops::coverage::cpu as coverage;
pub use crate::ops::cross_entropy::{cpu as cross_entropy, masked_weights};
pub use crate::ops::expert_choice::{cpu as expert_choice, cpu_drop as drop_over_capacity};
pub use crate::ops::expert_lists::{cpu as expert_lists, cpu_padded as padded_expert_lists};
pub use crate::ops::expert_union::cpu as expert_union;
pub use crate::ops::gates_backward::cpu as gates_backward;
pub use crate::ops::gather::cpu as gather;
pub use crate::ops::grouped_matmul::{cpu_expert as expert, cpu_row as matmul_row};
pub use crate::ops::logits::cpu as logits;
pub use crate::ops::loss_sum::cpu as loss_sum;
pub use crate::ops::matmul_transposed::{
    cpu as matmul_transposed, cpu_row as matmul_transposed_row,
};
pub use crate::ops::plan_count::cpu as gates;
pub use crate::ops::router_loss::cpu as router_loss;
pub use crate::ops::scores::cpu as scores;
pub use crate::ops::sequence_top::cpu as sequence_top;
pub use crate::ops::token_choice::{cpu as token_choice, cpu_each as token_choice_of_each};
pub use crate::ops::weight_gradient::{cpu as weight_gradient, cpu_outer as outer_products};

/// The plan of a bit set and its gates `[T, E]`: [`HostPlan::cpu`].
///
/// # Panics
///
/// As [`HostPlan::cpu`].
pub fn plan(shape: &PlanShape, assigned: &[u32], gates: &[f32]) -> HostPlan {
    HostPlan::cpu(shape, assigned, gates)
}

/// The same where shared experts take the tokens of a bit set `[ceil(T / 32)]` alone: [`HostPlan::cpu_active`].
///
/// # Panics
///
/// As [`HostPlan::cpu_active`].
pub fn plan_active(shape: &PlanShape, assigned: &[u32], gates: &[f32], active: &[u32]) -> HostPlan {
    HostPlan::cpu_active(shape, assigned, gates, active)
}
