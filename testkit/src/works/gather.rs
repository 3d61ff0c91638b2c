//! Rows by index, compared with the twin.
use crate::compare::same;
use wgmoe::ops::gather::{self, Args, Dims, Gather};
use wgmoe::{BoundOp, Context, Gpu, Slice, wgpu};

/// Bytes up to which the whole output is read back.
const WHOLE: u64 = 64 << 20;
/// Rows that are read back of a larger one.
const SAMPLE: usize = 64;

/// `x[token_of]`, run once and compared: whole, or in `SAMPLE` rows where it is large. `x_in`
/// holds `x [tokens, hidden]`.
pub async fn gather(
    gpu: &Gpu,
    ctx: &Context,
    (x_in, x): (&wgpu::Buffer, &[f32]),
    hidden: u32,
    token_of: &[u32],
) -> Result<BoundOp, String> {
    let say = |e: wgmoe::Error| e.to_string();
    let width = hidden as usize;
    let row_bytes = 4 * u64::from(hidden);
    let bytes = token_of.len() as u64 * row_bytes;
    let out = gpu.device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("gathered"),
        size: bytes.max(4),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    });
    let token_of_in = gpu.upload(token_of);
    let args = Args { x: x_in.into(), token_of: (&token_of_in).into(), out: (&out).into() };
    let dims = Dims { tokens: (x.len() / width) as u32, slots: token_of.len() as u32, hidden };
    let step = Gather::new(ctx).and_then(|op| op.bind(&dims, args)).map_err(say)?;
    gpu.run_async(&step).await.map_err(say)?;
    if bytes <= WHOLE {
        let got: Vec<f32> = gpu.download_async(&out).await.map_err(say)?;
        return same(&got, &gather::cpu(x, width, token_of), "gathered").map(|()| step);
    }
    for slot in (0..token_of.len()).step_by(token_of.len() / SAMPLE) {
        let row = Slice::new(&out, slot as u64 * row_bytes, row_bytes);
        let got: Vec<f32> = gpu.download_async(row).await.map_err(say)?;
        let want = gather::cpu(x, width, &token_of[slot..=slot]);
        same(&got, &want, &format!("gathered slot {slot}"))?;
    }
    Ok(step)
}
