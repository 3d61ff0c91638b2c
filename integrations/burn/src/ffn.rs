//! The module.
use crate::op::{MoeOps, Place, flush};
use crate::shared::MoeDevice;
use burn::backend::{DType, Dispatch, TensorMetadata};
use burn::module::Module;
use burn::tensor::Tensor;
use burn_cubecl::tensor::CubeTensor;
use std::sync::{Arc, Mutex, PoisonError};
use wgmoe::layer::{Batch, BoundLayer, LayerConfig, MoeLayer, Router};
use wgmoe::weights::{HostWeights, Projection};
use wgmoe::{Error, ExpertWeights, Result, WeightType, layer};

/// A layer's weights as Burn tensors, of any float type. Shared experts follow the routed ones: X = E + shared.
#[derive(Clone, Debug)]
pub struct MoeTensors {
    /// `[E, D]`.
    pub router: Tensor<2>,
    /// `[E]`: added to what experts are chosen by.
    pub bias: Option<Tensor<1>>,
    /// `[X, F, D]`.
    pub gate: Tensor<3>,
    /// `[X, F, D]`.
    pub up: Tensor<3>,
    /// `[X, D, F]`.
    pub down: Tensor<3>,
}

/// Router, experts, shared experts and combination in place of a transformer block's FFN, for inference. Its weights lie in
/// pages of their own, so a record of the module holds none.
#[derive(Module, Debug)]
pub struct MoeFfn {
    #[module(skip)]
    layer: Layer,
}

impl MoeFfn {
    /// A layer of Burn tensors: read back, converted and paged once.
    ///
    /// # Errors
    ///
    /// A configuration that makes no sense, tensors of other shapes, or what wgpu refuses.
    pub fn new(
        device: &MoeDevice,
        config: LayerConfig,
        weight_type: WeightType,
        tensors: MoeTensors,
    ) -> Result<Self> {
        let ctx = device.context();
        let weights = ExpertWeights::new(ctx, config.expert_shape(weight_type))?;
        let stacks = [("gate", tensors.gate), ("up", tensors.up), ("down", tensors.down)];
        for (projection, (name, stack)) in Projection::ALL.into_iter().zip(stacks) {
            let [rows, columns] = weights.shape().matrix(projection).map(|n| n as usize);
            let expected = [weights.shape().experts as usize, rows, columns];
            if stack.dims() != expected {
                let reason = format!("{:?}, expected {expected:?}", stack.dims());
                return Err(Error::Invalid { name, reason });
            }
            for expert in 0..weights.shape().experts {
                let at = expert as usize;
                let values = device.read(stack.clone().slice([at..at + 1]));
                weights.write(device.queue(), expert, projection, HostWeights::F32(&values))?;
                device.moved(values.len() as u64 * weight_type.bytes());
            }
        }
        let upload = |name, values: Vec<f32>| {
            device.moved(values.len() as u64 * 4);
            layer::Tensor::new(ctx, name, &values)
        };
        let mut router = Router::new(upload("router", device.read(tensors.router))?);
        router.bias = tensors.bias.map(|b| upload("bias", device.read(b))).transpose()?;
        Ok(Self::from_layer(device, MoeLayer::new(ctx, config, router, weights)?))
    }

    /// A layer of weights from anywhere, which must have been made on the device's [context](MoeDevice::context).
    pub fn from_layer(device: &MoeDevice, layer: MoeLayer) -> Self {
        let (device, bound) = (device.clone(), Arc::default());
        Self { layer: Layer { device, layer, bound } }
    }

    /// `[tokens, D]` f32 to `[tokens, D]`. The tokens are one sequence, and blocks of 32 where the rule has blocks.
    ///
    /// # Panics
    ///
    /// Where the tensor is of another shape or type. Where wgpu refuses the work, or the tensor lies on another device, Burn
    /// reports it as a failure of its own operations, when the result is read.
    pub fn forward(&self, hidden: Tensor<2>) -> Tensor<2> {
        let width = self.layer.layer.config().hidden as usize;
        assert_eq!(hidden.dims()[1], width, "hidden states are [tokens, {width}]");
        assert_eq!(hidden.dtype(), DType::F32, "hidden states are f32");
        let out = <Dispatch as MoeOps>::moe_ffn(hidden.into_dispatch(), self.layer.clone());
        Tensor::from_dispatch(out)
    }

    /// The layer.
    pub fn layer(&self) -> &MoeLayer {
        &self.layer.layer
    }

    /// Where the last run read its input and wrote its output: both are Burn's buffers.
    pub fn last_places(&self) -> Option<[Place; 2]> {
        let bound = self.layer.bound.lock().unwrap_or_else(PoisonError::into_inner);
        bound.last().map(|b| b.places.clone())
    }
}

/// A step, and the tensors that it is bound to.
#[derive(Debug)]
struct Bound {
    places: [Place; 2],
    step: BoundLayer,
}

/// Steps that are kept, for Burn gives the same memory out again and again. Each keeps its buffers.
const KEPT: usize = 4;

/// What the operation is given.
#[derive(Clone, Debug)]
pub struct Layer {
    device: MoeDevice,
    layer: MoeLayer,
    bound: Arc<Mutex<Vec<Bound>>>,
}

impl Layer {
    /// Submits the layer's work behind all that `hidden` waits for.
    pub(crate) fn run(&self, hidden: &CubeTensor, out: &CubeTensor) -> Result<()> {
        let tokens = hidden.shape()[0] as u32;
        if tokens == 0 {
            return Ok(());
        }
        let (input, _input) = Place::hold(hidden)?;
        let (output, _output) = Place::hold(out)?;
        let places = [input, output];
        flush(hidden)?;
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = bound.iter().position(|b| b.places == places) {
            let found = bound.remove(i);
            bound.push(found);
        } else {
            let [hidden, out] = places.each_ref().map(Place::slice);
            let batch = Batch::new(hidden, tokens).into_out(out);
            let step = self.layer.bind(&batch.with_scratch(self.device.scratch()))?;
            if bound.len() == KEPT {
                bound.remove(0);
            }
            bound.push(Bound { places, step });
        }
        let mut encoder =
            self.device.context().device().create_command_encoder(&Default::default());
        if let Some(last) = bound.last() {
            last.step.encode(&mut encoder);
        }
        // What Burn submits later comes behind it, on the same queue.
        self.device.queue().submit([encoder.finish()]);
        Ok(())
    }
}
