//! Draws the folders of the library and which of them uses which, from the sources:
//! `cargo run -p wgmoe-testkit --bin architecture` writes `docs/architecture.svg`.
use std::process::ExitCode;
use testkit::house;

fn main() -> ExitCode {
    let path = house::repository().join("docs/architecture.svg");
    match std::fs::write(&path, house::picture()) {
        Ok(()) => {
            println!("docs/architecture.svg");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{}: {e}", path.display());
            ExitCode::FAILURE
        }
    }
}
