//! One layer that learns, three ways on one device: `MoeFfn`, and Burn's own autodiff of Burn's own operations with every expert
//! on every token, and with each expert on its own tokens. Compares outputs and gradients, says what each keeps between its
//! passes, then times forward and backward in turns:
//! `cargo run --release --example compare_training [ROUNDS] [SHAPE]`. Prints a table.
use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};
use std::time::{Duration, Instant};
use wgmoe_burn::wgmoe::layer::LayerConfig;
use wgmoe_burn::wgmoe::routing::TokenChoice;
use wgmoe_burn::{MoeDevice, MoeFfn, MoeTensors, Reference};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// A way to run the layer.
type Way<'a> = &'a dyn Fn(Tensor<2>) -> Tensor<2>;

/// A shape of the layer, and tokens.
struct Shape {
    name: &'static str,
    tokens: usize,
    config: LayerConfig,
    top: u32,
}

/// What one run took and made.
struct Run {
    forward: Duration,
    backward: Duration,
    /// Bytes of Burn's memory that the forward pass left in use, its output apart.
    kept: u64,
    out: Tensor<2>,
    dx: Tensor<2>,
}

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let rounds: usize = args.next().map_or(Ok(5), |n| n.parse())?;
    let wanted = args.next();
    let device = MoeDevice::open()?;
    let info = device.context().info();
    println!("{} ({:?}), {} {}", info.name, info.backend, info.driver, info.driver_info);
    let config = |d, f, e, top, shared| {
        LayerConfig::new(d, f, e, TokenChoice::new(top)).with_shared_experts(shared)
    };
    let shapes = [
        Shape { name: "A", tokens: 64, config: config(512, 256, 64, 8, 1), top: 8 },
        // Small: Burn's kernels are tried out in a minute.
        Shape { name: "S", tokens: 70, config: config(64, 32, 8, 3, 2), top: 3 },
        Shape { name: "B", tokens: 512, config: config(128, 96, 32, 4, 2), top: 4 },
    ];
    let mut rows = vec![];
    for shape in shapes.iter().filter(|s| wanted.as_ref().is_none_or(|w| w == s.name)) {
        rows.extend(compare(&device, shape, rounds)?);
    }
    println!(
        "\n| shape | way | forward, least | median | backward, least | median | both, least | kept |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    rows.iter().for_each(|row| println!("{row}"));
    Ok(())
}

fn compare(device: &MoeDevice, shape: &Shape, rounds: usize) -> Outcome<Vec<String>> {
    let Shape { name, tokens, config, top } = *shape;
    let LayerConfig { hidden, intermediate, experts, shared_experts, .. } = config;
    println!(
        "{name}: {tokens} tokens, D {hidden}, F {intermediate}, {experts} experts + {shared_experts} shared, top {top}, f32"
    );
    let burn = device.device();
    burn.seed(1);
    let tensors = MoeTensors::random(&config, burn);
    let normal = || {
        let shape = [tokens, hidden as usize];
        Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), burn)
    };
    let (x, dout) = (normal(), normal());
    let ffn = MoeFfn::learning(device, config, tensors.clone())?.train();
    let reference = Reference::new(tensors, top as usize).learning();
    let ways: [(&str, Way<'_>); 3] = [
        ("wgmoe", &|x| ffn.forward(x)),
        ("Burn, every expert on every token", &|x| reference.dense(x)),
        ("Burn, each expert on its tokens", &|x| reference.scale_by_expert(x)),
    ];

    // The first runs compile, and tune Burn's kernels.
    let mut firsts = vec![];
    for (name, way) in &ways {
        let start = Instant::now();
        let run = run(burn, way, &x, &dout)?;
        println!("first run, {name}: {:.1} s", start.elapsed().as_secs_f64());
        firsts.push([run.out, run.dx].map(|t| t.try_into_vec_as::<f32>()));
    }
    let mut values = vec![];
    for [out, dx] in firsts {
        values.push([out?, dx?]);
    }
    for other in &values[1..] {
        let worst = [0, 1].map(|i| difference(&values[0][i], &other[i]));
        let [out, dx] = worst;
        println!(
            "largest differences: {out:.1e} of the output's largest value, {dx:.1e} of the gradient's"
        );
        // NaN fails.
        if !worst.iter().all(|&w| w <= 1e-4) {
            return Err("the ways differ".into());
        }
    }

    let mut times = vec![(vec![], vec![], vec![]); ways.len()];
    let mut kept = vec![0; ways.len()];
    for _ in 0..rounds {
        for (i, (_, way)) in ways.iter().enumerate() {
            let run = run(burn, way, &x, &dout)?;
            times[i].0.push(run.forward);
            times[i].1.push(run.backward);
            times[i].2.push(run.forward + run.backward);
            kept[i] = run.kept;
        }
    }
    kept[0] += ffn.saved_bytes();
    let ms = |t: Duration| t.as_secs_f64() * 1e3;
    let row = |(i, (forward, backward, both)): (usize, &mut (Vec<_>, Vec<_>, Vec<_>))| {
        let [f, b, s] = [forward, backward, both].map(|t: &mut Vec<Duration>| {
            t.sort();
            [ms(t[0]), ms(t[t.len() / 2])]
        });
        format!(
            "| {name} | {} | {:.1} ms | {:.1} | {:.1} ms | {:.1} | {:.1} ms | {:.2} MiB |",
            ways[i].0,
            f[0],
            f[1],
            b[0],
            b[1],
            s[0],
            kept[i] as f64 / f64::from(1 << 20)
        )
    };
    Ok(times.iter_mut().enumerate().map(row).collect())
}

/// Forward, then backward of `sum(out * dout)`, each until the device is done.
fn run(device: &Device, way: Way<'_>, x: &Tensor<2>, dout: &Tensor<2>) -> Outcome<Run> {
    let in_use = || device.memory_pool_usage().map_or(0, |usage| usage.bytes_in_use);
    let x = x.clone().autodiff().require_grad();
    device.sync()?;
    let before = in_use();
    let start = Instant::now();
    let out = way(x.clone());
    device.sync()?;
    let forward = start.elapsed();
    let of_out = 4 * out.dims().iter().product::<usize>() as u64;
    let kept = in_use().saturating_sub(before).saturating_sub(of_out);
    let start = Instant::now();
    let grads = (out.clone() * dout.clone()).sum().backward();
    device.sync()?;
    let backward = start.elapsed();
    let dx = x.grad(&grads).ok_or("no gradient")?;
    Ok(Run { forward, backward, kept, out: out.inner(), dx })
}

/// The largest difference of two tensors, as a share of the largest value.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    let largest = b.iter().fold(0f32, |m, v| m.max(v.abs()));
    a.iter().zip(b).fold(0f32, |worst, (a, b)| {
        let error = (a - b).abs() / largest;
        if worst.is_nan() || error <= worst { worst } else { error }
    })
}
