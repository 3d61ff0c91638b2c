//! A bidirectional transformer: RMSNorm, rotary positions and attention are Burn's, every block's FFN is wgmoe's layer.
use crate::Outcome;
use burn::module::Module;
use burn::nn::{
    Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig, RmsNorm, RmsNormConfig,
    RotaryEncoding, RotaryEncodingConfig,
};
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Int, Tensor, TensorData};
use wgmoe_burn::wgmoe::Result;
use wgmoe_burn::wgmoe::layer::LayerConfig;
use wgmoe_burn::wgmoe::ops::bias_update;
use wgmoe_burn::wgmoe::ops::router_loss::Coefficients;
use wgmoe_burn::wgmoe::plan::Stats;
use wgmoe_burn::{MoeDevice, MoeFfn, MoeTensors};

/// Classes that are predicted: bytes.
pub const CLASSES: usize = 256;
/// The token of a masked place.
pub const MASK: i32 = 256;

/// Sizes.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub layers: usize,
    pub heads: usize,
    pub length: usize,
    /// Whether experts are chosen with a bias.
    pub has_bias: bool,
    pub layer: LayerConfig,
}

#[derive(Module, Debug)]
struct Block {
    attention_norm: RmsNorm,
    qkv: Linear,
    attention: Linear,
    ffn_norm: RmsNorm,
    ffn: MoeFfn,
}

#[derive(Module, Debug)]
pub struct Model {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
    #[module(skip)]
    rotary: RotaryEncoding,
    #[module(skip)]
    heads: usize,
}

impl Model {
    /// A model with autodiff, whose weights are random.
    pub fn new(device: &MoeDevice, sizes: &Sizes, losses: Option<Coefficients>) -> Result<Self> {
        let Sizes { layers, heads, length, has_bias, layer } = *sizes;
        let burn = device.device();
        let width = layer.hidden as usize;
        let normal = |std| Initializer::Normal { mean: 0.0, std };
        let linear = |from, to, std| {
            LinearConfig::new(from, to).with_bias(false).with_initializer(normal(std)).init(burn)
        };
        let deviation = 1.0 / (width as f64).sqrt();
        // What is added to the residual stream is smaller the more blocks add to it.
        let small = 1.0 / (2.0 * layers as f64).sqrt();
        let block = |_| {
            let mut tensors = MoeTensors::random(&layer, burn);
            tensors.down = tensors.down * small;
            tensors.bias = has_bias.then(|| Tensor::zeros([layer.experts as usize], burn));
            let mut ffn = MoeFfn::learning(device, layer, tensors)?;
            if let Some(losses) = losses {
                ffn = ffn.with_router_losses(losses)?;
            }
            Ok(Block {
                attention_norm: RmsNormConfig::new(width).init(burn),
                qkv: linear(width, 3 * width, deviation),
                attention: linear(width, width, deviation * small),
                ffn_norm: RmsNormConfig::new(width).init(burn),
                ffn,
            })
        };
        let embedding = EmbeddingConfig::new(CLASSES + 1, width).with_initializer(normal(0.5));
        let model = Self {
            embedding: embedding.init(burn),
            blocks: (0..layers).map(block).collect::<Result<_>>()?,
            norm: RmsNormConfig::new(width).init(burn),
            head: linear(width, CLASSES, deviation),
            rotary: RotaryEncodingConfig::new(length, width / heads).init(burn),
            heads,
        };
        Ok(model.train())
    }

    /// `[sequences, tokens]` to logits `[sequences, tokens, classes]`. `capacity` is that of
    /// [`MoeFfn::forward_sequences`]; `see` is given the hidden states `[tokens, D]` that go into each block's layer.
    pub fn forward(
        &self,
        tokens: Tensor<2, Int>,
        capacity: Option<&[u32]>,
        apart: bool,
        see: &mut dyn FnMut(Tensor<2>),
    ) -> Tensor<3> {
        let mut x = self.embedding.forward(tokens);
        let [sequences, length, width] = x.dims();
        for block in &self.blocks {
            x = x.clone() + self.attend(block, block.attention_norm.forward(x));
            let normed = block.ffn_norm.forward(x.clone());
            let flat = normed.clone().reshape([sequences * length, width]);
            see(flat.clone());
            x = x + if apart {
                block.ffn.forward_sequences(normed, capacity)
            } else {
                block.ffn.forward(flat).reshape([sequences, length, width])
            };
        }
        self.head.forward(self.norm.forward(x))
    }

    /// Every token attends to all of its sequence.
    fn attend(&self, block: &Block, x: Tensor<3>) -> Tensor<3> {
        let [sequences, length, width] = x.dims();
        let size = width / self.heads;
        let parts = block.qkv.forward(x).chunk(3, 2);
        let heads = |i: usize| {
            parts[i].clone().reshape([sequences, length, self.heads, size]).swap_dims(1, 2)
        };
        let [q, k] = [0, 1].map(|i| self.rotary.forward(heads(i)));
        let scores = q.matmul(k.swap_dims(2, 3)) / (size as f64).sqrt();
        let out = softmax(scores, 3).matmul(heads(2));
        block.attention.forward(out.swap_dims(1, 2).reshape([sequences, length, width]))
    }

    /// The means over blocks of the router z-loss and the balance loss in the last backward pass.
    pub fn router_losses(&self) -> Result<[f32; 2]> {
        let mut sums = [0.0; 2];
        for block in &self.blocks {
            let values = block.ffn.router_losses()?;
            sums = [sums[0] + values[0], sums[1] + values[1]];
        }
        Ok(sums.map(|sum| sum / self.blocks.len() as f32))
    }

    /// Each block's layer.
    pub fn layers(&self) -> impl Iterator<Item = &MoeFfn> {
        self.blocks.iter().map(|block| &block.ffn)
    }

    /// What training's forward passes did in each layer since the last time. Where layers have a bias, it moves by `rate`.
    pub fn balance(&mut self, rate: f32) -> Outcome<Vec<Stats>> {
        let balanced = |block: &mut Block| -> Outcome<Stats> {
            let stats = block.ffn.take_stats()?;
            let bias = block.ffn.weights.as_mut().and_then(|weights| weights.bias.as_mut());
            if let Some(bias) = bias {
                let old = bias.val();
                let mut values: Vec<f32> = old.clone().try_into_vec_as()?;
                bias_update::cpu(&mut values, &stats.tokens_per_expert, rate);
                let data = TensorData::new(values, old.dims());
                *bias = bias.clone().map(|_| Tensor::from_data(data, &old.device()));
            }
            Ok(stats)
        };
        self.blocks.iter_mut().map(balanced).collect()
    }

    /// Only the routers learn on.
    pub fn with_routers_alone(self) -> Self {
        let mut model = self.no_grad();
        for block in &mut model.blocks {
            if let Some(weights) = &mut block.ffn.weights {
                weights.router = weights.router.clone().set_require_grad(true);
            }
        }
        model
    }
}

/// Whole numbers as a tensor.
pub fn ints<const R: usize>(
    values: Vec<i32>,
    shape: [usize; R],
    device: &Device,
) -> Tensor<R, Int> {
    Tensor::from_data(TensorData::new(values, shape), device)
}
