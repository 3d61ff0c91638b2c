//! What can go wrong because of the caller's data or machine.

/// Everything that can go wrong because of the caller's data or machine. A WGSL source of ours that
/// does not compile is a bug and panics instead. Every variant that speaks of an argument names it
/// as the documentation does.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A slice's length does not match the dimensions it is used with.
    #[error("`{name}`: expected {expected} bytes{}, got {got}", of_shape(.shape.as_deref()))]
    Size {
        /// Argument.
        name: &'static str,
        /// Bytes implied by the dimensions.
        expected: u64,
        /// Bytes in the slice.
        got: u64,
        /// What it must hold, where that is a tensor: `[8, 4] u32`.
        shape: Option<String>,
    },
    /// A slice does not lie inside its buffer.
    #[error("`{name}`: bytes {offset}..{end} of a buffer of {size}")]
    OutOfBuffer {
        /// Argument.
        name: &'static str,
        /// First byte of the slice.
        offset: u64,
        /// One past its last byte.
        end: u64,
        /// Bytes in the buffer.
        size: u64,
    },
    /// A slice's offset is not a multiple of what the device asks.
    #[error("`{name}`: offset {offset} is not a multiple of {alignment}")]
    Alignment {
        /// Argument.
        name: &'static str,
        /// First byte of the slice.
        offset: u64,
        /// `min_storage_buffer_offset_alignment` of the device.
        alignment: u64,
    },
    /// A buffer was made without a usage that is needed.
    #[error("`{name}`: the buffer lacks {}", usages_of(*.missing))]
    Usage {
        /// Argument.
        name: &'static str,
        /// Usages to add when making the buffer.
        missing: wgpu::BufferUsages,
    },
    /// Two slices share bytes, and one of them is written.
    #[error("`{written}` is written and overlaps `{other}`")]
    Overlap {
        /// The argument that is written.
        written: &'static str,
        /// The argument it overlaps.
        other: &'static str,
    },
    /// A value that makes no sense, or not with the others.
    #[error("`{name}`: {reason}")]
    Invalid {
        /// Argument.
        name: &'static str,
        /// What is wrong, and what is allowed.
        reason: String,
    },
    /// The work does not fit a limit of this device.
    #[error("`{name}`: {need} needed, {limit} of this device is {have}")]
    Limit {
        /// Argument.
        name: &'static str,
        /// Name of the wgpu limit.
        limit: &'static str,
        /// Value needed.
        need: u64,
        /// Value the device has.
        have: u64,
    },
    /// A variant was asked for that needs a feature the device was made without.
    #[error("the device lacks {}", names_of(*.missing))]
    Feature {
        /// Features to ask for when making the device.
        missing: wgpu::Features,
    },
    /// No adapter, or the adapter refused the device.
    #[error("no usable GPU: {0}")]
    NoGpu(String),
    /// Reading a buffer back failed.
    #[error("read-back failed: {0}")]
    ReadBack(String),
    /// A checkpoint's file cannot be read, or does not hold what it should.
    #[cfg(feature = "checkpoint")]
    #[error("{file}: {}{reason}", .item.as_ref().map_or(String::new(), |item| format!("`{item}`: ")))]
    Checkpoint {
        /// Path of the file.
        file: String,
        /// Name of the tensor, or of the field of `config.json` or of metadata, where it is about one.
        item: Option<String>,
        /// What is wrong, and what was expected.
        reason: String,
    },
    /// wgpu refused an object: out of memory, a lost device, a destroyed buffer, a buffer of
    /// another device.
    #[error("wgpu: {0}")]
    Device(String),
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Bytes of another number, where the shape says nothing more.
    pub(crate) fn size(name: &'static str, expected: u64, got: u64) -> Self {
        Self::Size { name, expected, got, shape: None }
    }

    pub(crate) fn invalid(name: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { name, reason: reason.into() }
    }

    /// The same error about what the caller gave: where an argument of a kernel is another one of
    /// the caller's, `names` say which, as (the kernel's, the caller's).
    pub(crate) fn renamed(self, names: &[(&'static str, &'static str)]) -> Self {
        let of = |name: &'static str| {
            names.iter().find(|(own, _)| *own == name).map_or(name, |&(_, given)| given)
        };
        // Names inside a text: one after the other in one pass, since names may change places.
        let within = |text: String| {
            let words = text.split('`').enumerate();
            // Every other part stands between two of them.
            let words = words.map(|(i, word)| match names.iter().find(|(own, _)| *own == word) {
                Some((_, given)) if i % 2 == 1 => *given,
                _ => word,
            });
            words.collect::<Vec<_>>().join("`")
        };
        match self {
            Self::Size { name, expected, got, shape } => {
                Self::Size { name: of(name), expected, got, shape }
            }
            Self::OutOfBuffer { name, offset, end, size } => {
                Self::OutOfBuffer { name: of(name), offset, end, size }
            }
            Self::Alignment { name, offset, alignment } => {
                Self::Alignment { name: of(name), offset, alignment }
            }
            Self::Usage { name, missing } => Self::Usage { name: of(name), missing },
            Self::Overlap { written, other } => {
                Self::Overlap { written: of(written), other: of(other) }
            }
            Self::Invalid { name, reason } => {
                Self::Invalid { name: of(name), reason: within(reason) }
            }
            Self::Limit { name, limit, need, have } => {
                Self::Limit { name: of(name), limit, need, have }
            }
            Self::Device(text) => Self::Device(within(text)),
            other => other,
        }
    }
}

fn of_shape(shape: Option<&str>) -> String {
    shape.map_or(String::new(), |shape| format!(", {shape}"))
}

/// The names of features, as wgpu's documentation has them.
fn names_of(features: wgpu::Features) -> String {
    features.iter_names().map(|(name, _)| name).collect::<Vec<_>>().join(" and ")
}

/// The names of usages, as wgpu's documentation has them.
fn usages_of(usages: wgpu::BufferUsages) -> String {
    usages.iter_names().map(|(name, _)| name).collect::<Vec<_>>().join(" and ")
}

/// The product of a shape in bytes, or an error naming the argument where it overflows.
pub(crate) fn bytes_of(name: &'static str, shape: &[u64], bytes: u64) -> Result<u64> {
    shape
        .iter()
        .try_fold(bytes, |n, &d| n.checked_mul(d))
        .ok_or_else(|| Error::invalid(name, format!("{shape:?} overflows")))
}

/// Errors for a zero dimension.
pub(crate) fn not_zero(dims: &[(&'static str, u32)]) -> Result<()> {
    match dims.iter().find(|(_, n)| *n == 0) {
        Some(&(name, _)) => Err(Error::invalid(name, "must not be 0")),
        None => Ok(()),
    }
}

/// Panics unless an argument of a CPU twin has the length that its other arguments imply.
#[track_caller]
pub(crate) fn expect_len(name: &str, got: usize, want: usize) {
    assert!(got == want, "`{name}`: expected {want} values, got {got}");
}

/// Panics unless an argument of a CPU twin is whole rows of `width` values; how many rows.
#[track_caller]
pub(crate) fn expect_rows(name: &str, got: usize, width_name: &str, width: usize) -> usize {
    expect_some(width_name, width);
    assert!(got.is_multiple_of(width), "`{name}`: expected rows of {width} values, got {got}");
    got / width
}

/// Panics for a size of 0 of a CPU twin.
#[track_caller]
pub(crate) fn expect_some(name: &str, got: usize) {
    assert!(got > 0, "`{name}`: expected 1 or more, got 0");
}

/// Panics where a number of a CPU twin is more than another allows.
#[track_caller]
pub(crate) fn expect_most(name: &str, got: usize, most: usize) {
    assert!(got <= most, "`{name}`: expected at most {most}, got {got}");
}

/// Panics for offsets without a first one; how many ranges they stand for.
#[track_caller]
pub(crate) fn expect_offsets(name: &str, got: usize) -> usize {
    assert!(got > 0, "`{name}`: expected one value more than there are ranges, got 0");
    got - 1
}
