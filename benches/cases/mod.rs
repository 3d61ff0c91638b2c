//! What criterion's benches and the program `wgmoe-bench` both time: the works, their numbers, the rules, and the comparisons
//! with the CPU twins. Whoever wants a panic unwraps.
mod compare;
mod gather;
mod numbers;
mod ops;
mod plan;
mod rules;
mod work;

pub(crate) use compare::{close, same};
pub(crate) use gather::gather;
pub(crate) use numbers::{BIAS, GATE, INDEX, SCORES, TABLE, X, fill, mix};
pub(crate) use ops::{OP2, choice, grouped_matmul};
pub(crate) use plan::{Planned, plan};
pub(crate) use rules::rules;
pub(crate) use work::{Bound, Choice, Matrix, Part, Work, round};
