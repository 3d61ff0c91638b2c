//! A bidirectional transformer: RMSNorm, rotary positions and attention are Burn's, every block's FFN is wgmoe's layer.
use burn::module::Module;
use burn::nn::{
    Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig, RmsNorm, RmsNormConfig,
    RotaryEncoding, RotaryEncodingConfig,
};
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Int, Tensor};
use wgmoe_burn::wgmoe::Result;
use wgmoe_burn::wgmoe::layer::LayerConfig;
use wgmoe_burn::wgmoe::ops::router_loss::Coefficients;
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
        let Sizes { layers, heads, length, layer } = *sizes;
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
    /// [`MoeFfn::forward_sequences`].
    pub fn forward(
        &self,
        tokens: Tensor<2, Int>,
        capacity: Option<&[u32]>,
        apart: bool,
    ) -> Tensor<3> {
        let mut x = self.embedding.forward(tokens);
        let [sequences, length, width] = x.dims();
        for block in &self.blocks {
            x = x.clone() + self.attend(block, block.attention_norm.forward(x));
            let normed = block.ffn_norm.forward(x.clone());
            x = x + if apart {
                block.ffn.forward_sequences(normed, capacity)
            } else {
                let flat = normed.reshape([sequences * length, width]);
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
}

/// Whole numbers as a tensor.
pub fn ints<const R: usize>(
    values: Vec<i32>,
    shape: [usize; R],
    device: &Device,
) -> Tensor<R, Int> {
    Tensor::from_data(burn::tensor::TensorData::new(values, shape), device)
}
