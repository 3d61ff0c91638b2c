//! Checkpoints that are as they should be: every layout, type and naming gives the same layer. Bad ones are in
//! `checkpoint_bad.rs`.
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;
use std::collections::HashMap;
use std::path::Path;
use tempfile::TempDir;
use testkit::layer::{chosen, host_router};
use testkit::prelude::{assert_close, assert_same, gpu, random};
use wgmoe::checkpoint::{self, Checkpoint, Config, ExpertNames, Load, Names};
use wgmoe::layer::cached::CacheOptions;
use wgmoe::layer::{Batch, HostBatch, cpu_routing, cpu_token};
use wgmoe::models::{self, MODELS};
use wgmoe::routing::{BlockRule, Routing, Score};
use wgmoe::weights::{HostWeights, Projection};
use wgmoe::{Context, ExpertWeights, Gpu, LayerConfig, MoeLayer, WeightType};

pub(crate) use testkit::checkpoint_writer::{Layout, Plan};

/// Awkward in every size: no multiple of a panel, a lane or each other; two shared experts; groups and a bias.
pub(crate) fn small() -> LayerConfig {
    let Routing::TokenChoice(mini) = models::find("llada2-mini").expect("a model").config.routing
    else {
        unreachable!("token choice")
    };
    LayerConfig::new(
        70,
        33,
        10,
        Routing::TokenChoice(mini.with_groups(5, 3).with_experts_per_token(3)),
    )
    .with_shared_experts(2)
}

pub(crate) fn plan(layout: Layout, shards: usize) -> Plan {
    Plan { config: small(), layers: 2, dense: 1, layout, shards, seed: 7 }
}

pub(crate) fn written(plan: &Plan) -> TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    plan.write(dir.path(), &mut |_| {}).expect("written");
    dir
}

/// Tensors by name, for a file.
type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn write_file(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"))
    });
    safetensors::serialize_to_file(views, None, path).expect("written");
}

fn bytes_as(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// The bytes of all pages.
pub(crate) fn pages(gpu: &Gpu, weights: &ExpertWeights) -> Vec<Vec<u32>> {
    weights.buffers().map(|buffer| gpu.download(buffer).expect("read back")).collect()
}

pub(crate) fn load(
    gpu: &Gpu,
    ctx: &Context,
    dir: &Path,
    layer: u32,
    to: Option<WeightType>,
) -> MoeLayer {
    let load = Load { weight_type: to, page_limit: Some(40_000), progress: None };
    checkpoint::load_layer(ctx, &gpu.queue, dir, layer, load).expect("loaded")
}

/// Every value of a matrix.
pub(crate) fn values(matrix: HostWeights<'_>) -> Vec<f32> {
    (0..matrix.len()).map(|i| matrix.get(i)).collect()
}

/// Gate, up and down of each expert, and of the shared FFN as it is in the file.
fn ffns(checkpoint: &Checkpoint, layer: u32) -> Vec<[Vec<f32>; 3]> {
    let LayerConfig { experts, shared_experts, .. } = *checkpoint.layer_config();
    let of = |e| Projection::ALL.map(|p| values(checkpoint.expert(layer, e, p).expect("a matrix")));
    (0..experts + shared_experts).map(of).collect()
}

#[test]
fn presets_come_back_from_their_config() {
    for model in MODELS {
        let (layers, dense) = (model.layers, model.dense_layers);
        let (config, layout) = (model.config, Layout::Each);
        let plan = Plan { config, layers: layers - dense, dense, layout, shards: 1, seed: 0 };
        let Ok(json) = plan.config() else {
            assert_eq!(model.name, "ec-dlm", "only expert choice has no fields");
            continue;
        };
        let read = Config::from_json(Path::new("config.json"), json.to_string().as_bytes());
        let read = read.expect("a config");
        assert_eq!(read.layer, config, "{}", model.name);
        assert_eq!([read.layers, read.dense], [layers, dense], "{}", model.name);
        let coreset =
            matches!(config.routing, Routing::TokenChoice(rule) if rule.coreset.is_some());
        assert_eq!(read.block_size, coreset.then_some(32), "{}", model.name);
    }
}

/// The fields as the models' own files have them, with what else is in there.
#[test]
fn configs_of_published_models() {
    let read = |value: serde_json::Value| {
        Config::from_json(Path::new("config.json"), value.to_string().as_bytes()).expect("a config")
    };
    let preset = |name: &str| models::find(name).expect("a model").config;
    // LLaDA2's code has sigmoid scores and normalises without being told.
    let llada2 = json!({
        "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "first_k_dense_replace": 1, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5120, "moe_intermediate_size": 512, "n_group": 8,
        "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 20,
        "num_shared_experts": 1, "rope_scaling": null, "routed_scaling_factor": 2.5, "topk_group": 4,
    });
    let config = read(llada2.clone());
    assert_eq!(config.layer, preset("llada2-mini"));
    assert!(config.is_dense(0) && !config.is_dense(1));
    let mut llada22 = llada2;
    llada22["expert_capacity"] = 48.into();
    llada22["block_size"] = 32.into();
    let config = read(llada22);
    assert_eq!(config.layer, preset("llada2.2-mini"), "groups are ignored with a capacity");
    assert_eq!(config.block_size, Some(32));
    let config = read(json!({
        "model_type": "llada_moe", "hidden_size": 2048, "dense_intermediate_size": 8192, "expert_intermediate_size": 1024,
        "hidden_act": "silu", "moe_layer_freq": vec![1; 16], "moe_router_enable_expert_bias": false,
        "moe_router_score_function": "softmax", "norm_topk_prob": null, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 16, "routed_scaling_factor": 1, "router_num_group": null, "router_topk_group": null,
        "shared_expert_intermediate_size": null,
    }));
    assert_eq!(config.layer, preset("llada-moe"));
    assert!((0..16).all(|layer| !config.is_dense(layer)));
    let mut sdar = json!({
        "model_type": "sdar_moe", "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": true, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "block_size": 4,
    });
    let config = read(sdar.clone());
    assert_eq!(config.layer, preset("sdar-30b"));
    assert_eq!(config.block_size, Some(4));
    sdar["decoder_sparse_step"] = 2.into();
    sdar["mlp_only_layers"] = json!([3, 47]);
    let config = read(sdar);
    let moe: Vec<u32> = (0..8).filter(|&layer| !config.is_dense(layer)).collect();
    assert_eq!(moe, [1, 5, 7], "every second layer, without those that are named");
    let Routing::TokenChoice(rule) = read(json!({
        "hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "num_hidden_layers": 3, "scoring_func": "sigmoid", "routed_scaling_factor": 16, "expert_capacity": null,
    }))
    .layer
    .routing else {
        panic!("token choice")
    };
    assert_eq!((rule.score, rule.scale, rule.coreset), (Score::Sigmoid, 16.0, None::<BlockRule>));
}

#[test]
fn every_layout_gives_the_same_pages() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).expect("a context");
    let dir = written(&plan(Layout::Each, 1));
    let each = Checkpoint::open(dir.path()).expect("opened");
    let want = pages(&gpu, load(&gpu, &ctx, dir.path(), 2, None).weights());
    // By hand, from values.
    let by_hand =
        ExpertWeights::with_page_limit(&ctx, small().expert_shape(WeightType::Bf16), 40_000)
            .expect("pages");
    assert!(by_hand.page_counts()[0] > 2, "several pages");
    for (e, matrices) in (0..).zip(ffns(&each, 2)) {
        for (p, matrix) in Projection::ALL.into_iter().zip(&matrices) {
            by_hand.write(&gpu.queue, e, p, HostWeights::F32(matrix)).expect("written");
        }
    }
    assert_eq!(pages(&gpu, &by_hand), want, "by hand");
    assert_ne!(pages(&gpu, load(&gpu, &ctx, dir.path(), 1, None).weights()), want, "another layer");
    for (layout, shards) in [
        (Layout::Each, 5),
        (Layout::Stacked, 1),
        (Layout::Stacked, 3),
        (Layout::Fused, 2),
        (Layout::Fused, 40),
    ] {
        let dir = written(&plan(layout, shards));
        let layer = load(&gpu, &ctx, dir.path(), 2, None);
        assert_eq!(pages(&gpu, layer.weights()), want, "{layout:?} in {shards} files");
        let router: Vec<f32> = gpu.download(layer.router().weight.slice()).expect("read back");
        assert_eq!(
            router,
            values(each.router(2).expect("a router")),
            "{layout:?} in {shards} files"
        );
    }
    // Fused and transposed, [E, D, 2F] and [E, F, D]; and both shapes of which one alone would not tell: 2F = D.
    for config in [small(), {
        let mut config = small();
        config.hidden = 66;
        config
    }] {
        let plan = Plan { config, ..plan(Layout::Each, 1) };
        let dir = written(&plan);
        let each = Checkpoint::open(dir.path()).expect("opened");
        let want = pages(&gpu, load(&gpu, &ctx, dir.path(), 2, None).weights());
        let [d, f, e] = [config.hidden, config.intermediate, config.experts].map(|n| n as usize);
        let (mut gate_up, mut down) = (vec![], vec![]);
        for [gate, up, down_of] in &ffns(&each, 2)[..e] {
            gate_up.extend((0..d).flat_map(|k| {
                [gate, up].into_iter().flat_map(move |m| (0..f).map(move |n| m[n * d + k]))
            }));
            down.extend((0..f).flat_map(|k| (0..d).map(move |n| down_of[n * f + k])));
        }
        drop(each); // a mapped file cannot be replaced everywhere
        // The router and the shared experts from the other file, all through one with the tensors in another order.
        let bytes = std::fs::read(dir.path().join("model.safetensors")).expect("read");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("a file");
        let mut tensors: Tensors = file
            .iter()
            .filter(|(name, _)| !name.contains(".experts."))
            .map(|(name, t)| (name.to_string(), t.dtype(), t.shape().to_vec(), t.data().to_vec()))
            .collect();
        let stem = "model.layers.2.mlp.experts";
        tensors.push((
            format!("{stem}.gate_up_proj"),
            Dtype::BF16,
            vec![e, d, 2 * f],
            bytes_as(Dtype::BF16, &gate_up),
        ));
        tensors.push((
            format!("{stem}.down_proj"),
            Dtype::BF16,
            vec![e, f, d],
            bytes_as(Dtype::BF16, &down),
        ));
        write_file(&dir.path().join("model.safetensors"), &tensors);
        let got = pages(&gpu, load(&gpu, &ctx, dir.path(), 2, None).weights());
        assert_eq!(got, want, "transposed, D = {d}");
    }
}

#[test]
fn every_type_converts() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).expect("a context");
    let dir = written(&plan(Layout::Each, 1));
    let bytes = std::fs::read(dir.path().join("model.safetensors")).expect("read");
    let bf16s = safetensors::SafeTensors::deserialize(&bytes).expect("a file");
    // Values that no 16-bit type holds, NaN, infinities, subnormals of each type, and what rounds up to infinity.
    let odd = [f32::NAN, f32::INFINITY, -0.0, 1e-40, 6e-8, 65519.9, 65520.0, 3.4e38, f32::MAX];
    let mut seed = 0;
    let exact: HashMap<&str, Vec<f32>> = bf16s
        .iter()
        .map(|(name, tensor)| {
            seed += 1;
            let mut values = random(seed, tensor.shape().iter().product());
            values.iter_mut().zip(odd).for_each(|(value, odd)| *value = odd);
            (name, values)
        })
        .collect();
    for (dtype, of_file) in [
        (Dtype::F32, WeightType::F32),
        (Dtype::F16, WeightType::F16),
        (Dtype::BF16, WeightType::Bf16),
    ] {
        let tensors: Tensors = bf16s
            .iter()
            .map(|(name, t)| {
                (name.to_string(), dtype, t.shape().to_vec(), bytes_as(dtype, &exact[name]))
            })
            .collect();
        write_file(&dir.path().join("model.safetensors"), &tensors);
        let checkpoint = Checkpoint::open(dir.path()).expect("opened");
        assert_eq!(checkpoint.expert_shape(1).expect("a shape").types, of_file.into());
        // In the file's own type when not told, and in each type when told.
        for to in [None, Some(WeightType::F32), Some(WeightType::F16), Some(WeightType::Bf16)] {
            let layer = load(&gpu, &ctx, dir.path(), 1, to);
            let shape = layer.weights().shape();
            assert_eq!(shape.types, to.unwrap_or(of_file).into());
            let want = ExpertWeights::with_page_limit(&ctx, shape, 40_000).expect("pages");
            for (e, matrices) in (0..).zip(ffns(&checkpoint, 1)) {
                for (p, matrix) in Projection::ALL.into_iter().zip(&matrices) {
                    want.write(&gpu.queue, e, p, HostWeights::F32(matrix)).expect("written");
                }
            }
            assert_eq!(pages(&gpu, layer.weights()), pages(&gpu, &want), "{dtype:?} to {to:?}");
        }
        let down = checkpoint.expert(1, 4, Projection::Down).expect("a matrix");
        let want = &exact["model.layers.1.mlp.experts.4.down_proj.weight"];
        let want: Vec<u32> = bytes_as(dtype, want)
            .chunks(if dtype == Dtype::F32 { 4 } else { 2 })
            .map(|b| {
                match dtype {
                    Dtype::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
                    Dtype::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
                    _ => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
                }
                .to_bits()
            })
            .collect();
        let got: Vec<u32> = values(down).iter().map(|v| v.to_bits()).collect();
        assert_same(&got, &want, "values as they are in the file");
    }
}

/// Whether a loaded layer computes what the twins do on the same file.
#[track_caller]
pub(crate) fn agrees(gpu: &Gpu, checkpoint: &Checkpoint, index: u32, layer: &MoeLayer) {
    let settings = checkpoint.layer_config();
    let Routing::TokenChoice(rule) = settings.routing else { panic!("token choice") };
    let (tokens, d, e) = (45usize, settings.hidden as usize, settings.experts as usize);
    let x = random(3, tokens * d);
    assert_eq!(layer.config(), settings);
    let hidden = gpu.upload(&x);
    let out = gpu.upload(&vec![f32::NAN; x.len()]);
    let step = layer.bind(&Batch::new(&hidden, tokens as u32).into_out(&out)).expect("bound");
    gpu.run_layer(&step).expect("run");
    let [logits, s, r] = testkit::layer::selection(&step)
        .expect("tokens")
        .map(|slice| gpu.download::<f32>(slice).expect("read back"));
    let assigned: Vec<u32> = gpu.download(step.assigned().expect("tokens")).expect("read back");
    let weight = values(checkpoint.router(index).expect("a router"));
    let bias = checkpoint.bias(index).expect("read").map(values);
    let logits_want = wgmoe::ops::logits::cpu(&x, &weight, d);
    assert_close(&logits, &logits_want, 1e-4, 1e-4, "logits");
    if rule.score == Score::Sigmoid {
        let bias = bias.as_deref();
        let (_, r_want) = wgmoe::ops::scores::cpu(&logits, e, Score::Sigmoid, false, bias);
        assert_close(&r, &r_want, 1e-5, 1e-5, "selection");
    }
    let router = host_router(&weight, bias.as_deref());
    let routed = cpu_routing(settings, &router, HostBatch::default(), [&logits, &s, &r]);
    assert_same(&assigned, &routed.assigned, "assigned");
    let got: Vec<f32> = gpu.download(&out).expect("read back");
    let expert = |e, p| checkpoint.expert(index, e, p).expect("a matrix");
    for t in 0..tokens {
        let chosen = chosen(&assigned, &routed.gates, [tokens, e], t);
        assert_eq!(chosen.len(), rule.experts_per_token as usize);
        let want = cpu_token(settings, &expert, &x[t * d..][..d], &chosen);
        assert_close(&got[t * d..][..d], &want, 1e-5, 1e-4, &format!("layer {index}, token {t}"));
    }
}

/// The loaded layer against the twins, which read the same files.
#[test]
fn a_loaded_layer_runs() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).expect("a context");
    let dir = written(&plan(Layout::Stacked, 2));
    let checkpoint = Checkpoint::open(dir.path()).expect("opened");
    let layers = checkpoint.load_layers(&ctx, &gpu.queue, 1..3, Load::default()).expect("loaded");
    assert_eq!(layers.len(), 2);
    assert_eq!(checkpoint.layer_config(), &small());
    for (index, layer) in (1..).zip(&layers) {
        agrees(&gpu, &checkpoint, index, layer);
    }
}

/// The router alone is the file's, and a layer with four of its ten experts gives the bits of one with
/// all.
#[test]
fn routers_and_cached_layers_load() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).expect("a context");
    let dir = written(&plan(Layout::Each, 1));
    let checkpoint = std::sync::Arc::new(Checkpoint::open(dir.path()).expect("opened"));
    let router = checkpoint.load_router(&ctx, &gpu.queue, 1).expect("loaded");
    let got: Vec<f32> = gpu.download(router.weight.slice()).expect("read back");
    assert_same(&got, &values(checkpoint.router(1).expect("a router")), "router");
    let got: Vec<f32> = gpu.download(router.bias.expect("one").slice()).expect("read back");
    let want = values(checkpoint.bias(1).expect("a bias").expect("sigmoid has one"));
    assert_same(&got, &want, "bias");
    assert!(checkpoint.load_router(&ctx, &gpu.queue, 0).is_err(), "a dense layer");

    let shape = checkpoint.expert_shape(1).expect("a shape");
    let layer = checkpoint.load_layer(&ctx, &gpu.queue, 1, Load::default()).expect("loaded");
    let budget = 6 * shape.device_bytes() + 4 * 12;
    let options = CacheOptions::new(budget);
    let mut cached = checkpoint.load_cached(&ctx, &gpu.queue, 1, options).expect("loaded");
    assert_eq!(cached.cache().capacity(), 4);
    let tokens = 45;
    let x = random(3, tokens * small().hidden as usize);
    let hidden = gpu.upload(&x);
    let outs = [(); 2].map(|()| gpu.upload(&vec![f32::NAN; x.len()]));
    let batch = |out| Batch::new(&hidden, tokens as u32).into_out(out);
    gpu.run_layer(&layer.bind(&batch(&outs[0])).expect("bound")).expect("run");
    let mut step = cached.bind(&batch(&outs[1])).expect("bound");
    cached.run(&gpu.queue, &mut step).expect("run");
    let [want, got] = outs.map(|out| gpu.download::<u32>(&out).expect("read back"));
    assert_same(&got, &want, "out");

    let all = 0..checkpoint.config().layers;
    let with_experts = all.clone().filter(|&layer| !checkpoint.config().is_dense(layer)).count();
    let options = CacheOptions::new(with_experts as u64 * budget);
    let model = checkpoint.load_cached_model(&ctx, &gpu.queue, all, options).expect("loaded");
    let capacities: Vec<usize> = model.layers().iter().map(|l| l.cache().capacity()).collect();
    assert_eq!(capacities, vec![4; with_experts]);
}

#[test]
fn names_can_be_told() {
    let dir = written(&plan(Layout::Each, 1));
    let path = dir.path().join("model.safetensors");
    let want = ffns(&Checkpoint::open(dir.path()).expect("opened"), 1);
    let bytes = std::fs::read(&path).expect("read");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a file");
    let renamed: Tensors = file
        .iter()
        .map(|(name, t)| {
            let name = name
                .replace("model.layers.", "blocks.")
                .replace("gate_proj", "w1")
                .replace("up_proj", "w3");
            (name.replace("down_proj", "w2"), t.dtype(), t.shape().to_vec(), t.data().to_vec())
        })
        .collect();
    write_file(&path, &renamed);
    let missing =
        Checkpoint::open(dir.path()).expect("opened").check_layer(1).expect_err("other names");
    assert!(
        missing.to_string().contains("`model.layers.1.mlp.gate.weight`: is missing"),
        "{missing}"
    );
    let apart = |prefix: &str| {
        let name = |matrix: &str| format!("{prefix}.{matrix}.weight");
        ExpertNames::Apart { gate: name("w1"), up: name("w3"), down: name("w2") }
    };
    let names = Names {
        router: "blocks.{layer}.mlp.gate.weight".into(),
        bias: "blocks.{layer}.mlp.gate.expert_bias".into(),
        experts: apart("blocks.{layer}.mlp.experts.{expert}"),
        shared: apart("blocks.{layer}.mlp.shared_experts"),
    };
    let mut all = Names::known();
    all.push(names);
    let checkpoint = Checkpoint::with_names(dir.path(), all).expect("opened");
    checkpoint.check_layer(1).expect("all there");
    assert_eq!(ffns(&checkpoint, 1), want);
    let none = Checkpoint::with_names(dir.path(), vec![]).expect("opened");
    assert!(none.check_layer(1).is_err(), "no names at all");
}
