//! Small sums over samples, and how work is shared out.

/// The middle of some times, the upper one of an even number; 0 of none.
pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(0.0)
}

/// `count` of `n` indices, from the first to the last, both included.
pub fn spread(n: usize, count: usize) -> Vec<usize> {
    let count = count.clamp(1, n);
    (0..count).map(|i| i * (n - 1) / (count - 1).max(1)).collect()
}

/// Threads that run at once here.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// `one` of every item, in order, on every core. Twins of whole tokens take long on one.
pub fn on_every_core<T: Sync, R: Send>(items: &[T], one: impl Fn(&T) -> R + Sync) -> Vec<R> {
    // A browser has no threads to start.
    if threads() == 1 {
        return items.iter().map(one).collect();
    }
    let part = items.len().div_ceil(threads()).max(1);
    std::thread::scope(|scope| {
        let one = &one;
        let parts: Vec<_> = items
            .chunks(part)
            .map(|part| scope.spawn(move || part.iter().map(one).collect::<Vec<_>>()))
            .collect();
        parts.into_iter().flat_map(|p| p.join().expect("no item panics")).collect()
    })
}
