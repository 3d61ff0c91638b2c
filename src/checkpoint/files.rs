//! The files of a checkpoint: safetensors files, mapped, and the index of a sharded one. Everything in them is checked
//! before it is used: lengths against the file's own, products without overflow, names against leaving the directory.
use super::failed;
use crate::{Result, WeightType};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
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
        let dtype = format!("{:?}", self.dtype);
        WeightType::of_name(&dtype).ok_or_else(|| {
            let known: Vec<_> = WeightType::ALL.iter().map(|t| t.name()).collect();
            let reason = format!("is {dtype}, expected one of {}", known.join(", "));
            failed(self.file, Some(name), reason)
        })
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
        let text = &map[8..data];
        // Not the crate's reading of whole files, which adds up what a header claims before it looks at the file's length.
        match serde_json::from_slice::<Metadata>(text) {
            Ok(header) => {
                let names = header.offset_keys();
                let infos = names.iter().filter_map(|name| Some((&**name, header.info(name)?)));
                check(&path, infos.collect(), map.len() - data)?;
                Ok(Self { path, map, header, data })
            }
            Err(e) => {
                culprit(&path, text, map.len() - data)?;
                Err(fail(format!("the header is no safetensors header: {e}")))
            }
        }
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let missing = || failed(&self.path, Some(name), "is missing");
        let info = self.header.info(name).ok_or_else(missing)?;
        let (from, to) = info.data_offsets;
        let bytes = self.map[self.data..].get(from..to).ok_or_else(missing)?;
        Ok(Tensor { file: &self.path, dtype: info.dtype, shape: &info.shape, bytes })
    }
}

/// Checks what a header says: tensors that lie one behind the other, are as large as their shapes, and fill what the file has
/// behind its header.
fn check(path: &Path, tensors: Vec<(&str, &TensorInfo)>, have: usize) -> Result<()> {
    let mut end = 0;
    for (name, info) in tensors {
        let fail = |reason: String| Err(failed(path, Some(name), reason));
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
        if bits.is_none() || bits != (to - from).checked_mul(8) {
            let (dtype, shape) = (info.dtype, &info.shape);
            return fail(format!("has {} bytes, not those of {dtype:?} {shape:?}", to - from));
        }
    }
    if end != have {
        return Err(failed(path, None, format!("{} bytes behind the last tensor", have - end)));
    }
    Ok(())
}

/// The error about the tensor for which a header was refused, if it is about one.
fn culprit(path: &Path, header: &[u8], have: usize) -> Result<()> {
    let Ok(mut all) = serde_json::from_slice::<serde_json::Map<_, _>>(header) else {
        return Ok(());
    };
    all.remove("__metadata__");
    let infos = all.into_iter().map(|(name, value)| {
        let info = serde_json::from_value::<TensorInfo>(value);
        let info = info.map_err(|e| failed(path, Some(&name), format!("in the header: {e}")))?;
        Ok((name, info))
    });
    let mut infos = infos.collect::<Result<Vec<_>>>()?;
    infos.sort_by_key(|(_, info)| info.data_offsets);
    check(path, infos.iter().map(|(name, info)| (&**name, info)).collect(), have)
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
