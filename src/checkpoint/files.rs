//! The files of a checkpoint: safetensors files, mapped, and the index of a sharded one. Everything in them is checked
//! before it is used: lengths against the file's own, products without overflow, names against leaving the directory.
use super::failed;
use crate::{Result, WeightType};
use safetensors::{Dtype, tensor::Metadata};
use std::collections::BTreeMap;
use std::fs::{File, Metadata as Stat};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

/// Most bytes of `config.json` and of an index: tens of times what models of today have. They are read into memory.
const MOST_JSON: u64 = 32 << 20;
/// Most bytes of the headers of all files together; the same holds for them.
const MOST_HEADERS: u64 = 64 << 20;
/// Most files.
const MOST_FILES: usize = 4096;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A tensor of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tensor<'a> {
    pub(super) file: &'a Path,
    pub(super) dtype: Dtype,
    pub(super) shape: &'a [usize],
    pub(super) bytes: &'a [u8],
}

impl Tensor<'_> {
    /// The storage type, where it is one of ours.
    pub(super) fn weight_type(&self, name: &str) -> Result<WeightType> {
        match self.dtype {
            Dtype::F32 => Ok(WeightType::F32),
            Dtype::F16 => Ok(WeightType::F16),
            Dtype::BF16 => Ok(WeightType::Bf16),
            other => {
                let reason = format!("is {other:?}, expected BF16, F16 or F32");
                Err(failed(self.file, Some(name), reason))
            }
        }
    }
}

/// A mapped file and what its header says is in it.
#[derive(Debug)]
struct Mapped {
    path: PathBuf,
    map: memmap2::Mmap,
    header: Metadata,
    /// Where the tensors begin.
    data: usize,
}

/// All files of a checkpoint.
#[derive(Debug)]
pub(super) struct Files {
    /// The one that lists them: the only file, or the index.
    list: PathBuf,
    files: Vec<Mapped>,
}

impl Files {
    /// Opens and maps `model.safetensors`, or all files that `model.safetensors.index.json` names.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE);
        let index = dir.join(INDEX);
        let (list, paths) = if single.exists() || !index.exists() {
            (single.clone(), vec![(single, None)])
        } else {
            let named = files_of_index(&index, &read_json_file(&index)?)?;
            let paths = named.into_iter().map(|(file, tensor)| (dir.join(file), Some(tensor)));
            (index, paths.collect())
        };
        let mut room = MOST_HEADERS;
        let files = paths
            .into_iter()
            .map(|(path, tensor)| Mapped::open(path, tensor.as_deref(), &mut room))
            .collect::<Result<_>>()?;
        Ok(Self { list, files })
    }

    /// Whether there is a tensor of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.files.iter().any(|file| file.header.info(name).is_some())
    }

    /// The tensor of this name.
    pub(super) fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let mut found = self.files.iter().filter(|file| file.header.info(name).is_some());
        let file = found.next().ok_or_else(|| failed(&self.list, Some(name), "is missing"))?;
        if let Some(other) = found.next() {
            let reason = format!("is in {} as well", other.path.display());
            return Err(failed(&file.path, Some(name), reason));
        }
        file.tensor(name)
    }
}

impl Mapped {
    /// `tensor` is one that an index says is here; `room` is what is left of [`MOST_HEADERS`].
    fn open(path: PathBuf, tensor: Option<&str>, room: &mut u64) -> Result<Self> {
        let fail = |reason: String| failed(&path, tensor, reason);
        let (file, stat) = open_file(&path, tensor)?;
        if stat.len() < 8 {
            return Err(fail(format!("{} bytes, too short for a safetensors file", stat.len())));
        }
        #[expect(unsafe_code, reason = "a mapped file is memory that another process may change")]
        // SAFETY: the bytes are only ever read, as plain numbers, so that whatever they become is a valid value. What
        // remains, and is said in `Checkpoint::open`, is that a file cut short while mapped ends the process by a signal.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| fail(e.to_string()))?;
        let mut length = [0; 8];
        length.copy_from_slice(map.get(..8).unwrap_or_default());
        let length = u64::from_le_bytes(length);
        if length > map.len() as u64 - 8 {
            let reason = format!(
                "a header of {length} bytes in a file of {}: cut short, or no safetensors file",
                map.len()
            );
            return Err(fail(reason));
        }
        *room = room.checked_sub(length).ok_or_else(|| {
            fail(format!(
                "a header of {length} bytes: all headers together may have {MOST_HEADERS}"
            ))
        })?;
        let data = 8 + length as usize;
        // The crate's own reading of whole files adds up what the header claims before it looks at the file's length, and
        // so may overflow. This checks the header against itself; `tensor` checks it against the file.
        let header: Metadata = serde_json::from_slice(&map[8..data])
            .map_err(|e| fail(format!("the header is no safetensors header: {e}")))?;
        let mapped = Self { path, map, header, data };
        mapped.check()?;
        Ok(mapped)
    }

    /// Checks what the header says: tensors that lie one behind the other, fill the file, and are as large as their shapes.
    fn check(&self) -> Result<()> {
        let have = self.map.len() - self.data;
        let mut end = 0;
        for name in self.header.offset_keys() {
            let fail = |reason: String| Err(failed(&self.path, Some(&name), reason));
            let Some(info) = self.header.info(&name) else {
                return fail("is in the header twice".into());
            };
            let (from, to) = info.data_offsets;
            if to < from || to > have {
                return fail(format!(
                    "lies at bytes {from}..{to} of {have}: the file is cut short, or its header lies"
                ));
            }
            if from != end {
                return fail(format!("lies at bytes {from}..{to}, expected to begin at {end}"));
            }
            end = to;
            let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |n, &d| n.checked_mul(d));
            if bits != (to - from).checked_mul(8) {
                return fail(format!(
                    "has {} bytes, not those of {:?} {:?}",
                    to - from,
                    info.dtype,
                    info.shape
                ));
            }
        }
        if end != have {
            return Err(failed(
                &self.path,
                None,
                format!("{} bytes behind the last tensor", have - end),
            ));
        }
        Ok(())
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let missing = || failed(&self.path, Some(name), "is missing");
        let info = self.header.info(name).ok_or_else(missing)?;
        let (from, to) = info.data_offsets;
        let bytes = self.map[self.data..].get(from..to).ok_or_else(missing)?;
        Ok(Tensor { file: &self.path, dtype: info.dtype, shape: &info.shape, bytes })
    }
}

/// The files that an index names, each with the first tensor that is said to be in it.
pub(super) fn files_of_index(path: &Path, json: &[u8]) -> Result<BTreeMap<String, String>> {
    let index: serde_json::Value = serde_json::from_slice(json)
        .map_err(|e| failed(path, None, format!("is not JSON: {e}")))?;
    let Some(map) = index.get("weight_map").and_then(|map| map.as_object()) else {
        return Err(failed(path, Some("weight_map"), "expected an object"));
    };
    let mut files = BTreeMap::new();
    for (tensor, file) in map {
        let Some(file) = file.as_str() else {
            return Err(failed(path, Some(tensor), format!("expected a file's name, got {file}")));
        };
        // Backslashes and drives, too: a path that is plain on one system must not lead away on another.
        let plain = matches!(Path::new(file).components().collect::<Vec<_>>()[..], [Component::Normal(name)] if name == file);
        if !plain || file.contains(['/', '\\', ':', '\0']) {
            return Err(failed(
                path,
                Some(tensor),
                format!("{file:?} is not the name of a file beside the index"),
            ));
        }
        if !files.contains_key(file) {
            files.insert(file.to_string(), tensor.clone());
        }
        if files.len() > MOST_FILES {
            return Err(failed(path, None, format!("names more than {MOST_FILES} files")));
        }
    }
    if files.is_empty() {
        return Err(failed(path, Some("weight_map"), "names no file"));
    }
    Ok(files)
}

/// Opens a plain file: neither a directory nor a pipe, which would be waited for.
fn open_file(path: &Path, item: Option<&str>) -> Result<(File, Stat)> {
    let stat = std::fs::metadata(path).map_err(|e| failed(path, item, e.to_string()))?;
    if !stat.is_file() {
        let what = if stat.is_dir() { "is a directory" } else { "is not a plain file" };
        return Err(failed(path, item, what));
    }
    let file = File::open(path).map_err(|e| failed(path, item, e.to_string()))?;
    Ok((file, stat))
}

/// The bytes of a JSON file of a sensible length.
pub(super) fn read_json_file(path: &Path) -> Result<Vec<u8>> {
    let (file, stat) = open_file(path, None)?;
    if stat.len() > MOST_JSON {
        return Err(failed(path, None, format!("{} bytes, at most {MOST_JSON}", stat.len())));
    }
    let mut bytes = vec![];
    // It may have grown meanwhile.
    file.take(MOST_JSON).read_to_end(&mut bytes).map_err(|e| failed(path, None, e.to_string()))?;
    Ok(bytes)
}
