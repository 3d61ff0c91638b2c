//! A folder with all that a run needs to go on, and its layers as `wgmoe::checkpoint` reads them.
//!
//! | file | what |
//! |---|---|
//! | `model.safetensors`, `config.json` | the layers, in LLaDA2's names; the rule as far as `config.json` has fields for it |
//! | `model.bpk` | all weights, as Burn records them |
//! | `optimizer.bpk`, `run.json` | the optimizer's state, the steps done and the options |
use crate::Outcome;
use crate::model::Model;
use crate::options::Options;
use crate::training::Learner;
use burn::module::Module;
use burn::optim::ModuleOptimizer;
use burn::tensor::Tensor;
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::Path;
use wgmoe_burn::MoeFfn;
use wgmoe_burn::wgmoe::layer::LayerConfig;
use wgmoe_burn::wgmoe::routing::{GateRule, Routing, Score};

/// How far a run is.
#[derive(Debug, Serialize, Deserialize)]
struct Progress {
    step: usize,
    options: Options,
}

/// Writes the folder, which is made.
pub fn save(learner: &Learner, options: &Options, folder: &Path) -> Outcome<()> {
    std::fs::create_dir_all(folder)?;
    learner.model.clone().save_file(folder.join("model.bpk"))?;
    learner.optimizer.save(folder.join("optimizer.bpk"))?;
    let progress = Progress { step: learner.step, options: options.clone() };
    std::fs::write(folder.join("run.json"), serde_json::to_string_pretty(&progress)?)?;
    save_layers(learner.model.layers(), folder)
}

/// Weights and optimizer of a folder, and the steps that are done.
pub fn resume(model: Model, optimizer: ModuleOptimizer, folder: &Path) -> Outcome<Learner> {
    let model = model.try_load_file(folder.join("model.bpk"))?;
    let optimizer = optimizer.load(folder.join("optimizer.bpk"))?;
    let progress = std::fs::read_to_string(folder.join("run.json"))?;
    let Progress { step, .. } = serde_json::from_str(&progress)?;
    Ok(Learner { model, optimizer, step })
}

/// The layers alone, as `wgmoe::checkpoint::load_layer` reads them. An expert-choice layer is read as one of token choice
/// with its K, since `config.json` has no fields for it: `MoeLayer::with_routing` makes it what it was.
pub fn save_layers<'a>(layers: impl Iterator<Item = &'a MoeFfn>, folder: &Path) -> Outcome<()> {
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = vec![];
    let mut config = None;
    let mut has_bias = false;
    for (number, layer) in layers.enumerate() {
        let own = *layer.layer().config();
        let weights = layer.weights.as_ref().ok_or("a layer without weights")?;
        let mut add = |name: &str, shape: Vec<usize>, values: Vec<u8>| {
            tensors.push((format!("model.layers.{number}.mlp.{name}"), shape, values));
        };
        let router = weights.router.val();
        add("gate.weight", router.dims().into(), bytes(router)?);
        if let Some(bias) = &weights.bias {
            has_bias = true;
            add("gate.expert_bias", bias.dims().into(), bytes(bias.val())?);
        }
        let experts = own.experts as usize;
        for (name, stack) in [("gate", &weights.gate), ("up", &weights.up), ("down", &weights.down)]
        {
            let stack = stack.val();
            let [all, rows, columns] = stack.dims();
            let routed = stack.clone().slice([0..experts]);
            add(&format!("experts.{name}_proj"), routed.dims().into(), bytes(routed)?);
            if all > experts {
                // One FFN of all shared experts: their rows of gate and up below each other, their columns of down side
                // by side.
                let shared = stack.slice([experts..all]);
                let shared = if name == "down" {
                    shared.swap_dims(0, 1).reshape([rows, (all - experts) * columns])
                } else {
                    shared.reshape([(all - experts) * rows, columns])
                };
                let name = format!("shared_experts.{name}_proj.weight");
                add(&name, shared.dims().into(), bytes(shared)?);
            }
        }
        config = Some((own, number + 1));
    }
    let (config, count) = config.ok_or("no layers")?;
    std::fs::write(folder.join("config.json"), config_json(&config, count, has_bias)?)?;
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views = views.collect::<Outcome<Vec<_>>>()?;
    Ok(serialize_to_file(views, None, &folder.join("model.safetensors"))?)
}

fn bytes<const R: usize>(tensor: Tensor<R>) -> Outcome<Vec<u8>> {
    let values: Vec<f32> = tensor.try_into_vec_as()?;
    Ok(values.into_iter().flat_map(f32::to_le_bytes).collect())
}

fn config_json(config: &LayerConfig, layers: usize, has_bias: bool) -> Outcome<String> {
    let gate = match &config.routing {
        Routing::TokenChoice(rule) => rule.gate,
        _ => GateRule::Normalised,
    };
    let value = json!({
        "hidden_size": config.hidden,
        "moe_intermediate_size": config.intermediate,
        "num_experts": config.experts,
        "num_experts_per_tok": config.routing.experts_per_token(),
        "num_shared_experts": config.shared_experts,
        "num_hidden_layers": layers,
        "norm_topk_prob": gate != GateRule::Unnormalised,
        "score_function": if config.routing.score() == Score::Sigmoid { "sigmoid" } else { "softmax" },
        "moe_router_enable_expert_bias": has_bias,
        "hidden_act": "silu",
    });
    Ok(serde_json::to_string_pretty(&value)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Rule;
    use crate::training::Run;
    use crate::{language, optimise};
    use burn::tensor::Distribution;
    use clap::Parser;
    use wgmoe_burn::MoeDevice;
    use wgmoe_burn::wgmoe::checkpoint::{Load, load_layer};

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn small(rule: Rule) -> Options {
        let line = "train --layers 2 --hidden 64 --intermediate 32 --experts 8 --batch 2 --length 32 --steps 4 --warm-up 1";
        Options { rule, ..Line::parse_from(line.split(' ')).options }
    }

    fn host<const R: usize>(tensor: Tensor<R>) -> Vec<u32> {
        let values: Vec<f32> = tensor.try_into_vec_as().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    }

    /// Every weight's bits, and the layers' output.
    fn weights(model: &Model) -> Vec<Vec<u32>> {
        let of = |layer: &MoeFfn| {
            let weights = layer.weights.as_ref().unwrap();
            let bias = weights.bias.as_ref().map(|b| host(b.val())).unwrap_or_default();
            [host(weights.router.val()), host(weights.gate.val()), host(weights.down.val()), bias]
        };
        model.layers().flat_map(of).collect()
    }

    /// One test, since Burn makes its device once. A run that is saved in the middle and goes on ends where one that was
    /// not ends, and `wgmoe::checkpoint` reads layers that compute what the saved ones do.
    #[test]
    fn runs_go_on_and_layers_are_read() {
        let device = MoeDevice::open().expect("a device");
        let folder = std::env::temp_dir().join(format!("wgmoe-train-{}", std::process::id()));
        let text = language::synthetic(1, 4096);
        for rule in [Rule::TokenChoice, Rule::LossFree, Rule::ExpertChoice] {
            let options = small(rule);
            let (sizes, routing) = options.sizes().unwrap();
            let begin = |seed| {
                device.device().seed(seed);
                let model = Model::new(&device, &sizes, Some(options.losses())).unwrap();
                Learner { model, optimizer: optimise::adam(), step: 0 }
            };
            let run = |options, learner| {
                let (training, held_out, device) = (&text[..], &text[..], device.device());
                let run = Run { options, routing, device, training, held_out, batches_from: 0 };
                run.train(learner).unwrap().0
            };
            let whole = run(&options, begin(1));
            // The rate follows all steps, so that half a run is four steps of which two are done.
            let mut half = begin(1);
            let two = Run {
                options: &options,
                routing,
                device: device.device(),
                training: &text,
                held_out: &text,
                batches_from: 0,
            };
            for _ in 0..2 {
                half = two.step(half).unwrap().0;
                half.model.balance(options.bias_rate).unwrap();
            }
            save(&half, &options, &folder).unwrap();
            let again = begin(2);
            assert_ne!(weights(&again.model), weights(&half.model));
            let resumed = resume(again.model, again.optimizer, &folder).unwrap();
            assert_eq!(resumed.step, 2);
            assert_eq!(weights(&resumed.model), weights(&half.model));
            assert_eq!(weights(&run(&options, resumed).model), weights(&whole.model), "{rule:?}");

            let distribution = Distribution::Normal(0.0, 1.0);
            let x = Tensor::<2>::random([32, 64], distribution, device.device());
            save(&whole, &options, &folder).unwrap();
            for (number, layer) in whole.model.layers().enumerate() {
                let ctx = device.context();
                let read = load_layer(ctx, device.queue(), &folder, number as u32, Load::default());
                let read = read.unwrap().with_routing(sizes.layer.routing).unwrap();
                let read = MoeFfn::from_layer(&device, read);
                let own = layer.valid().forward(x.clone());
                assert_eq!(host(read.forward(x.clone())), host(own), "{rule:?}, layer {number}");
            }
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
