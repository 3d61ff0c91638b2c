//! Works that are timed, by criterion's benches, by the program `wgmoe-bench` and beside other
//! implementations: inputs, one run that is compared with the CPU twins, and what to record again
//! and again. Whoever wants a panic unwraps.
mod backward;
mod gather;
mod numbers;
mod ops;
mod plan;
mod table;
mod work;

pub use backward::{BACKWARDS, Backward, backward};
pub use gather::gather;
pub use numbers::{BIAS, GATE, INDEX, SCORES, TABLE, X, fill, mix};
pub use ops::{OP2, choice, grouped_matmul};
pub use plan::{Planned, chosen, plan};
pub use table::{CHOICES, GATHERS, PLANS};
pub use work::{Bound, Choice, Matrix, Part, Work};
