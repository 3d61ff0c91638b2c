//! What both targets do with what may be a checkpoint.
use std::sync::OnceLock;
use wgmoe::Result;
use wgmoe::checkpoint::Checkpoint;
use wgmoe::weights::Projection;

/// A folder in memory, where the system has one.
pub fn folder() -> &'static std::path::Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let shared = std::path::Path::new("/dev/shm");
    let make = || if shared.is_dir() { tempfile::tempdir_in(shared) } else { tempfile::tempdir() };
    FOLDER.get_or_init(|| make().expect("a folder")).path()
}

/// Reads all of one layer that it says it has: no panic, no read outside the map, no allocation by
/// a number that nothing has checked (`-rss_limit_mb` catches those).
pub fn look(opened: Result<Checkpoint>) {
    let Ok(checkpoint) = opened else { return };
    let settings = *checkpoint.layer_config();
    let layers = checkpoint.config().layers;
    let Some(layer) = (0..layers).find(|&layer| !checkpoint.config().is_dense(layer)) else {
        return;
    };
    let _ = (
        checkpoint.check_layer(layer),
        checkpoint.expert_shape(layer),
        checkpoint.check_layer(layers),
    );
    let mut sum = 0.0;
    for matrix in
        [checkpoint.router(layer).ok(), checkpoint.bias(layer).ok().flatten()].into_iter().flatten()
    {
        sum += (0..matrix.len()).map(|i| matrix.get(i)).sum::<f32>();
    }
    for expert in 0..settings.experts + settings.shared_experts + 1 {
        for projection in Projection::ALL {
            if let Ok(matrix) = checkpoint.expert(layer, expert, projection) {
                sum += (0..matrix.len()).map(|i| matrix.get(i)).sum::<f32>();
            }
        }
    }
    std::hint::black_box(sum);
}
