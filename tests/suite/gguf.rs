//! GGUF files that are as they should be. Bad ones are in `gguf_bad.rs`.
use crate::checkpoint::{Layout, agrees, load, pages, plan, small, values, written};
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use testkit::checkpoint_writer::Plan;
use testkit::golden;
use testkit::prelude::{assert_close, assert_same, gpu};
use wgmoe::checkpoint::{Checkpoint, Load, load_layer};
use wgmoe::routing::{GateRule, Score, TokenChoice};
use wgmoe::weights::{ExpertTypes, HostWeights, Projection};
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

/// The hash of `tests/golden`'s gguf files.
fn fnv1a64(values: &[f32]) -> String {
    let hash = values.iter().fold(14_695_981_039_346_656_037u64, |hash, v| {
        (hash ^ u64::from(v.to_bits())).wrapping_mul(1_099_511_628_211)
    });
    format!("{hash:016x}")
}

const EXPERTS: [(&str, Projection); 3] =
    [("gate", Projection::Gate), ("up", Projection::Up), ("down", Projection::Down)];

/// Every value of every expert, to the bit, of every type and every mix of types in one layer.
#[test]
fn values_of_blocks() {
    let (checkpoint, file) = golden("gguf_00");
    let rows = file.u32s("rows").expect("rows");
    let probes = file.f32s("probe").expect("probes");
    for (layer, shared) in [(0, false), (0, true), (1, false), (1, true)] {
        for (word, p) in EXPERTS {
            let suffix = if shared { "shexp" } else { "exps" };
            let name = format!("blk.{layer}.ffn_{word}_{suffix}.weight");
            let hashes = file.texts("fnv1a64", &name).expect("hashes");
            let [few, products] = ["rows", "probe"]
                .map(|what| file.f32s(&format!("{name}|{what}")).expect("values of some rows"));
            for (e, hash) in hashes.iter().enumerate() {
                let expert = if shared { 8 } else { e as u32 };
                let matrix = values(checkpoint.expert(layer, expert, p).expect("a matrix"));
                assert_eq!(fnv1a64(&matrix), *hash, "{name}, expert {e}");
                for (i, &row) in rows.iter().enumerate() {
                    let got = &matrix[row as usize * 256..][..256];
                    assert_same(got, &few[(e * 2 + i) * 256..][..256], &name);
                }
                for (i, probe) in probes.chunks_exact(256).enumerate() {
                    let got: Vec<f32> =
                        wgmoe::ops::grouped_matmul::cpu_row(probe, &|i| matrix[i], 256)
                            .into_iter()
                            .map(|v| v as f32)
                            .collect();
                    let want = &products[(e * 2 + i) * 256..][..256];
                    assert_close(&got, want, golden::ATOL, golden::RTOL, &name);
                }
            }
        }
    }
    let (checkpoint, file) = golden("gguf_01");
    for (word, p) in EXPERTS {
        let name = format!("blk.0.ffn_{word}_exps.weight");
        let want = file.f32s(&name).expect("values");
        for (e, want) in want.chunks_exact(64 * 96).enumerate() {
            let got = values(checkpoint.expert(0, e as u32, p).expect("a matrix"));
            assert_same(&got, want, &name);
        }
    }
}

/// Whole layers on the device, in the file's own types, against the twin on the file's values.
#[test]
fn layers_of_mixed_types() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).expect("a context");
    let types = |gate_up, down| ExpertTypes { gate_up, down };
    let (q8, q4) = (WeightType::Q8_0.into(), types(WeightType::Q4_0, WeightType::F16));
    for (name, layer, routed, last) in [
        ("gguf_00", 0, types(WeightType::Q4_K, WeightType::Q6_K), Some(q8)),
        ("gguf_00", 1, WeightType::Q4_K.into(), Some(q4)),
        // Its gate is Q8_0 and its up MXFP4.
        ("gguf_01", 0, types(WeightType::F32, WeightType::Q4_0), None),
    ] {
        let (checkpoint, _) = golden(name);
        let loaded =
            checkpoint.load_layer(&ctx, &gpu.queue, layer, Load::default()).expect("loaded");
        let shape = loaded.weights().shape();
        assert_eq!(shape.types, routed, "{name}, layer {layer}");
        let shared = checkpoint.layer_config().shared_experts;
        assert_eq!((shape.last, shape.last_types), (shared, last.unwrap_or(routed)));
        agrees(&gpu, &checkpoint, layer, &loaded);
    }
}

/// What the converter of one file makes, and what loading makes of another: the same pages.
#[test]
fn files_and_loading_convert_alike() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).expect("a context");
    let mut plan = plan(Layout::Each, 1);
    [plan.config.hidden, plan.config.intermediate] = [512, 256];
    let dir = written(&plan);
    for &weights in WeightType::ALL.iter().filter(|t| t.ggml_type().is_some()) {
        let (_dir, path) = written_gguf(&plan, weights);
        let [got, want] = [(&*path, None), (dir.path(), Some(weights))].map(|(path, weights)| {
            let load = Load { weight_type: weights, page_limit: Some(200_000), progress: None };
            let layer = load_layer(&ctx, &gpu.queue, path, 1, load).expect("loaded");
            (layer.weights().shape(), pages(&gpu, layer.weights()))
        });
        assert!(got == want, "{weights:?}");
        assert_eq!(got.0.types, weights.into());
    }
    // Rows that are no whole blocks are refused before anything is written.
    let dir = tempfile::tempdir().expect("a folder");
    [plan.config.hidden, plan.config.intermediate] = [70, 33];
    let error = plan.write_gguf(dir.path(), "model", WeightType::Q8_0, &mut |_| {});
    let error = error.expect_err("D = 70").to_string();
    assert!(error.contains("rows of 70 values are no whole blocks of 32 of Q8_0"), "{error}");
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
                assert_eq!(*checkpoint.layer_config(), small());
                assert_eq!([checkpoint.config().layers, checkpoint.config().dense], [3, 1]);
                assert_eq!(checkpoint.expert_shape(2).expect("a shape").types, weights.into());
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
    assert_eq!(checkpoint.expert_shape(1).expect("a shape").types, WeightType::Bf16.into());
}
