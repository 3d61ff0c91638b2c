//! What storage types cost in accuracy: for each, the error of a layer's output on the device, against
//! the same layer in f64 with the weights as they were before they were stored, and against its bf16
//! layer. Routing is the same for all: the router's weights stay f32.
//!
//! `cargo run --release -p studies --bin accuracy`
//!
//! Weights are synthetic and normal, of deviation 1 / sqrt(K), as trained ones nearly are; hidden states
//! too. Exits with an error where a layer differs from its own twin, the same sums in f64 with the
//! weights as stored.
use clap::Parser;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use testkit::compare::{close, largest};
use testkit::layer::{HostLayer, selection};
use wgmoe::layer::{Batch, HostBatch, LayerConfig};
use wgmoe::routing::TokenChoice;
use wgmoe::{Context, Gpu, WeightType};

#[derive(Parser)]
#[command(about = "Errors of a layer's output by storage type of its experts")]
struct Options {
    /// D
    #[arg(long, default_value_t = 1024)]
    hidden: u32,
    /// F
    #[arg(long, default_value_t = 512)]
    intermediate: u32,
    /// Routed experts, of which a token takes 4
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(4..))]
    experts: u32,
    /// Tokens
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Seed of weights and hidden states
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn normal(rng: &mut StdRng, count: u32, deviation: f32) -> Vec<f32> {
    (0..count).map(|_| deviation * rng.sample::<f32, _>(StandardNormal)).collect()
}

/// Root of the mean square of the differences, as a share of that of `want`; and the largest one, as a
/// share of the largest of `want`.
fn errors(got: &[f32], want: &[f32]) -> [f64; 2] {
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let pairs = || got.iter().zip(want).map(|(&a, &b)| f64::from(a) - f64::from(b));
    let all = squares(&mut want.iter().map(|&v| f64::from(v)));
    let most = pairs().fold(0.0, |m: f64, d| m.max(d.abs()));
    [(squares(&mut pairs()) / all).sqrt(), most / f64::from(largest(want))]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Options { hidden, intermediate, experts, tokens, seed } = Options::parse();
    let gpu = Gpu::new()?;
    let ctx = Context::new(&gpu.device)?;
    let config = LayerConfig::new(hidden, intermediate, experts, TokenChoice::new(4));
    let mut rng = StdRng::seed_from_u64(seed);
    let size = hidden * intermediate;
    let mut host = HostLayer::new(config);
    host.router = normal(&mut rng, experts * hidden, 1.0 / (hidden as f32).sqrt());
    for matrices in &mut host.experts {
        *matrices = [hidden, hidden, intermediate]
            .map(|depth| normal(&mut rng, size, 1.0 / (depth as f32).sqrt()));
    }
    let x = normal(&mut rng, tokens * hidden, 1.0);
    let x_in = gpu.upload(&x);
    let run = |weight_type: WeightType| -> Result<_, Box<dyn std::error::Error>> {
        let layer = host.layer_as(&ctx, &gpu.queue, weight_type, None)?;
        let out = gpu.upload(&vec![f32::NAN; (tokens * hidden) as usize]);
        let bound = layer.bind(&Batch::new(&x_in, tokens).into_out(&out))?;
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        bound.encode(&mut encoder);
        gpu.queue.submit([encoder.finish()]);
        let got: Vec<f32> = gpu.download(&out)?;
        let choice = selection(&bound)
            .ok_or("the layer routes itself")?
            .map(|t| gpu.download::<f32>(t.buffer));
        let [logits, scores, values] = choice;
        let routed = host.routing(HostBatch::default(), [&logits?, &scores?, &values?]);
        Ok((got, routed))
    };
    let (bf16, routed) = run(WeightType::Bf16)?;
    let exact = host.outputs(&x, &routed.assigned, &routed.gates);
    println!(
        "{tokens} tokens, D {hidden}, F {intermediate}, {experts} experts, 4 a token; {}\n",
        gpu.info.name
    );
    println!(
        "| type | bits a value on the device | against f64, rms | against f64, most | against bf16, rms |"
    );
    println!("|---|---|---|---|---|");
    for &weight_type in WeightType::ALL {
        let (got, _) = run(weight_type)?;
        let stored = host.stored_as(weight_type).outputs(&x, &routed.assigned, &routed.gates);
        close(&got, &stored, 2e-5 * largest(&stored), 2e-5, weight_type.name())?;
        let ([rms, most], [other, _]) = (errors(&got, &exact), errors(&got, &bf16));
        let (name, bits) = (weight_type.name(), weight_type.device_bits());
        println!("| {name} | {bits} | {rms:.1e} | {most:.1e} | {other:.1e} |");
    }
    Ok(())
}
