// exp(x) for x <= 0 within 2 ulp on every device (WGSL's own may be off by 3 + 2|x| ulp); below -87 it is 0.
fn exp_negative(x: f32) -> f32 {
    let n = round(x * 1.44269504);
    let r = fma(n, -1.42860677e-6, fma(n, -0.693145752, x));
    var p = 1.0 / 720.0;
    p = fma(p, r, 1.0 / 120.0);
    p = fma(p, r, 1.0 / 24.0);
    p = fma(p, r, 1.0 / 6.0);
    p = fma(p, r, 0.5);
    p = fma(p, r, 1.0);
    p = fma(p, r, 1.0);
    let power = bitcast<f32>(u32(max(n, -126.0) + 127.0) << 23u);
    return select(p * power, 0.0, x < -87.0);
}

// exp(g - highest) of a logit given as bits, `highest` being the highest of its row: 0 for NaN and -inf; a +inf counts 1
// and leaves nothing to finite ones.
fn softmax_term(g: u32, highest: f32, infinite: bool) -> f32 {
    if infinite {
        return select(0.0, 1.0, g == 0x7f800000u);
    }
    if !is_finite(g) {
        return 0.0;
    }
    return exp_negative(bitcast<f32>(g) - highest);
}

// The f32 of a key.
fn value_of_key(k: u32) -> f32 {
    return bitcast<f32>(select(~k, k & 0x7fffffffu, (k >> 31u) == 1u));
}
