//! The operation as Burn's backends see it: it runs when Burn gets to it, on the tensors where Burn has put them.
use crate::ffn::Layer;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, DType, TensorMetadata, backend_extension};
use burn::tensor::Tensor;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{Cube, CubeBackend};
use cubecl::wgpu::{AutoCompiler, WgpuServer};
use wgmoe::{Error, Result, Slice, wgpu};

/// The layer as an operation of Burn's.
#[backend_extension(Cube, Fusion)]
pub trait MoeOps: Backend {
    /// `[tokens, D]` f32 to `[tokens, D]`.
    #[fusion(dtype = hidden, shape = hidden)]
    fn moe_ffn(hidden: FloatTensor<Self>, layer: Layer) -> FloatTensor<Self>;
}

impl MoeOps for CubeBackend {
    /// # Panics
    ///
    /// Where wgpu refuses the work.
    fn moe_ffn(hidden: CubeTensor, layer: Layer) -> CubeTensor {
        // Burn's own copy, where a view is not contiguous; else the tensor itself.
        let hidden = into_contiguous(hidden);
        let out = empty_device_contiguous_dtype(
            hidden.client.clone(),
            hidden.device.clone(),
            hidden.shape(),
            DType::F32,
        );
        layer.run(&hidden, &out).unwrap_or_else(|e| panic!("moe_ffn: {e}"));
        out
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
