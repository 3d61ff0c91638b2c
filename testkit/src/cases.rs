//! Seeded data. Awkward values and sizes that many kernels meet.
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Uniform in [-1, 1), the same on every machine.
pub fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Kinds of [`values`].
pub const KINDS: &[&str] = &[
    "random",
    "equal",
    "zeros",
    "negative",
    "ties",
    "-inf",
    "nan",
    "infinities",
    "subnormal",
    "mixed",
];

/// Seeded values of a kind: all of it ordinary input.
pub fn values(kind: &str, seed: u64, len: usize) -> Vec<f32> {
    const ODD: [f32; 10] = [
        f32::NAN,
        f32::NEG_INFINITY,
        f32::INFINITY,
        0.0,
        -0.0,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        1e-40,
        -1e-40,
    ];
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len)
        .map(|_| match kind {
            "random" => rng.random_range(-6.0..6.0),
            "equal" => 0.25,
            "zeros" => *pick(&mut rng, &[0.0, -0.0]),
            "negative" => rng.random_range(-9.0..-0.5),
            "ties" => *pick(&mut rng, &[-1.0, -0.0, 0.0, 0.5, 2.0]),
            "-inf" => f32::NEG_INFINITY,
            "nan" => *pick(&mut rng, &[f32::NAN, -f32::NAN]),
            "infinities" => *pick(&mut rng, &[f32::INFINITY, f32::NEG_INFINITY, 1.0]),
            "subnormal" => f32::from_bits(rng.random_range(0..0x0080_0000)),
            "mixed" if rng.random_bool(0.4) => *pick(&mut rng, &ODD),
            "mixed" => rng.random_range(-2.0..2.0),
            _ => panic!("no kind {kind}"),
        })
        .collect()
}

fn pick<'a>(rng: &mut StdRng, of: &'a [f32]) -> &'a f32 {
    &of[rng.random_range(0..of.len())]
}

/// A seeded permutation.
pub fn permutation(seed: u64, len: usize) -> Vec<usize> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..len).collect();
    for i in (1..len).rev() {
        order.swap(i, rng.random_range(0..=i));
    }
    order
}

/// A seeded bit set `[experts, ceil(tokens / 32)]`, each pair assigned with this probability.
pub fn assignment(seed: u64, tokens: usize, experts: usize, probability: f64) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut words = wgmoe::plan::bits::empty(tokens, experts);
    for e in 0..experts {
        for t in 0..tokens {
            if rng.random_bool(probability) {
                wgmoe::plan::bits::set(&mut words, tokens, e, t);
            }
        }
    }
    words
}

/// `len` seeded words, every bit random: what a buffer may hold that nobody cleared.
pub fn stale(seed: u64, len: usize) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random()).collect()
}
