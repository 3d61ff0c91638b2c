//! What the tests, the benches, the studies and the bench program share, once: seeded data and
//! layers, comparisons, the GPU of a test run, golden files, the table of rules, works that are
//! timed. It is not published.
pub mod cases;
pub mod checkpoint_writer;
pub mod compare;
pub mod device;
pub mod gguf;
pub mod golden;
#[cfg(not(target_family = "wasm"))]
pub mod house;
pub mod layer;
pub mod oracle;
#[cfg(not(target_family = "wasm"))]
pub mod program;
pub mod rules;
pub mod statistics;
pub mod synthetic;
pub mod works;

/// For what waits for the device, where it may block.
pub use pollster::block_on;

/// What nearly every test of a kernel needs.
pub mod prelude {
    pub use crate::cases::random;
    pub use crate::compare::{assert_close, assert_same, exact, mismatch};
    pub use crate::device::{Output, contexts, gpu, own_contexts, run, variant_name};
}
