//! Opens what may be a checkpoint and reads all of one layer that it says it has.
//!
//! An input is `config.json`, a NUL, an index (empty: a single file), a NUL, and a safetensors
//! file. Where that begins with a brace it is the header's text alone, up to the last brace, and
//! then the data: so mutations need not keep its length right.
#![no_main]
mod look;

use libfuzzer_sys::fuzz_target;
use look::{folder, look};
use wgmoe::checkpoint::Checkpoint;

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(3, |&byte| byte == 0);
    let [config, index, tensors] = [(); 3].map(|()| parts.next().unwrap_or_default());
    let header = tensors
        .first()
        .filter(|&&b| b == b'{')
        .and_then(|_| tensors.iter().rposition(|&b| b == b'}'));
    let tensors = match header {
        Some(end) => [&(end as u64 + 1).to_le_bytes()[..], tensors].concat(),
        None => tensors.to_vec(),
    };
    let write =
        |name: &str, bytes: &[u8]| std::fs::write(folder().join(name), bytes).expect("a file");
    write("config.json", config);
    let list = folder().join("model.safetensors.index.json");
    let single = folder().join("model.safetensors");
    if index.is_empty() {
        write("model.safetensors", &tensors);
    } else {
        let _ = std::fs::remove_file(single);
        write("model.safetensors.index.json", index);
        write("a.safetensors", &tensors);
    }
    let opened = Checkpoint::open(folder());
    if !index.is_empty() {
        std::fs::remove_file(list).expect("removed");
    }
    look(opened);
});
