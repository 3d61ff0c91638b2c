//! Writes the WGSL of every kernel in every variant, for other compilers to look at:
//! `cargo run --example dump_wgsl -- DIR` makes `DIR/name.variant.wgsl`, one file each. Needs no GPU.
use std::{collections::HashMap, fs, path::Path, process::ExitCode};
use wgmoe::SPECS;
use wgmoe::device::Prelude;

/// Letters and digits of a variant's label, joined by dashes.
fn file_part(label: &str) -> String {
    let words: Vec<&str> =
        label.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty()).collect();
    words.join("-")
}

fn write_all(dir: &Path) -> std::io::Result<usize> {
    fs::create_dir_all(dir)?;
    let mut written: HashMap<String, String> = HashMap::new();
    for spec in SPECS {
        for prelude in (spec.variants)() {
            for shared in [0, u32::MAX] {
                let prelude = Prelude { shared, ..prelude.clone() };
                let source = spec.source(&prelude);
                let shared = if shared != 0 { ".shared" } else { "" };
                let name = format!("{}.{}{shared}", spec.name, file_part(&prelude.label));
                // Labels may be alike, also on file systems that do not tell case; the text decides.
                let mut unique = name.clone();
                for n in 2.. {
                    match written.get(&unique.to_lowercase()) {
                        Some(other) if *other != source => unique = format!("{name}-{n}"),
                        _ => break,
                    }
                }
                fs::write(dir.join(format!("{unique}.wgsl")), &source)?;
                written.insert(unique.to_lowercase(), source);
            }
        }
    }
    Ok(written.len())
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
