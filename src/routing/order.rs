//! The order of scores, on the CPU: the specification that the kernels' integer keys follow.
use std::cmp::Ordering;

/// Higher values first; `+0 == -0`; NaN after everything, also after `-inf`.
pub fn descending(a: f32, b: f32) -> Ordering {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => Ordering::Equal,
        (true, false) => Ordering::Greater,
        (false, true) => Ordering::Less,
        // Not NaN, so comparable.
        (false, false) => b.partial_cmp(&a).unwrap_or(Ordering::Equal),
    }
}

/// The `count` first of `items` by `value`, equal values in the order given; in the order chosen.
pub fn top(
    items: impl IntoIterator<Item = usize>,
    count: usize,
    value: impl Fn(usize) -> f32,
) -> Vec<usize> {
    let mut items: Vec<usize> = items.into_iter().collect();
    items.sort_by(|&a, &b| descending(value(a), value(b))); // stable: ties keep their order
    items.truncate(count);
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_is_last_and_zeros_are_equal() {
        let values = [f32::NAN, -0.0, f32::NEG_INFINITY, 0.0, 1.0, f32::INFINITY, -1.0];
        let order = top(0..values.len(), values.len(), |i| values[i]);
        assert_eq!(order, [5, 4, 1, 3, 6, 2, 0]);
    }
}
