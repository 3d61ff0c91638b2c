//! Opens what may be a GGUF file, or two parts of a split one, and reads all of one layer that it
//! says it has.
//!
//! An input is a file; where it begins with a `2`, the rest is two parts, with `|SECOND|` between
//! them.
#![no_main]
mod look;

use libfuzzer_sys::fuzz_target;
use look::{folder, look};
use wgmoe::checkpoint::Checkpoint;

fuzz_target!(|input: &[u8]| {
    let write = |name: &str, bytes: &[u8]| {
        let path = folder().join(name);
        std::fs::write(&path, bytes).expect("a file");
        path
    };
    let mark = b"|SECOND|";
    let parts = input.strip_prefix(b"2").and_then(|rest| {
        let at = rest.windows(mark.len()).position(|bytes| bytes == mark)?;
        Some((&rest[..at], &rest[at + mark.len()..]))
    });
    let path = match parts {
        None => write("model.gguf", input),
        Some((first, second)) => {
            write("m-00002-of-00002.gguf", second);
            write("m-00001-of-00002.gguf", first)
        }
    };
    look(Checkpoint::open(path));
});
