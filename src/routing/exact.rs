//! Elementary functions in plain IEEE operations, which every platform rounds alike. Those of `std` are the platform's own,
//! and may differ in the last bit; thresholds and tables made here must not. (The crate `libm` would do, but these three
//! functions are not worth a dependency of everybody who uses the library.)
use std::f64::consts::{LN_2, LOG2_E, PI, SQRT_2};

/// The upper part of ln 2, with 21 zero bits at its end, and the rest: `n * LN_2_HIGH` is exact for `|n| < 2^21`.
const LN_2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;

/// `e^x`, within 2 ulp, for `x <= 700`; results below the smallest normal number are 0.
pub(crate) fn exp(x: f64) -> f64 {
    let n = (x * LOG2_E).round();
    if n < -1022.0 {
        return 0.0;
    }
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let sum = (1..=14).rev().fold(1.0, |sum, k| 1.0 + r / f64::from(k) * sum);
    sum * f64::from_bits(((n as i64 + 1023) as u64) << 52) // 2^n, a normal number
}

/// `ln x`, within 2 ulp of the larger of 1 and the result, for normal positive `x`.
pub(crate) fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i32 - 1023;
    let mut m = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    if m > SQRT_2 {
        m /= 2.0;
        exponent += 1;
    }
    // ln m = 2 atanh(s)
    let s = (m - 1.0) / (m + 1.0);
    let sum = (0..=11).rev().fold(0.0, |sum, k| sum * s * s + 1.0 / f64::from(2 * k + 1));
    f64::from(exponent) * LN_2 + 2.0 * s * sum
}

/// `cos(pi x)`, within 2 ulp of 1, for `0 <= x <= 2`; exact at multiples of a half, and odd about a half.
pub(crate) fn cos_pi(x: f64) -> f64 {
    if x > 1.0 {
        return cos_pi(2.0 - x);
    }
    if x > 0.5 {
        return -cos_pi(1.0 - x);
    }
    if x <= 0.25 {
        let y = (PI * x) * (PI * x);
        (1..=9).rev().fold(1.0, |sum, k| 1.0 - y / f64::from(2 * k * (2 * k - 1)) * sum)
    } else {
        let z = PI * (0.5 - x);
        z * (1..=9).rev().fold(1.0, |sum, k| 1.0 - z * z / f64::from(2 * k * (2 * k + 1)) * sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_to_the_standard_library() {
        for i in 0..=20_000 {
            let x = f64::from(i) / 10_000.0;
            assert!((cos_pi(x) - (PI * x).cos()).abs() < 1e-15, "cos_pi({x})");
            let y = f64::from(i) / 100.0 - 190.0;
            assert!((exp(y) / y.exp() - 1.0).abs() < 1e-15, "exp({y})");
            let z = exp(y / 5.0);
            assert!((ln(z) - z.ln()).abs() <= 5e-16 * z.ln().abs().max(1.0), "ln({z})");
        }
        assert_eq!([0.0, 0.5, 1.0, 1.5, 2.0].map(cos_pi), [1.0, 0.0, -1.0, 0.0, 1.0]);
        assert_eq!([exp(0.0), exp(-1e4), ln(1.0)], [1.0, 0.0, 0.0]);
    }
}
