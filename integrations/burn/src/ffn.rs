//! The module.
use crate::learning::{Learning, Split, stacks};
use crate::op::{MoeOps, Place, flush};
use crate::shared::MoeDevice;
use burn::backend::{DType, Dispatch, TensorMetadata};
use burn::module::{Module, Param};
use burn::tensor::{Device, Distribution, Tensor};
use burn_cubecl::tensor::CubeTensor;
use std::sync::{Arc, Mutex, PoisonError};
use wgmoe::layer::{Batch, BoundLayer, LayerConfig, MoeLayer, Router};
use wgmoe::ops::router_loss::Coefficients;
use wgmoe::plan::Stats;
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

impl MoeTensors {
    /// Normal, of deviation 1 / sqrt(length of a row); no bias.
    pub fn random(config: &LayerConfig, device: &Device) -> Self {
        let normal = |columns: usize| Distribution::Normal(0.0, 1.0 / (columns as f64).sqrt());
        let stack = |[experts, rows, columns]: [usize; 3]| {
            Tensor::random([experts, rows, columns], normal(columns), device)
        };
        let [experts, hidden] = [config.experts, config.hidden].map(|n| n as usize);
        let [gate, up, down] = stacks(config).map(|(_, shape)| stack(shape));
        let router = Tensor::random([experts, hidden], normal(hidden), device);
        Self { router, bias: None, gate, up, down }
    }

    /// Fails for shapes other than the configuration's.
    fn check(&self, config: &LayerConfig) -> Result<()> {
        let same = |name, got: &[usize], expected: &[usize]| {
            let reason = format!("{got:?}, expected {expected:?}");
            if got == expected { Ok(()) } else { Err(Error::Invalid { name, reason }) }
        };
        let [experts, hidden] = [config.experts, config.hidden].map(|n| n as usize);
        same("router", &self.router.dims(), &[experts, hidden])?;
        if let Some(bias) = &self.bias {
            same("bias", &bias.dims(), &[experts])?;
        }
        let all = [("gate", &self.gate), ("up", &self.up), ("down", &self.down)];
        for ((name, stack), (_, expected)) in all.into_iter().zip(stacks(config)) {
            same(name, &stack.dims(), &expected)?;
        }
        Ok(())
    }
}

/// Weights that learn: parameters of Burn's, of the shapes of [`MoeTensors`].
#[derive(Module, Debug)]
pub struct MoeWeights {
    /// `[E, D]`.
    pub router: Param<Tensor<2>>,
    /// `[E]`, without a gradient: what balances the experts' loads without a loss is the caller's.
    pub bias: Option<Param<Tensor<1>>>,
    /// `[X, F, D]`.
    pub gate: Param<Tensor<3>>,
    /// `[X, F, D]`.
    pub up: Param<Tensor<3>>,
    /// `[X, D, F]`.
    pub down: Param<Tensor<3>>,
}

/// Router, experts, shared experts and combination in place of a transformer block's FFN.
///
/// [`MoeFfn::learning`] makes one whose weights are Burn's parameters. Those of [`MoeFfn::new`] and [`MoeFfn::from_layer`] are
/// for inference: their weights lie in pages of their own, so a record of the module holds none.
#[derive(Module, Debug)]
pub struct MoeFfn {
    /// The weights, where they learn.
    pub weights: Option<MoeWeights>,
    #[module(skip)]
    work: Work,
}

/// What runs.
#[derive(Clone, Debug)]
enum Work {
    Fixed(Box<Layer>),
    Learning(Learning),
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
                device.moved(rows as u64 * weight_type.row_bytes(columns as u32));
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
        Self { weights: None, work: Work::Fixed(Box::new(Layer { device, layer, bound })) }
    }

    /// A layer that learns: its weights are f32 parameters of Burn's, and on an autodiff device gradients go to them and to the
    /// hidden states. They are packed for the layer's kernels on the device at each pass.
    ///
    /// # Errors
    ///
    /// As [`MoeFfn::new`].
    pub fn learning(device: &MoeDevice, config: LayerConfig, tensors: MoeTensors) -> Result<Self> {
        tensors.check(&config)?;
        let learning = Learning::new(device, config, tensors.bias.is_some(), None)?;
        let MoeTensors { router, bias, gate, up, down } = tensors;
        let weights = MoeWeights {
            router: Param::from_tensor(router),
            bias: bias.map(|bias| Param::from_tensor(bias).set_require_grad(false)),
            gate: Param::from_tensor(gate),
            up: Param::from_tensor(up),
            down: Param::from_tensor(down),
        };
        Ok(Self { weights: Some(weights), work: Work::Learning(learning) })
    }

    /// Losses of the router: their gradients are added in each backward pass, whatever the model's own loss is. The balance loss
    /// is Switch's under token choice, EC-DLM's under expert choice.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where the layer does not learn, and as [`MoeFfn::new`].
    pub fn with_router_losses(self, losses: Coefficients) -> Result<Self> {
        let work = Work::Learning(self.of_learning()?.with_losses(losses)?);
        Ok(Self { work, ..self })
    }

    /// Reads back the router z-loss and the balance loss of the last backward pass.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where the layer does not learn, [`Error::Device`] where the device is lost.
    pub fn router_losses(&self) -> Result<[f32; 2]> {
        self.of_learning()?.losses()
    }

    /// Reads back what the forward passes of training did since this was last called, summed: how many tokens each expert took
    /// among it, which is what [`bias_update`](wgmoe::ops::bias_update) balances by. Passes that Burn has not run yet, since
    /// nobody read what hangs on them, count the next time.
    ///
    /// # Errors
    ///
    /// As [`MoeFfn::router_losses`].
    pub fn take_stats(&self) -> Result<Stats> {
        self.of_learning()?.take_stats()
    }

    /// Bytes on the device that are kept from forward to backward pass, of the steps that wait for their next batch: after a
    /// training step what that step kept. 0 where nothing learns.
    pub fn saved_bytes(&self) -> u64 {
        self.of_learning().map_or(0, Learning::idle_bytes)
    }

    fn of_learning(&self) -> Result<&Learning> {
        match &self.work {
            Work::Learning(learning) => Ok(learning),
            Work::Fixed(_) => {
                let reason = "does not learn: `MoeFfn::learning` does".to_owned();
                Err(Error::Invalid { name: "layer", reason })
            }
        }
    }

    /// `[tokens, D]` f32 to `[tokens, D]`. The tokens are one sequence, and blocks of 32 where the rule has blocks.
    ///
    /// # Panics
    ///
    /// Where the tensor is of another shape or type. Where wgpu refuses the work, or the tensor lies on another device, Burn
    /// reports it as a failure of its own operations, when the result is read.
    pub fn forward(&self, hidden: Tensor<2>) -> Tensor<2> {
        self.run(hidden, Split::default())
    }

    /// `[sequences, tokens, D]` f32 to the same: under expert choice each expert takes tokens of each sequence apart, as many
    /// as `capacity` says of it, or as the rule says where there is none.
    ///
    /// # Panics
    ///
    /// As [`MoeFfn::forward`], and where there are not as many capacities as sequences; where the layer does not learn.
    pub fn forward_sequences(&self, hidden: Tensor<3>, capacity: Option<&[u32]>) -> Tensor<3> {
        let [sequences, tokens, width] = hidden.dims();
        assert!(self.weights.is_some(), "sequences are for layers that learn");
        let fits = capacity.is_none_or(|c| c.len() == sequences);
        assert!(fits, "capacities {capacity:?} of {sequences} sequences");
        let split = Split { count: sequences as u32, capacity: capacity.map(Into::into) };
        let out = self.run(hidden.reshape([sequences * tokens, width]), split);
        out.reshape([sequences, tokens, width])
    }

    fn run(&self, hidden: Tensor<2>, split: Split) -> Tensor<2> {
        let width = self.layer().config().hidden as usize;
        assert_eq!(hidden.dims()[1], width, "hidden states are [tokens, {width}]");
        assert_eq!(hidden.dtype(), DType::F32, "hidden states are f32");
        let hidden = hidden.into_dispatch();
        let out = match (&self.work, &self.weights) {
            (Work::Learning(learning), Some(MoeWeights { router, bias, gate, up, down })) => {
                let router = router.val().into_dispatch();
                let bias = bias.as_ref().map(|bias| bias.val().into_dispatch());
                let bias = bias.unwrap_or_else(|| router.clone());
                let [gate, up, down] = [gate, up, down].map(|p| p.val().into_dispatch());
                let learning = learning.clone();
                Dispatch::moe_learning(hidden, router, bias, gate, up, down, learning, split, None)
            }
            (Work::Fixed(layer), _) => Dispatch::moe_ffn(hidden, Layer::clone(layer)),
            (Work::Learning(_), None) => panic!("the layer's weights were taken out of it"),
        };
        Tensor::from_dispatch(out)
    }

    /// The layer. The weights of one that learns are those of its last pass.
    pub fn layer(&self) -> &MoeLayer {
        match &self.work {
            Work::Fixed(layer) => &layer.layer,
            Work::Learning(learning) => learning.layer(),
        }
    }

    /// Where the last run read its input and wrote its output: both are Burn's buffers. None where the layer learns: such
    /// steps copy both, on the device.
    pub fn last_places(&self) -> Option<[Place; 2]> {
        let Work::Fixed(layer) = &self.work else { return None };
        let bound = layer.bound.lock().unwrap_or_else(PoisonError::into_inner);
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
