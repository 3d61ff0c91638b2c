//! GGUF files that are as they should be. Bad ones are in `gguf_bad.rs`.
use crate::checkpoint::{Layout, load, pages, plan, small, values, written};
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use testkit::checkpoint_writer::Plan;
use testkit::golden;
use testkit::prelude::{assert_same, gpu};
use wgmoe::checkpoint::Checkpoint;
use wgmoe::routing::{GateRule, Score, TokenChoice};
use wgmoe::weights::HostWeights;
use wgmoe::{Context, LayerConfig, WeightType};

/// A file of a plan's weights.
pub(crate) fn written_gguf(plan: &Plan, weights: WeightType) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = plan.write_gguf(dir.path(), "model", weights, &mut |_| {}).expect("written");
    (dir, path)
}

fn golden(name: &str) -> (Checkpoint, golden::File) {
    let path = golden::folder().join(name).with_extension("gguf");
    (Checkpoint::open(path).expect("opened"), golden::File::open(name).expect("a golden file"))
}

/// Whether values are those of a tensor of a golden file, to the bit.
#[track_caller]
fn same(got: HostWeights<'_>, file: &golden::File, name: &str) {
    let bits = |values: Vec<f32>| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_same(&bits(values(got)), &bits(file.f32s(name).expect(name)), name);
}

/// The keys and names as llama.cpp's converter writes them.
#[test]
fn metadata_of_converted_models() {
    let (checkpoint, file) = golden("gguf_00");
    let rule = TokenChoice::new(3)
        .with_score(Score::Sigmoid)
        .with_gate(GateRule::Normalised)
        .with_groups(4, 2)
        .with_scale(2.5);
    let settings = LayerConfig::new(256, 256, 8, rule).with_shared_experts(1);
    assert_eq!(checkpoint.layer_config(), &settings);
    assert_eq!([checkpoint.config().layers, checkpoint.config().dense], [2, 0]);
    for layer in 0..2 {
        let router = checkpoint.router(layer).expect("a router");
        same(router, &file, &format!("blk.{layer}.ffn_gate_inp.weight"));
        let bias = checkpoint.bias(layer).expect("read").expect("a bias");
        same(bias, &file, &format!("blk.{layer}.exp_probs_b.bias"));
    }
    // Another alignment, no shared experts, no keys of routing: softmax, as it is.
    let (checkpoint, file) = golden("gguf_01");
    let rule = TokenChoice::new(1).with_score(Score::Softmax).with_gate(GateRule::Unnormalised);
    let settings = LayerConfig::new(64, 96, 2, rule);
    assert_eq!(checkpoint.layer_config(), &settings);
    assert_eq!(checkpoint.config().layers, 1);
    same(checkpoint.router(0).expect("a router"), &file, "blk.0.ffn_gate_inp.weight");
    assert!(checkpoint.bias(0).expect("read").is_none());
}

/// The same weights as in safetensors files, in one file and in parts.
#[test]
fn the_same_pages_as_from_safetensors() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).expect("a context");
    let dir = written(&plan(Layout::Each, 1));
    let safetensors = Checkpoint::open(dir.path()).expect("opened");
    for weights in [WeightType::F32, WeightType::F16, WeightType::Bf16] {
        let want = load(&gpu, &ctx, dir.path(), 2, Some(weights));
        for shards in [1, 3, 60] {
            let (folder, path) = written_gguf(&plan(Layout::Each, shards), weights);
            // By the file's name, and by its folder's.
            for path in [&path as &Path, folder.path()] {
                let checkpoint = Checkpoint::open(path).expect("opened");
                assert_eq!(checkpoint.config().settings, small());
                assert_eq!([checkpoint.config().layers, checkpoint.config().dense], [3, 1]);
                assert_eq!(checkpoint.weight_type(2), Ok(weights));
                for layer in [1, 2] {
                    let of = |c: &Checkpoint| values(c.router(layer).expect("a router"));
                    assert_eq!(of(&checkpoint), of(&safetensors));
                    let bias = |c: &Checkpoint| c.bias(layer).expect("read").map(values);
                    assert_eq!(bias(&checkpoint), bias(&safetensors));
                    assert!(bias(&checkpoint).is_some());
                }
                let got = load(&gpu, &ctx, path, 2, None);
                let what = format!("{weights:?} in {shards} files");
                assert_eq!(pages(&gpu, got.weights()), pages(&gpu, want.weights()), "{what}");
            }
        }
    }
}

/// A directory with safetensors files is read by those.
#[test]
fn safetensors_come_first() {
    let (dir, _) = written_gguf(&plan(Layout::Each, 1), WeightType::F32);
    plan(Layout::Each, 1).write(dir.path(), &mut |_| {}).expect("written");
    let checkpoint = Checkpoint::open(dir.path()).expect("opened");
    assert_eq!(checkpoint.weight_type(1), Ok(WeightType::Bf16));
}
