//! Writes the WGSL of every kernel in every variant, for other compilers to look at:
//! `cargo run --example dump_wgsl -- DIR` makes `DIR/name.variant.wgsl`, one file each. Needs no GPU.
use std::{collections::BTreeSet, fs, path::Path, process::ExitCode};
use wgmoe::SPECS;
use wgmoe::kernel::Prelude;

/// Letters, digits and dashes of a variant's label.
fn file_part(label: &str) -> String {
    let words: Vec<&str> =
        label.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty()).collect();
    words.join("-")
}

fn write_all(dir: &Path) -> Result<usize, Box<dyn std::error::Error>> {
    fs::create_dir_all(dir)?;
    let mut names = BTreeSet::new();
    for spec in SPECS {
        for prelude in (spec.variants)() {
            for shared in [false, true] {
                let prelude = Prelude { shared, ..prelude.clone() };
                let shared = if shared { ".shared" } else { "" };
                let name = format!("{}.{}{shared}.wgsl", spec.name, file_part(&prelude.label));
                fs::write(dir.join(&name), spec.source(&prelude))?;
                if !names.insert(name.clone()) {
                    return Err(format!("two variants are called {name}").into());
                }
            }
        }
    }
    Ok(names.len())
}

fn main() -> ExitCode {
    let Some(dir) = std::env::args_os().nth(1) else {
        eprintln!("usage: dump_wgsl DIR");
        return ExitCode::from(2);
    };
    match write_all(Path::new(&dir)) {
        Ok(count) => {
            println!("{count} files in {}", Path::new(&dir).display());
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("dump_wgsl: {e}");
            ExitCode::FAILURE
        }
    }
}
