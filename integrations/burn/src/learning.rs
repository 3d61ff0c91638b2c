//! Training steps: what the operations of a layer that learns do on the device, when Burn gets to them.
use crate::op::{Place, flush};
use crate::pack::Packing;
use crate::shared::MoeDevice;
use burn::backend::TensorMetadata;
use burn_cubecl::tensor::CubeTensor;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use wgmoe::layer::{
    Batch, BoundBackward, BoundLayer, LayerConfig, Losses, MoeLayer, Router, Sequences, Tensor,
    TrainingBatch,
};
use wgmoe::ops::router_loss::Coefficients;
use wgmoe::plan::Stats;
use wgmoe::weights::{ExpertGradients, Projection};
use wgmoe::{Context, ExpertWeights, Gpu, Result, WeightType, wgpu};

/// A layer whose weights are Burn's. Clones share its pages and steps.
#[derive(Clone, Debug)]
pub struct Learning {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    device: MoeDevice,
    layer: MoeLayer,
    packing: Packing,
    losses: Option<Coefficients>,
    /// Their values, `[2]` f32.
    values: wgpu::Buffer,
    /// Sums over the forward passes of training, `[8 + E]` u32.
    stats: wgpu::Buffer,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How often weights were packed into the pages: what lies there is of the last time.
    packed: u64,
    /// Steps that no tape holds.
    steps: Vec<Step>,
    /// Of passes that nothing is learned from.
    passes: Vec<Pass>,
}

/// Steps that are kept for later batches of their size.
const KEPT: usize = 4;

/// How the tokens of a batch are sequences of one length.
#[derive(Clone, Debug, Default)]
pub struct Split {
    /// How many; 0 says nothing, so that all tokens are one.
    pub(crate) count: u32,
    /// Tokens that each expert takes of each; the rule's own number where there are none.
    pub(crate) capacity: Option<Arc<[u32]>>,
}

/// What steps are found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Size {
    tokens: u32,
    sequences: u32,
    has_capacity: bool,
}

/// Sequences of a size, on the device.
#[derive(Debug)]
struct Ends {
    size: Size,
    offsets: Tensor,
    capacity: Tensor,
}

impl Ends {
    fn new(ctx: &Context, size: Size) -> Result<Self> {
        let length = size.tokens / size.sequences.max(1);
        let offsets: Vec<u32> = (0..=size.sequences).map(|i| i * length).collect();
        let capacity = vec![0u32; size.sequences.max(1) as usize];
        Ok(Self {
            size,
            offsets: Tensor::new(ctx, "sequences", &offsets)?,
            capacity: Tensor::new(ctx, "capacity", &capacity)?,
        })
    }

    fn batch<'a>(&'a self, batch: Batch<'a>) -> Batch<'a> {
        if self.size.sequences == 0 {
            return batch;
        }
        let all = Sequences::new(self.size.sequences, &self.offsets);
        let has = self.size.has_capacity;
        batch.with_sequences(if has { all.with_capacity(&self.capacity) } else { all })
    }

    /// The capacities of the next pass.
    fn write(&self, queue: &wgpu::Queue, split: &Split) {
        if let Some(capacity) = &split.capacity {
            let bytes: Vec<u8> = capacity.iter().flat_map(|c| c.to_le_bytes()).collect();
            queue.write_buffer(self.capacity.slice().buffer, 0, &bytes);
        }
    }
}

/// Whose weights a backward pass makes gradients of. Those of the hidden states are made in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) router: bool,
    pub(crate) experts: bool,
}

/// A forward pass without a backward pass.
#[derive(Debug)]
struct Pass {
    ends: Ends,
    hidden: Place,
    out: Place,
    bound: BoundLayer,
}

/// Both passes of a batch, on buffers of ours. What lies between them stays until the backward pass has run; the rest is
/// every step's in turn.
#[derive(Debug)]
struct Step {
    ends: Ends,
    wanted: Wanted,
    hidden: Place,
    out: Place,
    dout: Place,
    dhidden: Place,
    drouter: Option<Place>,
    gradients: Option<ExpertGradients>,
    forward: BoundLayer,
    backward: BoundBackward,
    /// Of [`State::packed`]: the weights that the forward pass ran on.
    packed: u64,
}

/// What a forward pass leaves for its backward pass. The step goes back to its layer with the last clone.
#[derive(Clone, Debug)]
pub struct Tape {
    shared: Arc<Held>,
}

#[derive(Debug)]
struct Held {
    learning: Learning,
    wanted: Wanted,
    step: Mutex<Option<Step>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let step = self.step.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        self.learning.keep(step);
    }
}

impl Tape {
    pub(crate) fn new(learning: &Learning, wanted: Wanted) -> Self {
        let held = Held { learning: learning.clone(), wanted, step: Mutex::default() };
        Self { shared: Arc::new(held) }
    }

    fn step(&self) -> MutexGuard<'_, Option<Step>> {
        self.shared.step.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The weights as Burn's tensors: contiguous f32.
pub(crate) struct Weights {
    pub(crate) router: CubeTensor,
    /// The router again where the layer has none.
    pub(crate) bias: CubeTensor,
    /// Of [`Projection::ALL`].
    pub(crate) stacks: [CubeTensor; 3],
}

impl Weights {
    fn all(&self) -> impl Iterator<Item = &CubeTensor> {
        [&self.router, &self.bias].into_iter().chain(&self.stacks)
    }
}

impl Learning {
    pub(crate) fn new(
        device: &MoeDevice,
        config: LayerConfig,
        has_bias: bool,
        losses: Option<Coefficients>,
    ) -> Result<Self> {
        let ctx = device.context();
        let weights = ExpertWeights::new(ctx, config.expert_shape(WeightType::F32))?;
        let packing = device.packer().packing(&weights)?;
        // Both are copied from Burn's tensors at every step.
        let zeros = |name, values: u32| Tensor::new(ctx, name, &vec![0f32; values as usize]);
        let mut router =
            Router::new(zeros("router", config.experts.saturating_mul(config.hidden))?);
        if has_bias {
            router = router.with_bias(zeros("bias", config.experts)?);
        }
        let layer = MoeLayer::new(ctx, config, router, weights)?;
        let values = buffer(device, "losses", 8);
        // wgpu makes it zeros.
        let stats = buffer(device, "stats", Stats::bytes(config.experts));
        let (device, state) = (device.clone(), Mutex::default());
        let inner = Inner { device, layer, packing, losses, values, stats, state };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The same layer with losses of the router.
    pub(crate) fn with_losses(&self, losses: Coefficients) -> Result<Self> {
        let Inner { device, layer, .. } = &*self.inner;
        Self::new(device, *layer.config(), layer.router().bias.is_some(), Some(losses))
    }

    pub(crate) fn layer(&self) -> &MoeLayer {
        &self.inner.layer
    }

    /// Reads the values of the losses back.
    pub(crate) fn losses(&self) -> Result<[f32; 2]> {
        let values: Vec<f32> = self.gpu().download(&self.inner.values)?;
        self.inner.device.read_back(8);
        Ok([values[0], values[1]])
    }

    /// Reads back what training's forward passes did since the last time.
    pub(crate) fn take_stats(&self) -> Result<Stats> {
        let Inner { device, stats, .. } = &*self.inner;
        let words: Vec<u32> = self.gpu().download(stats)?;
        device.read_back(stats.size());
        let mut encoder = self.encoder();
        encoder.clear_buffer(stats, 0, None);
        device.queue().submit([encoder.finish()]);
        Stats::from_words(&words)
    }

    fn gpu(&self) -> Gpu {
        let device = &self.inner.device;
        Gpu {
            device: device.context().device().clone(),
            queue: device.queue().clone(),
            info: device.context().info().clone(),
        }
    }

    /// Bytes that steps keep from forward to backward, the copy of the hidden states among them: of those that wait for a
    /// batch.
    pub(crate) fn idle_bytes(&self) -> u64 {
        let state = self.state();
        state.steps.iter().map(|s| s.backward.saved_bytes() + s.hidden.size).sum()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, step: Option<Step>) {
        let mut state = self.state();
        state.steps.extend(step);
        if state.steps.len() > KEPT {
            state.steps.remove(0);
        }
    }

    /// Submits the forward pass behind all that its inputs wait for. With a tape it leaves there what the backward pass needs.
    pub(crate) fn forward(
        &self,
        hidden: &CubeTensor,
        weights: &Weights,
        out: &CubeTensor,
        split: &Split,
        tape: Option<&Tape>,
    ) -> Result<()> {
        let tokens = hidden.shape()[0] as u32;
        if tokens == 0 {
            return Ok(());
        }
        let has_capacity = split.capacity.is_some();
        let size = Size { tokens, sequences: split.count, has_capacity };
        let queue = self.inner.device.queue();
        let (input, _input) = Place::hold(hidden)?;
        let (output, _output) = Place::hold(out)?;
        let held = hold(weights.all())?;
        flush(hidden)?;
        weights.all().try_for_each(flush)?;
        let mut state = self.state();
        let mut encoder = self.encoder();
        self.pack(&mut state, &mut encoder, &held);
        match tape {
            Some(tape) => {
                let wanted = tape.shared.wanted;
                let fits = |s: &Step| s.ends.size == size && s.wanted == wanted;
                let mut step = match state.steps.iter().rposition(fits) {
                    Some(i) => state.steps.remove(i),
                    None => self.step(size, wanted)?,
                };
                step.packed = state.packed;
                step.ends.write(queue, split);
                copy(&mut encoder, &input, &step.hidden);
                step.forward.encode(&mut encoder);
                copy(&mut encoder, &step.out, &output);
                *tape.step() = Some(step);
            }
            None => {
                let found = state.passes.iter().rposition(|p| p.ends.size == size);
                let pass = match found {
                    Some(i) => state.passes.remove(i),
                    None => self.pass(size)?,
                };
                pass.ends.write(queue, split);
                copy(&mut encoder, &input, &pass.hidden);
                pass.bound.encode(&mut encoder);
                copy(&mut encoder, &pass.out, &output);
                state.passes.push(pass);
                if state.passes.len() > KEPT {
                    state.passes.remove(0);
                }
            }
        }
        queue.submit([encoder.finish()]);
        Ok(())
    }

    /// Submits the backward pass. `out` are the gradients of the hidden states, the router, and [`Projection::ALL`]; what the
    /// tape does not want is left alone.
    pub(crate) fn backward(
        &self,
        dout: &CubeTensor,
        weights: &Weights,
        out: &[CubeTensor; 5],
        tape: &Tape,
    ) -> Result<()> {
        let (input, _input) = Place::hold(dout)?;
        let held = hold(weights.all())?;
        let outputs = hold(out)?;
        flush(dout)?;
        weights.all().chain(out).try_for_each(flush)?;
        let step = tape.step().take();
        let mut state = self.state();
        let mut encoder = self.encoder();
        let Some(mut step) = step else {
            // No tokens: nothing was learned.
            for (place, _) in &outputs {
                encoder.clear_buffer(&place.buffer, place.offset, Some(place.size));
            }
            self.inner.device.queue().submit([encoder.finish()]);
            return Ok(());
        };
        if step.packed != state.packed {
            // Another pass has run since, perhaps on other weights.
            self.pack(&mut state, &mut encoder, &held);
            step.packed = state.packed;
        }
        copy(&mut encoder, &input, &step.dout);
        step.backward.encode(&mut encoder)?;
        let [dhidden, drouter, stacks @ ..] = &outputs[..] else { return Ok(()) };
        copy(&mut encoder, &step.dhidden, &dhidden.0);
        if let Some(own) = &step.drouter {
            copy(&mut encoder, own, &drouter.0);
        }
        if let Some(gradients) = &step.gradients {
            let mut pages = gradients.buffers();
            for (count, (place, _)) in gradients.page_counts().into_iter().zip(stacks) {
                let mut at = place.offset;
                for page in pages.by_ref().take(count) {
                    encoder.copy_buffer_to_buffer(page, 0, &place.buffer, at, page.size());
                    at += page.size();
                }
            }
        }
        state.steps.push(step);
        self.inner.device.queue().submit([encoder.finish()]);
        Ok(())
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.inner.device.context().device().create_command_encoder(&Default::default())
    }

    /// Records that the layer's own weights become these.
    fn pack<G>(&self, state: &mut State, encoder: &mut wgpu::CommandEncoder, held: &[(Place, G)]) {
        let [router, bias, gate, up, down] = [0, 1, 2, 3, 4].map(|i| &held[i].0);
        let own = self.inner.layer.router();
        copy(encoder, router, &Place::of(&own.weight));
        if let Some(own) = &own.bias {
            copy(encoder, bias, &Place::of(own));
        }
        self.inner.packing.record(encoder, [gate, up, down]);
        state.packed += 1;
    }

    fn pass(&self, size: Size) -> Result<Pass> {
        let Inner { device, layer, .. } = &*self.inner;
        let ends = Ends::new(device.context(), size)?;
        let bytes = 4 * u64::from(size.tokens) * u64::from(layer.config().hidden);
        let [hidden, out] = ["hidden", "out"].map(|name| device.exchange(name, bytes));
        let batch = ends.batch(Batch::new(hidden.slice(), size.tokens).into_out(out.slice()));
        let bound = layer.bind(&batch.with_scratch(device.scratch()))?;
        Ok(Pass { ends, hidden, out, bound })
    }

    fn step(&self, size: Size, wanted: Wanted) -> Result<Step> {
        let Inner { device, layer, losses, values, stats, .. } = &*self.inner;
        let LayerConfig { hidden: width, experts, .. } = *layer.config();
        let ends = Ends::new(device.context(), size)?;
        let bytes = 4 * u64::from(size.tokens) * u64::from(width);
        let hidden = Place::whole(buffer(device, "hidden", bytes));
        let [out, dout, dhidden] =
            ["out", "dout", "dhidden"].map(|name| device.exchange(name, bytes));
        let drouter = || device.exchange("drouter", 4 * u64::from(experts) * u64::from(width));
        let drouter = wanted.router.then(drouter);
        let gradients = || device.gradients(layer.weights().shape());
        let gradients = wanted.experts.then(gradients).transpose()?;
        let batch = ends.batch(Batch::new(hidden.slice(), size.tokens).into_out(out.slice()));
        let batch = batch.with_scratch(device.scratch()).with_stats_added_to(stats);
        let mut of = TrainingBatch::new(batch, dout.slice(), dhidden.slice());
        if let Some(drouter) = &drouter {
            of = of.with_router_gradient(drouter.slice());
        }
        if let Some(gradients) = &gradients {
            of = of.with_expert_gradients(gradients);
        }
        if let Some(losses) = losses {
            of = of.with_losses(Losses::new(*losses, values));
        }
        let (forward, backward) = layer.bind_training(&of)?;
        Ok(Step {
            ends,
            wanted,
            hidden,
            out,
            dout,
            dhidden,
            drouter,
            gradients,
            forward,
            backward,
            packed: 0,
        })
    }
}

/// Where tensors lie, each with what keeps it there until the work is submitted.
fn hold<'a>(tensors: impl IntoIterator<Item = &'a CubeTensor>) -> Result<Vec<(Place, impl Sized)>> {
    tensors.into_iter().map(Place::hold).collect()
}

/// A buffer of ours.
pub(crate) fn buffer(device: &MoeDevice, label: &str, size: u64) -> wgpu::Buffer {
    device.context().device().create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size,
        usage: wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_DST
            | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    })
}

/// Records a copy of all that `to` has room for.
fn copy(encoder: &mut wgpu::CommandEncoder, from: &Place, to: &Place) {
    encoder.copy_buffer_to_buffer(&from.buffer, from.offset, &to.buffer, to.offset, to.size);
}

/// The matrices of each projection, `[experts, out, in]`.
pub(crate) fn stacks(config: &LayerConfig) -> [(Projection, [usize; 3]); 3] {
    let shape = config.expert_shape(WeightType::F32);
    Projection::ALL.map(|p| {
        let [rows, columns] = shape.matrix(p).map(|n| n as usize);
        (p, [shape.experts as usize, rows, columns])
    })
}
