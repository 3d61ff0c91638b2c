//! Comparisons with the CPU twins. Each names the first difference.

/// An error at the first value that is not within `atol + rtol * |want|`; NaN never is.
pub(crate) fn close(
    got: &[f32],
    want: &[f32],
    atol: f32,
    rtol: f32,
    what: &str,
) -> Result<(), String> {
    lengths(got.len(), want.len(), what)?;
    let far = |(_, (got, want)): &(usize, (&f32, &f32))| {
        let close = (*got - *want).abs() <= atol + rtol * want.abs(); // false for NaN
        !close
    };
    match got.iter().zip(want).enumerate().find(far) {
        Some((i, (got, want))) => Err(format!("{what}: at {i}: got {got}, want {want}")),
        None => Ok(()),
    }
}

/// An error at the first difference.
pub(crate) fn same<T: PartialEq + std::fmt::Debug>(
    got: &[T],
    want: &[T],
    what: &str,
) -> Result<(), String> {
    lengths(got.len(), want.len(), what)?;
    match got.iter().zip(want).position(|(got, want)| got != want) {
        Some(i) => Err(format!("{what}: at {i}: got {:?}, want {:?}", got[i], want[i])),
        None => Ok(()),
    }
}

fn lengths(got: usize, want: usize, what: &str) -> Result<(), String> {
    if got == want { Ok(()) } else { Err(format!("{what}: {got} values, want {want}")) }
}
