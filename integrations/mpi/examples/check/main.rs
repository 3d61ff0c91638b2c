//! What the tests run under `mpirun`: layers on several ranks beside the same layer on one device, and
//! what becomes of ranks that fail. `tests/ranks.rs` reads what it prints.
//!
//! ```sh
//! scripts/mpirun -n 4 cargo run --release --example check -- bits
//! ```
mod cases;
mod faults;
mod naive;
mod run;

use std::time::Duration;
use wgmoe::{Gpu, Variant};
use wgmoe_mpi::World;
use wgmoe_mpi::mpi;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let threads = mpi::Threading::Funneled; // of the drivers', which make no call of MPI
    let (universe, _) = mpi::initialize_with_threading(threads).expect("MPI, once");
    let comm = universe.world();
    // Drivers compile kernels at their first use: ranks that share cores drift apart.
    let world = || World::with_limit(&comm, Duration::from_secs(300));
    let result = match arguments[..] {
        [kind @ ("bits" | "naive" | "small"), ref filter @ ..] => world().and_then(|w| {
            let gpu = Gpu::new()?;
            // Small items, which software drivers leave out: they compile each such kernel for half a minute.
            let small = Variant { small_items: true, ..Variant::PORTABLE };
            let both = [Variant::best(&gpu.device), Variant::PORTABLE];
            let variants = if kind == "small" { &[small][..] } else { &both };
            run::all(&w, &gpu, variants, kind == "naive", filter)
        }),
        ["fault", fault, rank] => faults::run(&comm, fault, rank.parse().expect("a rank")),
        _ => panic!("`bits`, `naive` or `small` with parts of a name, or `fault NAME RANK`"),
    };
    if let Err(e) = result {
        // At once, so that lines of ranks do not mix; `faults` says it itself.
        if arguments[0] != "fault" {
            println!("error: {e}");
        }
        // `mpirun` ends all others with the first: let them say what they got.
        std::thread::sleep(Duration::from_secs(4));
        // Ranks may be gone, whom `MPI_Finalize` would wait for.
        std::process::exit(3);
    }
}
