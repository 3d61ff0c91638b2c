//! Whole layers under a block-level rule, from hidden states to output, against what the reference implementation returned.
use testkit::golden_layer::{self, Layer};
use testkit::prelude::{assert_close, contexts, gpu, variant_name};
use wgmoe::layer;

/// Every `block_coreset` file on the CPU twins and on the GPU in every variant: the outputs of tokens that the reference
/// defines, and the twins' for the others.
#[test]
fn outputs_of_block_coresets() {
    let gpu = gpu();
    let mut paths: Vec<_> = std::fs::read_dir(golden_layer::folder())
        .expect("golden files")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    paths.sort();
    let [mut files, mut defined, mut tokens, mut short] = [0usize; 4];
    for path in paths {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with("block_coreset") {
            continue;
        }
        let bytes = std::fs::read(&path).expect(&name);
        let layer = Layer::read(&bytes).expect(&name).expect(&name);
        let twin = layer.on_cpu();
        let check = |what: &str, got: &[f32]| {
            let (error, ok) = layer.compare(got);
            assert!(ok, "{name}, {what}: `y` differs by {error:e}");
            let (atol, rtol) = (golden_layer::ATOL, golden_layer::RTOL);
            assert_close(got, &twin, atol, rtol, &format!("{name}, {what}: all tokens"));
        };
        check("CPU twins", &twin);
        for ctx in gpu.iter().flat_map(contexts) {
            let what = variant_name(&ctx);
            check(&what, &layer.on_gpu(gpu.as_ref().expect("a GPU"), &ctx).expect(&name));
        }
        files += 1;
        defined += layer.defined.iter().filter(|&&d| d).count();
        tokens += layer.defined.len();
        let blocks = layer.blocks.as_deref().expect("blocks");
        short += usize::from(blocks.windows(2).any(|b| b[1] - b[0] < layer::BLOCK));
    }
    eprintln!("{files} layers, {short} with a short block; {defined} of {tokens} tokens defined");
    assert!(files > 0 && short > 0 && defined * 2 > tokens);
}
