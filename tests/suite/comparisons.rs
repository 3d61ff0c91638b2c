//! The comparisons of the testkit can fail.
use testkit::compare::{close, difference, same, worst};
use testkit::prelude::{assert_close, assert_same, gpu, mismatch};

#[test]
fn mismatch_can_fail() {
    assert_eq!(mismatch(&[1.0, f32::NAN], &[1.0, 1.0], 1.0, 1.0), Some(1));
    assert_eq!(mismatch(&[1.0, 1.0], &[1.0, f32::NAN], f32::MAX, 1.0), Some(1));
    assert_eq!(mismatch(&[f32::INFINITY], &[1.0], f32::MAX, 1.0), Some(0));
    assert_eq!(mismatch(&[1.0, 1.1], &[1.0, 1.0], 0.01, 0.01), Some(1));
    assert_eq!(mismatch(&[1.0, 1.0], &[1.0, 1.0], 0.0, 0.0), None);
    // A share of the value that is wanted, not of the one that came.
    assert_eq!(mismatch(&[2.0], &[1.0], 0.0, 0.6), Some(0));
    assert_eq!(mismatch(&[1.5], &[1.0], 0.0, 0.6), None);
}

#[test]
fn lengths_count() {
    assert_eq!(mismatch(&[1.0], &[1.0, 1.0], 9.0, 9.0), Some(1));
    assert_eq!(mismatch(&[1.0, 1.0], &[], 9.0, 9.0), Some(0));
    assert_eq!(difference(&[1, 2], &[1]), Some(1));
    assert_eq!(difference(&[1, 2], &[1, 3]), Some(1));
    assert_eq!(difference(&[1, 2], &[1, 2]), None);
    assert_eq!(worst(&[1.0], &[]), f32::INFINITY);
    assert_eq!(worst(&[1.0, f32::NAN], &[1.0, 1.0]), f32::INFINITY);
    assert_eq!(worst(&[1.0, 3.0], &[1.5, 1.0]), 2.0);
}

#[test]
fn messages_name_place_and_values() {
    let e = close(&[0.0, 2.0], &[0.0, 1.0], 0.5, 0.0, "y").unwrap_err();
    assert_eq!(e, "y: at 1 of 2: got 2.0, want 1.0");
    assert_eq!(same(&[1, 2, 3], &[1, 2], "ids").unwrap_err(), "ids: 3 values, want 2");
    let fails = |f: fn()| std::panic::catch_unwind(f).is_err();
    assert!(fails(|| assert_close(&[1.0], &[2.0], 0.5, 0.0, "y")));
    assert!(fails(|| assert_same(&[1], &[2], "ids")));
}

/// A kernel that writes past its output is caught by the word behind it.
#[test]
fn the_guard_word_is_looked_at() {
    let Some(gpu) = gpu() else { return };
    let output = testkit::prelude::Output::u32s(&gpu, 4);
    let whole = output.slice().buffer;
    gpu.queue.write_buffer(whole, 12, bytemuck::cast_slice(&[7u32]));
    assert_eq!(output.get::<u32>(&gpu), [u32::MAX, u32::MAX, u32::MAX, 7]);
    gpu.queue.write_buffer(whole, 16, bytemuck::cast_slice(&[7u32]));
    let read = std::panic::AssertUnwindSafe(|| output.get::<u32>(&gpu));
    assert!(std::panic::catch_unwind(read).is_err());
}
