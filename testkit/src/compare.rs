//! Comparisons. `got` is close to `want` where `|got - want| <= atol + rtol |want|`, which is false
//! for NaN; two arrays of different lengths are never alike. `tests/suite/comparisons.rs` shows
//! that each can fail.
#[cfg(not(target_family = "wasm"))]
use crate::program::Progress;
use std::fmt::Debug;

/// The first index where two arrays are not close; where one is longer, the end of the shorter.
pub fn mismatch(got: &[f32], want: &[f32], atol: f32, rtol: f32) -> Option<usize> {
    // Not `>`, which would be false for NaN.
    let close = |(g, w): (&f32, &f32)| (g - w).abs() <= atol + rtol * w.abs();
    let uneven = (got.len() != want.len()).then(|| got.len().min(want.len()));
    got.iter().zip(want).position(|pair| !close(pair)).or(uneven)
}

/// The first index where two arrays differ; where one is longer, the end of the shorter.
pub fn difference<T: PartialEq>(got: &[T], want: &[T]) -> Option<usize> {
    let uneven = (got.len() != want.len()).then(|| got.len().min(want.len()));
    got.iter().zip(want).position(|(g, w)| g != w).or(uneven)
}

/// The largest difference; infinite where one is NaN or the lengths differ.
pub fn worst(got: &[f32], want: &[f32]) -> f32 {
    if got.len() != want.len() {
        return f32::INFINITY;
    }
    got.iter().zip(want).fold(0.0, |worst: f32, (g, w)| {
        let error = (g - w).abs();
        if error.is_nan() { f32::INFINITY } else { worst.max(error) }
    })
}

/// The largest magnitude: what a tolerance of a whole row is a share of.
pub fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most: f32, v| most.max(v.abs()))
}

/// An error at the first value that is not close.
pub fn close(got: &[f32], want: &[f32], atol: f32, rtol: f32, what: &str) -> Result<(), String> {
    mismatch(got, want, atol, rtol).map_or(Ok(()), |i| Err(told(got, want, i, what)))
}

/// An error at the first difference.
pub fn same<T: PartialEq + Debug>(got: &[T], want: &[T], what: &str) -> Result<(), String> {
    difference(got, want).map_or(Ok(()), |i| Err(told(got, want, i, what)))
}

fn told<T: Debug>(got: &[T], want: &[T], i: usize, what: &str) -> String {
    let of = got.len().max(want.len());
    match (got.get(i), want.get(i)) {
        (Some(got), Some(want)) => format!("{what}: at {i} of {of}: got {got:?}, want {want:?}"),
        _ => format!("{what}: {} values, want {}", got.len(), want.len()),
    }
}

/// Fails on the first value that is not close, naming index and values.
#[track_caller]
pub fn assert_close(got: &[f32], want: &[f32], atol: f32, rtol: f32, what: &str) {
    if let Err(e) = close(got, want, atol, rtol, what) {
        panic!("{e}");
    }
}

/// Fails on the first difference, naming index and values.
#[track_caller]
pub fn assert_same<T: PartialEq + Debug>(got: &[T], want: &[T], what: &str) {
    if let Err(e) = same(got, want, what) {
        panic!("{e}");
    }
}

/// The bits of floats, all NaN alike: for exact comparisons.
pub fn exact(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() }).collect()
}

/// Comparisons of a program that goes on after one has failed: each failure is told, and
/// remembered.
#[cfg(not(target_family = "wasm"))]
pub struct Checks<'a> {
    /// Of what: the start of every message.
    subject: String,
    progress: &'a Progress,
    pub ok: bool,
}

#[cfg(not(target_family = "wasm"))]
impl<'a> Checks<'a> {
    pub fn new(subject: impl Into<String>, progress: &'a Progress) -> Self {
        Self { subject: subject.into(), progress, ok: true }
    }

    pub fn same<T: PartialEq + Debug>(&mut self, what: &str, got: &[T], want: &[T]) {
        self.note(same(got, want, what));
    }

    /// Returns the largest difference.
    pub fn close(&mut self, what: &str, got: &[f32], want: &[f32], atol: f32, rtol: f32) -> f32 {
        self.note(close(got, want, atol, rtol, what));
        worst(got, want)
    }

    /// Every value must be a number.
    pub fn finite(&mut self, what: &str, got: &[f32]) -> bool {
        let bad = got.iter().position(|v| !v.is_finite());
        self.note(bad.map_or(Ok(()), |i| Err(format!("{what}: at {i}: got {}", got[i]))));
        bad.is_none()
    }

    pub fn note(&mut self, outcome: Result<(), String>) {
        if let Err(e) = outcome {
            self.ok = false;
            self.progress.note(&format!("{}: differs from the CPU's: {e}", self.subject));
        }
    }
}
