//! Opens what may be a checkpoint and reads all of one layer that it says it has: no panic, no read outside the map, no
//! allocation by a number that nothing has checked (`-rss_limit_mb` catches those).
//!
//! An input is `config.json`, a NUL, an index (empty: a single file), a NUL, and a safetensors file. Where that begins with a
//! brace it is the header's text alone, up to the last brace, and then the data: so mutations need not keep its length right.
#![no_main]
use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;
use wgmoe::checkpoint::Checkpoint;
use wgmoe::weights::Projection;

fn folder() -> &'static std::path::Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let shared = std::path::Path::new("/dev/shm");
    let make = || if shared.is_dir() { tempfile::tempdir_in(shared) } else { tempfile::tempdir() };
    FOLDER.get_or_init(|| make().expect("a folder")).path()
}

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
    let Ok(checkpoint) = opened else { return };
    let config = *checkpoint.layer_config();
    let layers = checkpoint.config().layers;
    let Some(layer) = (0..layers).find(|&layer| !checkpoint.config().is_dense(layer)) else {
        return;
    };
    let _ = (
        checkpoint.check_layer(layer),
        checkpoint.weight_type(layer),
        checkpoint.check_layer(layers),
    );
    let mut sum = 0.0;
    for matrix in
        [checkpoint.router(layer).ok(), checkpoint.bias(layer).ok().flatten()].into_iter().flatten()
    {
        sum += (0..matrix.len()).map(|i| matrix.get(i)).sum::<f32>();
    }
    for expert in 0..config.experts + config.shared_experts + 1 {
        for projection in Projection::ALL {
            if let Ok(matrix) = checkpoint.expert(layer, expert, projection) {
                sum += (0..matrix.len()).map(|i| matrix.get(i)).sum::<f32>();
            }
        }
    }
    std::hint::black_box(sum);
});
