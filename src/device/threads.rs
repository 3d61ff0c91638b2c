//! Kernels that are compiled side by side.

/// What both make, each on a thread of its own where there are threads: a driver compiles a pipeline on the thread
/// that asks for it.
#[cfg(not(target_family = "wasm"))]
pub(crate) fn both<A: Send, B>(
    first: impl FnOnce() -> A + Send,
    second: impl FnOnce() -> B,
) -> (A, B) {
    std::thread::scope(|scope| {
        let first = scope.spawn(first);
        let second = second();
        (first.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), second)
    })
}

/// The same in a browser, one after the other.
#[cfg(target_family = "wasm")]
pub(crate) fn both<A, B>(first: impl FnOnce() -> A, second: impl FnOnce() -> B) -> (A, B) {
    (first(), second())
}
