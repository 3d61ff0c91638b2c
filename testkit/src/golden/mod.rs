//! Golden files: what reference implementations returned on seeded inputs. A file says what it is
//! in its header: `__metadata__.case` is JSON with a `kind` and the settings. A reader here takes
//! note of each tensor that is asked for, so that a test can tell which ones nobody looked at.
mod gradient;
mod layer;

pub use gradient::{Forward, Gradient, How, OnGpu, expert_gradients};
pub use layer::{Layer, blocks};
use safetensors::{Dtype, SafeTensors};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use wgmoe::Score;
use wgmoe::routing::schedule::Schedule;

/// How far a float may be from the recorded one: `ATOL + RTOL |want|`.
pub const ATOL: f32 = 1e-5;
pub const RTOL: f32 = 1e-4;

/// Kinds that the tests of golden files do not compare yet, each with what it waits for.
pub const LATER: &[(&str, &str)] = &[("gguf", "none: `tests/suite/gguf.rs` compares them")];

/// The folder of golden files: the one that `WGMOE_GOLDEN` names, else `tests/golden`.
pub fn folder() -> PathBuf {
    std::env::var_os("WGMOE_GOLDEN").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden")),
        PathBuf::from,
    )
}

/// Every golden file, by name. None at all is an error.
pub fn files() -> Result<Vec<File>, String> {
    let folder = folder();
    let told = |e| format!("{}: {e}", folder.display());
    let mut names: Vec<String> = vec![];
    for entry in std::fs::read_dir(&folder).map_err(told)? {
        let name = entry.map_err(told)?.file_name().to_string_lossy().into_owned();
        names.extend(name.strip_suffix(".safetensors").map(String::from));
    }
    if names.is_empty() {
        return Err(format!("{}: no golden files", folder.display()));
    }
    names.sort();
    names.iter().map(|name| File::open(name)).collect()
}

#[derive(Clone)]
struct Tensor {
    dtype: Dtype,
    bytes: Vec<u8>,
}

/// A file: its settings and tensors.
pub struct File {
    pub name: String,
    case: serde_json::Value,
    tensors: BTreeMap<String, Tensor>,
    read: RefCell<BTreeSet<String>>,
}

impl File {
    /// The file of this name, less `.safetensors`.
    pub fn open(name: &str) -> Result<Self, String> {
        let path = folder().join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Self::parse(name, &bytes).map_err(|e| format!("{name}: {e}"))
    }

    /// A file of this name, from its bytes.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self, String> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
        let config = header.metadata().as_ref().and_then(|m| m.get("case"));
        let case = serde_json::from_str(config.ok_or("no `case` in the header")?)
            .map_err(|e| format!("`case`: {e}"))?;
        let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
        let tensor = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
            (name.into(), Tensor { dtype: view.dtype(), bytes: view.data().to_vec() })
        };
        let tensors = file.iter().map(tensor).collect();
        Ok(Self { name: name.into(), case, tensors, read: RefCell::default() })
    }

    pub fn kind(&self) -> &str {
        self.case["kind"].as_str().unwrap_or_default()
    }

    /// A setting that is a number of things.
    pub fn size(&self, key: &str) -> Result<usize, String> {
        let size = self.case[key].as_u64().ok_or_else(|| format!("no `{key}` in the header"))?;
        usize::try_from(size).map_err(|e| format!("`{key}`: {e}"))
    }

    /// The same as the crate takes it.
    pub fn number(&self, key: &str) -> Result<u32, String> {
        u32::try_from(self.size(key)?).map_err(|e| format!("`{key}`: {e}"))
    }

    /// A setting that is no whole number; none where it is not there or null.
    pub fn real(&self, key: &str) -> Option<f64> {
        self.case[key].as_f64()
    }

    pub fn text(&self, key: &str) -> Result<&str, String> {
        self.case[key].as_str().ok_or_else(|| format!("no `{key}` in the header"))
    }

    /// The texts of a list in a setting that is a map of lists.
    pub fn texts(&self, key: &str, entry: &str) -> Result<Vec<&str>, String> {
        let list = self.case[key][entry].as_array();
        let list = list.and_then(|list| list.iter().map(|v| v.as_str()).collect());
        list.ok_or_else(|| format!("no `{key}` of `{entry}` in the header"))
    }

    pub fn flag(&self, key: &str) -> Option<bool> {
        self.case[key].as_bool()
    }

    pub fn score(&self) -> Result<Score, String> {
        match self.text("score")? {
            "softmax" => Ok(Score::Softmax),
            "sigmoid" => Ok(Score::Sigmoid),
            other => Err(format!("score `{other}`")),
        }
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Tensors that were not read yet.
    pub fn unread(&self) -> Vec<&str> {
        let read = self.read.borrow();
        self.names().filter(|name| !read.contains(*name)).collect()
    }

    fn values<T: bytemuck::Pod>(&self, name: &str, dtype: Dtype) -> Result<Vec<T>, String> {
        let tensor = self.tensors.get(name).ok_or_else(|| format!("no `{name}`"))?;
        self.read.borrow_mut().insert(name.into());
        if tensor.dtype != dtype {
            return Err(format!("`{name}`: expected {dtype:?}, got {:?}", tensor.dtype));
        }
        Ok(bytemuck::pod_collect_to_vec(&tensor.bytes))
    }

    pub fn f32s(&self, name: &str) -> Result<Vec<f32>, String> {
        self.values(name, Dtype::F32)
    }

    pub fn bytes(&self, name: &str) -> Result<Vec<u8>, String> {
        self.values(name, Dtype::U8)
    }

    pub fn i32s(&self, name: &str) -> Result<Vec<i32>, String> {
        self.values(name, Dtype::I32)
    }

    /// Whole numbers none of which is below 0.
    pub fn u32s(&self, name: &str) -> Result<Vec<u32>, String> {
        let number = |n| u32::try_from(n).map_err(|e| format!("`{name}`: {n}: {e}"));
        self.i32s(name)?.into_iter().map(number).collect()
    }

    /// Bytes that are 0 or 1.
    pub fn flags(&self, name: &str) -> Result<Vec<bool>, String> {
        let bytes: Vec<u8> = self.values(name, Dtype::U8)?;
        match bytes.iter().find(|&&b| b > 1) {
            Some(byte) => Err(format!("`{name}`: {byte} is neither 0 nor 1")),
            None => Ok(bytes.into_iter().map(|b| b == 1).collect()),
        }
    }

    /// How many values a tensor has.
    pub fn len(&self, name: &str) -> usize {
        self.tensors.get(name).map_or(0, |t| t.bytes.len() * 8 / t.dtype.bitsize())
    }

    pub fn is_float(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(|t| t.dtype == Dtype::F32)
    }

    /// The same with another value at one place: a float moved by `by`, a whole number by 1, a flag
    /// turned.
    pub fn corrupted(&self, name: &str, at: usize, by: f32) -> Self {
        let mut tensors = self.tensors.clone();
        let tensor = tensors.get_mut(name).expect("a tensor of the file");
        match tensor.dtype {
            Dtype::U8 => tensor.bytes[at] ^= 1,
            dtype => {
                let bytes = &mut tensor.bytes[4 * at..][..4];
                let word: [u8; 4] = (&*bytes).try_into().expect("four bytes");
                bytes.copy_from_slice(&match dtype {
                    Dtype::F32 => (f32::from_le_bytes(word) + by).to_le_bytes(),
                    _ => (i32::from_le_bytes(word) + 1).to_le_bytes(),
                });
            }
        }
        Self { name: self.name.clone(), case: self.case.clone(), tensors, read: RefCell::default() }
    }
}

/// A schedule, and its experts per token at each mask ratio.
pub type Row = (Schedule, Vec<u32>);

/// The mask ratios of recorded capacity schedules, and their rows.
pub fn schedules(file: &File) -> Result<(Vec<f32>, Vec<Row>), String> {
    let ratios = file.f32s("mask_ratio")?;
    let mut rows = vec![];
    for key in file.names().filter(|name| *name != "mask_ratio") {
        let parts: Vec<&str> = key.split('|').collect();
        let [kind, k_min, k_max, sigma] = parts[..] else {
            return Err(format!("`{key}` is no schedule"));
        };
        let said = |e: String| format!("`{key}`: {e}");
        let number = |n: &str| n.parse::<u32>().map_err(|e| said(e.to_string()));
        let schedule = Schedule::new(
            kind.parse().map_err(|_| said("no such schedule".into()))?,
            number(k_min)?,
            number(k_max)?,
        )
        .with_sigma(sigma.parse().map_err(|_| said(format!("sigma {sigma}")))?);
        let row = file.u32s(key)?;
        if row.len() != ratios.len() {
            return Err(said(format!("{} values for {} ratios", row.len(), ratios.len())));
        }
        rows.push((schedule, row));
    }
    Ok((ratios, rows))
}
