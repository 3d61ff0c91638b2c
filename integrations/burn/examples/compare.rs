//! One layer three ways on one device: `MoeFfn`, and Burn's own tensor operations with every expert on every token, and with
//! each expert on its own tokens. Compares the outputs, then times them in turns: `cargo run --release --example compare`.
use burn::tensor::{Distribution, Tensor};
use std::time::{Duration, Instant};
use wgmoe_burn::wgmoe::WeightType;
use wgmoe_burn::wgmoe::layer::LayerConfig;
use wgmoe_burn::wgmoe::routing::TokenChoice;
use wgmoe_burn::{MoeDevice, MoeFfn, MoeTensors, Reference};

const TOKENS: usize = 64;
const ROUNDS: usize = 7;
const TOP: u32 = 8;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = MoeDevice::open()?;
    let info = device.context().info();
    println!("{} ({:?}), {} {}", info.name, info.backend, info.driver, info.driver_info);
    let config = LayerConfig::new(512, 256, 64, TokenChoice::new(TOP)).with_shared_experts(1);
    let LayerConfig { hidden, intermediate, experts, shared_experts, .. } = config;
    println!(
        "{TOKENS} tokens, D {hidden}, F {intermediate}, {experts} experts + {shared_experts} shared, top {TOP}, f32"
    );
    let (d, f, x) = (hidden as usize, intermediate as usize, (experts + shared_experts) as usize);
    device.device().seed(1);
    let deviation = |values: usize| Distribution::Normal(0.0, 1.0 / (values as f64).sqrt());
    let tensors = MoeTensors {
        router: Tensor::random([experts as usize, d], deviation(d), device.device()),
        bias: None,
        gate: Tensor::random([x, f, d], deviation(d), device.device()),
        up: Tensor::random([x, f, d], deviation(d), device.device()),
        down: Tensor::random([x, d, f], deviation(f), device.device()),
    };
    let input = Tensor::<2>::random([TOKENS, d], Distribution::Normal(0.0, 1.0), device.device());
    let ffn = MoeFfn::new(&device, config, WeightType::F32, tensors.clone())?;
    let reference = Reference::new(tensors, TOP as usize);
    let made = device.traffic();

    let ways: [(&str, &dyn Fn(Tensor<2>) -> Tensor<2>); 3] = [
        ("wgmoe", &|t| ffn.forward(t)),
        ("Burn, every expert on every token", &|t| reference.dense(t)),
        ("Burn, each expert on its tokens", &|t| reference.scale_by_expert(t)),
    ];
    // The first run of each compiles, and tunes Burn's kernels.
    let mut outputs = vec![];
    for (name, run) in &ways {
        let start = Instant::now();
        outputs.push(run(input.clone()).try_into_vec_as::<f32>()?);
        println!("first run, {name}: {:.1} s", start.elapsed().as_secs_f64());
    }
    let largest = outputs[1].iter().fold(0f32, |m, v| m.max(v.abs()));
    let mut worst = 0f32;
    for other in &outputs[1..] {
        for (a, b) in outputs[0].iter().zip(other) {
            let error = (a - b).abs() / largest;
            worst = if worst.is_nan() || error <= worst { worst } else { error };
        }
    }
    println!("largest difference: {worst:.1e} of the largest value");

    let mut times = vec![vec![]; ways.len()];
    for _ in 0..ROUNDS {
        for ((_, run), times) in ways.iter().zip(&mut times) {
            let start = Instant::now();
            let out = run(input.clone());
            device.device().sync()?;
            times.push(start.elapsed());
            drop(out);
        }
    }
    for ((name, _), times) in ways.iter().zip(&mut times) {
        times.sort();
        let ms = |t: Duration| t.as_secs_f64() * 1e3;
        println!("{name}: least {:.1} ms, median {:.1} ms", ms(times[0]), ms(times[ROUNDS / 2]));
    }
    let moved = device.traffic();
    let (readbacks, bytes) = (moved.readbacks - made.readbacks, moved.bytes - made.bytes);
    println!("moved by wgmoe while it ran: {readbacks} readbacks, {bytes} bytes");
    // NaN fails.
    let same = worst <= 1e-4;
    if same && moved == made {
        Ok(())
    } else {
        Err("the outputs differ, or something was moved".into())
    }
}
