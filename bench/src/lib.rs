//! How fast a device is at mixture-of-experts work: measures every part of the layers of known models,
//! and makes a page that compares results.
//!
//! The program `wgmoe-bench` is this in a terminal, `integrations/web` in a browser: whoever watches a
//! run ([`Watch`]) shows how far it is and keeps what was measured. Nothing here blocks in a browser.
mod ceilings;
mod device;
mod file;
mod matrix;
mod page;
mod run;
mod subject;
mod timing;
mod units;

pub use device::{NO_ADAPTERS, adapters, find, first, list};
pub use file::{Report, replace};
pub use page::page;
pub use run::{Plan, Watch, run};
