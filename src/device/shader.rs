//! What a kernel is before a device compiles it: its WGSL, its bindings, and the text in front of it.
use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{LazyLock, Mutex, PoisonError};

/// Most workgroup memory of a kernel, in bytes: WebGPU's default limit.
pub const WORKGROUP_BYTES: u64 = 16_384;
/// What a kernel is: its WGSL, and the one list of its bindings.
#[derive(Debug)]
pub struct Spec {
    /// File stem, entry point, debug label and bench group: one word.
    pub name: &'static str,
    /// The kernel's own WGSL, without prelude.
    pub body: &'static str,
    /// Names and byte offsets of the fields of the uniform at binding 0.
    pub params: &'static [(&'static str, u32)],
    /// The storage bindings, 1, 2, ...
    pub bindings: &'static [Binding],
    /// Every variant there is, whatever the device.
    pub variants: fn() -> Vec<Prelude>,
}

/// A storage binding of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Name in the WGSL and in errors.
    pub name: &'static str,
    /// Whether the kernel writes it.
    pub written: bool,
    /// Bytes of one item, the smallest binding that makes sense.
    pub item: u64,
    /// Whether it stays `read` in every variant, since browsers must see that what is read from it is uniform: it cannot
    /// share a buffer with a binding that is written.
    pub uniform: bool,
}

impl Binding {
    /// Whether the binding at this place, which is only read, is declared `read_write` all the same.
    pub(super) fn is_shared(&self, prelude: &Prelude, place: u32) -> bool {
        !self.written && !self.uniform && prelude.shared >> place & 1 == 1
    }
}

/// A binding that is read.
pub(crate) const fn read(name: &'static str, item: u64) -> Binding {
    Binding { name, written: false, item, uniform: false }
}

/// A binding that is read for values that barriers hang on.
pub(crate) const fn read_uniform(name: &'static str, item: u64) -> Binding {
    Binding { name, written: false, item, uniform: true }
}

/// A binding that is written, and perhaps read too.
pub(crate) const fn write(name: &'static str, item: u64) -> Binding {
    Binding { name, written: true, item, uniform: false }
}

/// What stands in front of a kernel's body: constants, and pieces of `shaders/lib` chosen among twins with the same
/// function names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Prelude {
    /// The choices in words.
    pub label: String,
    /// Features that the device needs.
    pub features: wgpu::Features,
    /// The text.
    pub text: String,
    /// Names of the pieces that the text is put together from, in order: those that the kernel's file lists.
    pub pieces: Vec<&'static str>,
    /// Bit set of the bindings (bit 0 is binding 1) that are declared `read_write` though they are only read, because their
    /// slice shares a buffer with one that is written. Those that are written, and [`Binding::uniform`] ones, take no notice.
    pub shared: u32,
}

impl Prelude {
    pub(crate) fn new(label: impl Into<String>) -> Self {
        Self { label: label.into(), ..Self::default() }
    }

    pub(crate) fn constant(mut self, name: &str, value: u32) -> Self {
        let _ = writeln!(self.text, "const {name}: u32 = {value}u;");
        self
    }

    pub(crate) fn flag(mut self, name: &str, value: bool) -> Self {
        let _ = writeln!(self.text, "const {name}: bool = {value};");
        self
    }

    /// An alias of a type, as kernels that move whole vectors have one.
    pub(crate) fn alias(mut self, name: &str, ty: &str) -> Self {
        let _ = writeln!(self.text, "alias {name} = {ty};");
        self
    }

    pub(crate) fn piece(mut self, piece: Piece) -> Self {
        let _ = write!(self.text, "\n// piece: {}\n{}", piece.name, piece.wgsl);
        self.pieces.push(piece.name);
        self
    }

    /// A piece that only some variants have.
    pub(crate) fn maybe_piece(self, piece: Option<Piece>) -> Self {
        match piece {
            Some(piece) => self.piece(piece),
            None => self,
        }
    }

    /// The variants that differ, each once.
    pub(crate) fn distinct(all: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let mut seen = HashSet::new();
        all.into_iter().filter(|prelude| seen.insert(prelude.fingerprint())).collect()
    }

    /// A hash of all of it: texts of thousands of variants took 130 MB in debug builds.
    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }

    pub(crate) fn needs(mut self, features: wgpu::Features) -> Self {
        self.features |= features;
        self
    }
}

/// A file of `shaders/lib`: see [`piece!`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) name: &'static str,
    pub(crate) wgsl: &'static str,
}

/// The piece of this name: its file's path in `shaders/lib`, without `.wgsl`.
macro_rules! piece {
    ($name:literal) => {
        crate::device::shader::Piece {
            name: $name,
            wgsl: include_str!(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/shaders/lib/",
                $name,
                ".wgsl"
            )),
        }
    };
}
pub(crate) use piece;

impl Spec {
    /// Whether [`Spec::variants`] lists this variant, slices that share a buffer apart: so that the tests have seen all that
    /// runs. The lists are made once.
    pub(super) fn lists(&self, prelude: &Prelude) -> bool {
        static LISTED: LazyLock<Mutex<HashMap<&str, HashSet<u64>>>> = LazyLock::new(Mutex::default);
        let mut listed = LISTED.lock().unwrap_or_else(PoisonError::into_inner);
        let all = || (self.variants)().iter().map(Prelude::fingerprint).collect();
        let prelude = Prelude { shared: 0, ..prelude.clone() };
        listed.entry(self.name).or_insert_with(all).contains(&prelude.fingerprint())
    }

    /// The WGSL handed to the driver.
    pub fn source(&self, prelude: &Prelude) -> String {
        // `enable` must come first. Browsers want `enable subgroups;`, naga 30 rejects it.
        let browser =
            cfg!(target_family = "wasm") && prelude.features.contains(wgpu::Features::SUBGROUP);
        let enable = if browser { "enable subgroups;\n" } else { "" };
        // naga takes a condition that is the same within each subgroup for one that is not, which
        // matrices of subgroups can do with; barriers it looks at in any case.
        let matrix = if prelude.features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
            "enable wgpu_cooperative_matrix;\nenable f16;\ndiagnostic(off, derivative_uniformity);\n"
        } else {
            ""
        };
        let source = format!(
            "{enable}{matrix}// {}, variant: {}\n{}\n{}",
            self.name, prelude.label, prelude.text, self.body
        );
        (0..).zip(self.bindings).filter(|&(i, b)| b.is_shared(prelude, i)).fold(
            source,
            |source, (_, b)| {
                let [read, write] = ["read", "read_write"]
                    .map(|access| format!("var<storage, {access}> {}:", b.name));
                source.replace(&read, &write)
            },
        )
    }
}

/// Declares the uniform of a kernel, and its layout for the tests.
macro_rules! params {
    ($($field:ident: $ty:ty),* $(,)?) => {
        #[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(C)]
        pub(crate) struct Params { $(pub(crate) $field: $ty),* }

        impl Params {
            const LAYOUT: &[(&str, u32)] =
                &[$((stringify!($field), std::mem::offset_of!(Params, $field) as u32)),*];
        }
    };
}
pub(crate) use params;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_list_their_variants_and_no_others() {
        for spec in crate::ops::SPECS {
            for prelude in (spec.variants)() {
                let shared = Prelude { shared: 1, ..prelude.clone() };
                let other = prelude.clone().constant("OTHER", 1);
                assert!(spec.lists(&prelude) && spec.lists(&shared), "{}", spec.name);
                assert!(!spec.lists(&other), "{}", spec.name);
            }
        }
    }
}
