//! EC-DLM's table of gate scales (arXiv 2604.01622): the output of a token that n experts took has the norm of
//! `||p||` of one expert's, `p` being its gates; the table brings it to that of the shared experts.
use super::exact::{cos_pi, exp, ln};
use crate::routing::MAX_EXPERTS;
use crate::{Error, Result};

/// How a table of scales is made. The same values give the same table, bit by bit, on every platform.
///
/// ```
/// use wgmoe::routing::scaling::ScalingTable;
///
/// let scale = ScalingTable::new(12, 2).make()?;
/// assert_eq!(scale.len(), 13);
/// assert_eq!(scale[..2], [1.0, 2f32.sqrt()]);
/// # Ok::<(), wgmoe::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScalingTable {
    /// Routed experts.
    pub experts: u32,
    /// Shared experts; not 0, there would be nothing to bring the routed ones to.
    pub shared_experts: u32,
    /// Draws that are averaged.
    pub draws: u32,
    /// Seed of the draws.
    pub seed: u64,
}

impl ScalingTable {
    /// As many draws as EC-DLM makes, 10,000; the error of each entry is about 0.2 %.
    pub const fn new(experts: u32, shared_experts: u32) -> Self {
        Self { experts, shared_experts, draws: 10_000, seed: 42 }
    }

    /// The table, `[experts + 1]`: entry n is the mean of `sqrt(shared_experts) / ||p||`, `p` the softmax of `experts` standard
    /// normals, of which the first n are kept and normalised; entry 0 is 1.
    ///
    /// EC-DLM draws anew for each n; one draw for all n has the same means.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for no (or more than [`MAX_EXPERTS`]) experts, no shared experts, or no draws. Without shared
    /// experts there is no table in EC-DLM either, which refuses the option then.
    pub fn make(&self) -> Result<Vec<f32>> {
        for (name, n) in [
            ("experts", self.experts),
            ("shared_experts", self.shared_experts),
            ("draws", self.draws),
        ] {
            if n == 0 {
                return Err(Error::invalid(name, "must not be 0"));
            }
        }
        if self.experts > MAX_EXPERTS {
            return Err(Error::invalid(
                "experts",
                format!("{}, at most {MAX_EXPERTS}", self.experts),
            ));
        }
        let mut normals = Normals { state: self.seed, spare: None };
        let mut sums = vec![0.0f64; self.experts as usize];
        for _ in 0..self.draws {
            // The softmax's denominator cancels out.
            let (mut total, mut squares) = (0.0, 0.0);
            for sum in &mut sums {
                let term = exp(normals.next());
                total += term;
                squares += term * term;
                *sum += total / squares.sqrt();
            }
        }
        let factor = f64::from(self.shared_experts).sqrt() / f64::from(self.draws);
        Ok([1.0].into_iter().chain(sums.into_iter().map(|sum| (sum * factor) as f32)).collect())
    }
}

/// Standard normals: SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) and the
/// transform of Box and Muller (Annals of Mathematical Statistics 29, 1958).
struct Normals {
    state: u64,
    spare: Option<f64>,
}

impl Normals {
    fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform, never 0 or 1.
    fn uniform(&mut self) -> f64 {
        ((self.bits() >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }

    fn next(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let radius = (-2.0 * ln(self.uniform())).sqrt();
        let half_turns = 2.0 * self.uniform();
        self.spare = Some(radius * cos_pi((half_turns - 0.5).abs())); // the sine
        radius * cos_pi(half_turns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_bits_and_moments() {
        // The published first outputs of SplitMix64 for seed 1234567.
        let mut known = Normals { state: 1_234_567, spare: None };
        assert_eq!(
            [(); 3].map(|()| known.bits()),
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
        let mut normals = Normals { state: 7, spare: None };
        let n = 100_000;
        let mut moments = [0.0; 4];
        for _ in 0..n {
            let x = normals.next();
            for (i, m) in moments.iter_mut().enumerate() {
                *m += x.powi(i as i32 + 1) / f64::from(n);
            }
        }
        let [mean, variance, skew, kurtosis] = moments;
        assert!(mean.abs() < 0.015 && (variance - 1.0).abs() < 0.02, "{moments:?}");
        assert!(skew.abs() < 0.05 && (kurtosis - 3.0).abs() < 0.1, "{moments:?}");
    }
}
