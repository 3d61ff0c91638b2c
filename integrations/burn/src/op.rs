//! The operation as Burn's backends see it: it runs when Burn gets to it, on the tensors where Burn has put them.
use crate::ffn::Layer;
use crate::learning::{Learning, Split, Tape, Weights};
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, DType, TensorMetadata, backend_extension};
use burn::tensor::Tensor;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{Cube, CubeBackend};
use cubecl::wgpu::{AutoCompiler, WgpuServer};
use wgmoe::{Error, Result, Slice, wgpu};

/// The layer as operations of Burn's.
#[backend_extension(Cube, Fusion, Autodiff)]
pub trait MoeOps: Backend {
    /// `[tokens, D]` f32 to `[tokens, D]`, of weights that do not learn.
    #[fusion(dtype = hidden, shape = hidden)]
    fn moe_ffn(hidden: FloatTensor<Self>, layer: Layer) -> FloatTensor<Self>;

    /// The same of weights that are Burn's. With a tape it keeps what the backward pass reads.
    #[allow(clippy::too_many_arguments)] // Burn's macro takes tensors one by one.
    #[fusion(dtype = hidden, shape = hidden)]
    fn moe_learning(
        hidden: FloatTensor<Self>,
        router: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        learning: Learning,
        split: Split,
        tape: Option<Tape>,
    ) -> FloatTensor<Self>;

    /// The gradients of hidden states, router, gate, up and down, from that of the output.
    #[allow(clippy::too_many_arguments, clippy::type_complexity)]
    #[fusion(meta = gradients)]
    fn moe_backward(
        dout: FloatTensor<Self>,
        router: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        learning: Learning,
        tape: Tape,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    );
}

/// Each gradient is as what it is the gradient of.
#[allow(clippy::too_many_arguments)]
fn gradients(
    dout: &TensorSpec,
    router: &TensorSpec,
    _bias: &TensorSpec,
    gate: &TensorSpec,
    up: &TensorSpec,
    down: &TensorSpec,
    _learning: &Learning,
    _tape: &Tape,
) -> (TensorSpec, TensorSpec, TensorSpec, TensorSpec, TensorSpec) {
    (dout.clone(), router.clone(), gate.clone(), up.clone(), down.clone())
}

/// Room for a tensor as this one.
fn empty_as(tensor: &CubeTensor) -> CubeTensor {
    empty_device_contiguous_dtype(
        tensor.client.clone(),
        tensor.device.clone(),
        tensor.shape(),
        DType::F32,
    )
}

/// # Panics
///
/// Where wgpu refuses the work.
impl MoeOps for CubeBackend {
    fn moe_ffn(hidden: CubeTensor, layer: Layer) -> CubeTensor {
        // Burn's own copy, where a view is not contiguous; else the tensor itself.
        let hidden = into_contiguous(hidden);
        let out = empty_as(&hidden);
        layer.run(&hidden, &out).unwrap_or_else(|e| panic!("moe_ffn: {e}"));
        out
    }

    fn moe_learning(
        hidden: CubeTensor,
        router: CubeTensor,
        bias: CubeTensor,
        gate: CubeTensor,
        up: CubeTensor,
        down: CubeTensor,
        learning: Learning,
        split: Split,
        tape: Option<Tape>,
    ) -> CubeTensor {
        let hidden = into_contiguous(hidden);
        let [router, bias] = [router, bias].map(into_contiguous);
        let weights = Weights { router, bias, stacks: [gate, up, down].map(into_contiguous) };
        let out = empty_as(&hidden);
        let done = learning.forward(&hidden, &weights, &out, &split, tape.as_ref());
        done.unwrap_or_else(|e| panic!("moe_learning: {e}"));
        out
    }

    fn moe_backward(
        dout: CubeTensor,
        router: CubeTensor,
        bias: CubeTensor,
        gate: CubeTensor,
        up: CubeTensor,
        down: CubeTensor,
        learning: Learning,
        tape: Tape,
    ) -> (CubeTensor, CubeTensor, CubeTensor, CubeTensor, CubeTensor) {
        let dout = into_contiguous(dout);
        let [router, bias] = [router, bias].map(into_contiguous);
        let weights = Weights { router, bias, stacks: [gate, up, down].map(into_contiguous) };
        let [gate, up, down] = &weights.stacks;
        let out = [&dout, &weights.router, gate, up, down].map(empty_as);
        let done = learning.backward(&dout, &weights, &out, &tape);
        done.unwrap_or_else(|e| panic!("moe_backward: {e}"));
        out.into()
    }
}

/// Where a tensor lies: a range of a buffer that Burn allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Burn's buffer.
    pub buffer: wgpu::Buffer,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

impl Place {
    /// The place of a tensor, which stays while what comes with it does: Burn moves memory that nobody holds.
    pub(crate) fn hold(tensor: &CubeTensor) -> Result<(Self, impl Sized + use<>)> {
        let held = tensor
            .client
            .get_resource::<WgpuServer<AutoCompiler>>(tensor.handle.clone())
            .map_err(|e| Error::Device(e.to_string()))?;
        let (buffer, offset) = (held.resource().buffer.clone(), held.resource().offset);
        let size = tensor.shape().num_elements() as u64 * 4;
        Ok((Self { buffer, offset, size }, held))
    }

    /// All of a buffer.
    pub(crate) fn whole(buffer: wgpu::Buffer) -> Self {
        let size = buffer.size();
        Self { buffer, offset: 0, size }
    }

    /// Where a tensor of ours lies.
    pub(crate) fn of(tensor: &wgmoe::layer::Tensor) -> Self {
        let Slice { buffer, offset, size, .. } = tensor.slice();
        Self { buffer: buffer.clone(), offset, size }
    }

    pub(crate) fn slice(&self) -> Slice<'_> {
        Slice::new(&self.buffer, self.offset, self.size)
    }
}

/// Submits Burn's work that `tensor` waits for, and what uses memory that this thread's stream was given since.
pub(crate) fn flush(tensor: &CubeTensor) -> Result<()> {
    // Work lies in encoders, one for each stream, until they are flushed.
    let flush = || tensor.client.flush().map_err(|e| Error::Device(e.to_string()));
    tensor.handle.stream.executes(flush)?;
    flush()
}

/// Where a tensor lies now.
///
/// # Errors
///
/// [`Error::Invalid`] for a tensor of another backend or type, [`Error::Device`] where Burn cannot tell.
pub fn place<const R: usize>(tensor: &Tensor<R>) -> Result<Place> {
    let primitive = tensor.clone().try_into_primitive::<Cube>();
    let primitive =
        primitive.map_err(|e| Error::Invalid { name: "tensor", reason: format!("{e:?}") })?;
    let client = primitive.client.clone();
    let primitive = client.resolve_tensor_float::<CubeBackend>(primitive);
    Ok(Place::hold(&primitive)?.0)
}
