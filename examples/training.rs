//! A layer that learns: plain gradient descent on the distance to another layer's output, with the
//! router z-loss and the balance loss of token choice.
//!
//! `scripts/with-vulkan cargo run --release --example training`
use wgmoe::layer::{
    Batch, LayerConfig, Losses, MoeLayer, Router, Tensor, TrainingBatch, TrainingSizes,
};
use wgmoe::ops::router_loss::Coefficients;
use wgmoe::routing::TokenChoice;
use wgmoe::weights::{ExpertGradients, ExpertWeights, HostWeights, Projection, WeightType};
use wgmoe::{Context, Gpu};

const TOKENS: u32 = 64;
const HIDDEN: u32 = 32;
const INTERMEDIATE: u32 = 32;
const EXPERTS: u32 = 8;
const STEPS: usize = 60;
const RATE: f32 = 0.2;

fn main() -> wgmoe::Result<()> {
    let gpu = Gpu::new()?;
    let ctx = Context::new(&gpu.device)?;
    let config = LayerConfig::new(HIDDEN, INTERMEDIATE, EXPERTS, TokenChoice::new(2));

    // What is to be learned: the output of a layer of other weights.
    let hidden = gpu.upload(&numbers(1, TOKENS * HIDDEN, 1.0));
    let out = gpu.upload(&vec![0f32; (TOKENS * HIDDEN) as usize]);
    let (teacher, _) = layer(&gpu, &ctx, config, 1000)?;
    gpu.run_layer(&teacher.bind(&Batch::new(&hidden, TOKENS).into_out(&out))?)?;
    let wanted: Vec<f32> = gpu.download(&out)?;

    // What learns, its gradients, and how much memory a step takes, before it takes any.
    let (student, mut weights) = layer(&gpu, &ctx, config, 2000)?;
    let bytes = student.training_bytes(&TrainingSizes::new(TOKENS))?;
    println!("saved from forward to backward: {} bytes; scratch: {}", bytes.saved, bytes.scratch);
    let gradients = ExpertGradients::new(&ctx, &student.weights().shape())?;
    let zeros = |count: u32| gpu.upload(&vec![0f32; count as usize]);
    let [dout, dhidden] = [(); 2].map(|()| zeros(TOKENS * HIDDEN));
    let (drouter, values) = (zeros(EXPERTS * HIDDEN), zeros(2));

    // Bound once; recorded at each step.
    let coefficients = Coefficients { router_z: 1e-3, balance: 0.01 };
    let batch = Batch::new(&hidden, TOKENS).into_out(&out);
    let of = TrainingBatch::new(batch, &dout, &dhidden)
        .with_router_gradient(&drouter)
        .with_expert_gradients(&gradients)
        .with_losses(Losses::new(coefficients, &values));
    let (forward, backward) = student.bind_training(&of)?;

    let (mut first, mut last) = (0.0, 0.0);
    for step in 0..STEPS {
        gpu.run_layer(&forward)?;
        // The rest of a model would make the gradient of the output on the device.
        let got: Vec<f32> = gpu.download(&out)?;
        let off: Vec<f32> = got.iter().zip(&wanted).map(|(got, want)| got - want).collect();
        last = off.iter().map(|d| d * d).sum::<f32>() / TOKENS as f32;
        if step == 0 {
            first = last;
        }
        let slope: Vec<f32> = off.iter().map(|d| 2.0 * d / TOKENS as f32).collect();
        gpu.queue.write_buffer(&dout, 0, bytemuck::cast_slice(&slope));
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        backward.encode(&mut encoder)?;
        gpu.queue.submit([encoder.finish()]);

        // An optimizer would go over `gradients.buffers()` on the device; this one is the host's.
        descend(&gpu, &student, &gradients, &mut weights)?;
        let of_router: Vec<f32> = gpu.download(&drouter)?;
        let Router { weight, .. } = student.router();
        let mut router: Vec<f32> = gpu.download(weight)?;
        router.iter_mut().zip(of_router).for_each(|(w, d)| *w -= RATE * d);
        let slice = weight.slice();
        gpu.queue.write_buffer(slice.buffer, slice.offset, bytemuck::cast_slice(&router));
        if step % 10 == 0 {
            let of_router: Vec<f32> = gpu.download(&values)?;
            println!(
                "step {step}: {last:.5}; router z {:.5}, balance {:.5}",
                of_router[0], of_router[1]
            );
        }
    }
    println!("after {STEPS} steps: {last:.5}, {:.1} times less", first / last);
    assert!(last < first, "nothing was learned");
    Ok(())
}

/// Every matrix a step down its gradient.
fn descend(
    gpu: &Gpu,
    layer: &MoeLayer,
    gradients: &ExpertGradients,
    weights: &mut [[Vec<f32>; 3]],
) -> wgmoe::Result<()> {
    for (expert, matrices) in (0..).zip(weights) {
        for (matrix, projection) in matrices.iter_mut().zip(Projection::ALL) {
            let mut values = matrix.iter_mut();
            for (_, slice) in gradients.slices(expert, projection) {
                let slope: Vec<f32> = gpu.download(slice)?;
                values.by_ref().zip(slope).for_each(|(w, d)| *w -= RATE * d);
            }
            layer.weights().write(&gpu.queue, expert, projection, HostWeights::F32(matrix))?;
        }
    }
    Ok(())
}

/// A layer of seeded f32 weights, and these: gate, up, down of each expert.
fn layer(
    gpu: &Gpu,
    ctx: &Context,
    config: LayerConfig,
    seed: u32,
) -> wgmoe::Result<(MoeLayer, Vec<[Vec<f32>; 3]>)> {
    let size = HIDDEN * INTERMEDIATE;
    let matrix = |e: u32, p: u32| numbers(seed + 3 * e + p, size, 0.3);
    let all: Vec<[Vec<f32>; 3]> = (0..EXPERTS).map(|e| [0, 1, 2].map(|p| matrix(e, p))).collect();
    let weights = ExpertWeights::new(ctx, config.expert_shape(WeightType::F32))?;
    for (expert, matrices) in (0..).zip(&all) {
        for (matrix, projection) in matrices.iter().zip(Projection::ALL) {
            weights.write(&gpu.queue, expert, projection, HostWeights::F32(matrix))?;
        }
    }
    let router = numbers(seed + 999, EXPERTS * HIDDEN, 0.5);
    let router = Router::new(Tensor::new(ctx, "router", &router)?);
    Ok((MoeLayer::new(ctx, config, router, weights)?, all))
}

/// Some numbers between `-most` and `most`.
fn numbers(seed: u32, count: u32, most: f32) -> Vec<f32> {
    // The finalizer of MurmurHash3.
    let mix = |i: u32| {
        let mut h = i.wrapping_add(seed.wrapping_mul(0x9e37_79b9));
        h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
        h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
        h ^ (h >> 16)
    };
    (0..count).map(|i| ((mix(i) >> 8) as f32 / (1 << 24) as f32 * 2.0 - 1.0) * most).collect()
}
