//! Checkpoints of 8-bit floats, whose scales lie in tensors beside.
use crate::checkpoint::{agrees, values};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;
use testkit::prelude::{assert_same, gpu, random};
use wgmoe::checkpoint::{Checkpoint, Load};
use wgmoe::weights::Projection;
use wgmoe::{Context, Error, WeightType};

/// No multiples of a tile: three by two tiles, with short ones at both edges.
const D: usize = 300;
const F: usize = 200;
const E: usize = 3;

/// How scales are given.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scales {
    Tiles,
    Rows,
    FlatRows,
    One,
    Single,
}

impl Scales {
    const ALL: [Self; 5] = [Self::Tiles, Self::Rows, Self::FlatRows, Self::One, Self::Single];

    fn shape(self, [rows, columns]: [usize; 2]) -> Vec<usize> {
        match self {
            Self::Tiles => vec![rows.div_ceil(128), columns.div_ceil(128)],
            Self::Rows => vec![rows, 1],
            Self::FlatRows => vec![rows],
            Self::One => vec![1],
            Self::Single => vec![],
        }
    }

    /// Which of a matrix's scales is a value's.
    fn of(self, [row, column]: [usize; 2], columns: usize) -> usize {
        match self {
            Self::Tiles => row / 128 * columns.div_ceil(128) + column / 128,
            Self::Rows | Self::FlatRows => row,
            Self::One | Self::Single => 0,
        }
    }
}

/// A code of e4m3, by its definition: s eeee mmm, bias 7, no infinities.
fn e4m3(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    match exponent {
        0 => sign * mantissa * 2f32.powi(-9),
        e => sign * (1.0 + mantissa / 8.0) * 2f32.powi(e - 7),
    }
}

struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Tensors of a file, and the values of each matrix by its name.
#[derive(Default)]
struct Written {
    tensors: Vec<Tensor>,
    matrices: Vec<(String, Vec<f32>)>,
}

impl Written {
    /// Some matrices `[rows, columns]` in one tensor, whose scales are called by this suffix.
    fn add(
        &mut self,
        name: &str,
        stack: &[usize],
        matrix: [usize; 2],
        scales: Scales,
        (suffix, dtype): (&str, Dtype),
    ) {
        let [rows, columns] = matrix;
        let count: usize = stack.iter().product();
        let seed = self.tensors.len() as u64;
        let codes: Vec<u8> = random(seed, count * rows * columns)
            .iter()
            .map(|v| (v.to_bits() >> 8) as u8)
            // Not NaN; and not so large that a layer's output says nothing.
            .map(|code| (code & 0x80) | ((code & 0x7f) % 0x48))
            .collect();
        let one: usize = scales.shape(matrix).iter().product();
        let factors: Vec<f32> =
            random(seed + 1000, count * one).iter().map(|v| 0.05 + v.abs() * 0.02).collect();
        let factors: Vec<f32> = match dtype {
            Dtype::F16 => factors.iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
            Dtype::BF16 => factors.iter().map(|&v| bf16::from_f32(v).to_f32()).collect(),
            _ => factors,
        };
        let value = |i: usize| {
            let (at, i) = (i / (rows * columns), i % (rows * columns));
            let factor = factors[at * one + scales.of([i / columns, i % columns], columns)];
            e4m3(codes[i + at * rows * columns]) * factor
        };
        self.matrices.push((name.into(), (0..codes.len()).map(value).collect()));
        let shape = |of: &[usize]| [stack, of].concat();
        self.tensors.push(Tensor {
            name: name.into(),
            dtype: Dtype::F8_E4M3,
            shape: shape(&matrix),
            bytes: codes,
        });
        self.tensors.push(Tensor {
            name: format!("{name}{suffix}"),
            dtype,
            shape: shape(&scales.shape(matrix)),
            bytes: match dtype {
                Dtype::F16 => {
                    factors.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()
                }
                Dtype::BF16 => {
                    factors.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()
                }
                _ => factors.iter().flat_map(|v| v.to_le_bytes()).collect(),
            },
        });
    }

    fn matrix(&self, name: &str) -> &[f32] {
        &self.matrices.iter().find(|(n, _)| n == name).expect("a matrix").1
    }

    fn write(&self, dir: &Path, config: &Value) {
        let views = self.tensors.iter().map(|t| {
            (&t.name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).expect("a tensor"))
        });
        safetensors::serialize_to_file(views, None, &dir.join("model.safetensors"))
            .expect("written");
        std::fs::write(dir.join("config.json"), config.to_string()).expect("written");
    }

    fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name == name).expect("a tensor")
    }
}

fn config() -> Value {
    json!({
        "model_type": "llada2_moe", "hidden_size": D, "moe_intermediate_size": F, "num_experts": E,
        "num_experts_per_tok": 2, "num_hidden_layers": 1, "num_shared_experts": 1,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    })
}

const INV: (&str, Dtype) = ("_scale_inv", Dtype::F32);
const STEM: &str = "model.layers.0.mlp";
const GATE_UP: &str = "model.layers.0.mlp.experts.gate_up_proj";
const GATE: &str = "model.layers.0.mlp.experts.1.gate_proj.weight";

/// A layer's tensors: a tensor for each matrix, or stacked and fused.
fn layer(fused: bool, scales: Scales, suffix: (&str, Dtype)) -> Written {
    let mut written = Written::default();
    let router = random(7, E * D);
    written.tensors.push(Tensor {
        name: format!("{STEM}.gate.weight"),
        dtype: Dtype::F32,
        shape: vec![E, D],
        bytes: router.iter().flat_map(|v| v.to_le_bytes()).collect(),
    });
    let down = |p: &str| if p == "down" { [D, F] } else { [F, D] };
    if fused {
        written.add(GATE_UP, &[E], [2 * F, D], scales, suffix);
        written.add(&format!("{STEM}.experts.down_proj"), &[E], [D, F], scales, suffix);
    } else {
        for e in 0..E {
            for p in ["gate", "up", "down"] {
                let name = format!("{STEM}.experts.{e}.{p}_proj.weight");
                written.add(&name, &[], down(p), scales, suffix);
            }
        }
    }
    for p in ["gate", "up", "down"] {
        let name = format!("{STEM}.shared_experts.{p}_proj.weight");
        written.add(&name, &[], down(p), scales, suffix);
    }
    written
}

fn folder(written: &Written) -> TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    written.write(dir.path(), &config());
    dir
}

#[test]
fn values_and_their_scales() {
    let suffixes = [("_scale_inv", Dtype::F32), ("_scale", Dtype::BF16), ("_scale", Dtype::F16)];
    let all = Scales::ALL.into_iter().flat_map(|s| suffixes.map(|suffix| (s, suffix)));
    for ((scales, suffix), fused) in all.flat_map(|s| [(s, false), (s, true)]) {
        let written = layer(fused, scales, suffix);
        let dir = folder(&written);
        let checkpoint = Checkpoint::open(dir.path()).expect("opened");
        checkpoint.check_layer(0).expect("all there");
        let words =
            [("gate", Projection::Gate), ("up", Projection::Up), ("down", Projection::Down)];
        for (e, (word, p)) in (0..=E).flat_map(|e| words.map(|w| (e, w))) {
            let got = values(checkpoint.expert(0, e as u32, p).expect("a matrix"));
            let one = D * F;
            let want = match (e == E, fused, p) {
                (true, ..) => written.matrix(&format!("{STEM}.shared_experts.{word}_proj.weight")),
                (_, false, _) => written.matrix(&format!("{STEM}.experts.{e}.{word}_proj.weight")),
                (_, _, Projection::Down) => {
                    &written.matrix(&format!("{STEM}.experts.down_proj"))[e * one..][..one]
                }
                _ => {
                    let up = usize::from(p == Projection::Up);
                    &written.matrix(GATE_UP)[(2 * e + up) * one..][..one]
                }
            };
            assert_same(
                &got,
                want,
                &format!("{scales:?} {suffix:?}, fused: {fused}, expert {e}, {word}"),
            );
        }
        assert_eq!(checkpoint.expert_shape(0).expect("a shape").types, WeightType::Fp8.into());
    }
}

#[test]
fn a_layer_of_8_bit_floats_runs() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).expect("a context");
    for (fused, scales) in [(true, Scales::Tiles), (false, Scales::Rows)] {
        let dir = folder(&layer(fused, scales, INV));
        let checkpoint = Checkpoint::open(dir.path()).expect("opened");
        let loaded = checkpoint.load_layer(&ctx, &gpu.queue, 0, Load::default()).expect("loaded");
        assert_eq!(loaded.weights().shape().types, WeightType::Fp8.into());
        agrees(&gpu, &checkpoint, 0, &loaded);
    }
}

/// Damages a layer, and expects an error about this tensor or field that says this.
#[track_caller]
fn expect(damage: impl FnOnce(&mut Written, &mut Value), item: &str, says: &str) {
    let (mut written, mut config) = (layer(false, Scales::Tiles, INV), config());
    damage(&mut written, &mut config);
    let dir = tempfile::tempdir().expect("a folder");
    written.write(dir.path(), &config);
    let checked = Checkpoint::open(dir.path()).and_then(|c| c.check_layer(0));
    match checked.expect_err("damaged") {
        Error::Checkpoint { item: found, reason, .. } => {
            assert_eq!(found.as_deref(), Some(item), "{reason}");
            assert!(reason.contains(says), "`{reason}` does not say `{says}`");
        }
        other => panic!("expected an error about a file, got {other}"),
    }
}

#[test]
fn scales_that_do_not_fit() {
    let scale = format!("{GATE}_scale_inv");
    let says = format!("is F8_E4M3, and neither `{scale}` nor `{GATE}_scale` is there");
    expect(|w, _| w.tensor(&scale).name = "x".into(), GATE, &says);
    let bytes = |w: &mut Written, _: &mut Value| {
        let tensor = w.tensor(&scale);
        tensor.dtype = Dtype::F8_E8M0;
        tensor.bytes.truncate(6);
    };
    expect(bytes, &scale, "is F8_E8M0, expected F32, F16 or BF16");
    let turned = |w: &mut Written, _: &mut Value| w.tensor(&scale).shape.reverse();
    let says = "has shape [3, 2], expected [2, 3] or [200, 1] or [200] or [1]";
    expect(turned, &scale, says);
    let few = |w: &mut Written, _: &mut Value| {
        let tensor = w.tensor(&scale);
        tensor.shape = vec![1, 3];
        tensor.bytes.truncate(12);
    };
    expect(few, &scale, "has shape [1, 3]");
    let other_tiles = |_: &mut Written, config: &mut Value| {
        config["quantization_config"]["weight_block_size"] = json!([64, 64]);
    };
    expect(other_tiles, "quantization_config", "`weight_block_size` [64,64], expected [128, 128]");
    // One FFN of two experts' width: its down projection's tiles are not cut.
    let shared = |w: &mut Written, config: &mut Value| {
        config["num_shared_experts"] = 2.into();
        w.tensors.retain(|t| !t.name.contains("shared"));
        for (p, matrix) in [("gate", [2 * F, D]), ("up", [2 * F, D]), ("down", [D, 2 * F])] {
            let name = format!("{STEM}.shared_experts.{p}_proj.weight");
            w.add(&name, &[], matrix, Scales::Tiles, INV);
        }
    };
    let down = format!("{STEM}.shared_experts.down_proj.weight_scale_inv");
    expect(shared, &down, "not cut into those of several shared experts");
}
