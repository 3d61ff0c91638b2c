//! The files of a checkpoint, mapped, and the tensors that their headers name: safetensors files
//! (`header.rs`) or GGUF files (`gguf`). A header is checked before a tensor of it is given out.
use super::{failed, header};
use crate::{Result, WeightType};
use std::collections::BTreeMap;
use std::fs::{File, Metadata as Stat};
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Most bytes of `config.json` and of an index: tens of times what models of today have. They are read into memory.
const MOST_JSON: u64 = 32 << 20;
/// Most bytes of the headers of all files together; the same holds for them.
pub(super) const MOST_HEADERS: u64 = 64 << 20;
/// Most files.
pub(super) const MOST_FILES: usize = 4096;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What a header says of a tensor, checked: its bytes lie inside the file, and are as many as its
/// type and shape need.
#[derive(Debug)]
pub(super) struct Entry {
    /// Type, as its format calls it.
    pub(super) dtype: String,
    /// Outermost first, whatever the format.
    pub(super) shape: Vec<usize>,
    /// Where it lies in the file.
    pub(super) bytes: Range<usize>,
}

/// Tensors by name.
pub(super) type Entries = BTreeMap<String, Entry>;

/// A tensor of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tensor<'a> {
    pub(super) file: &'a Path,
    pub(super) dtype: &'a str,
    pub(super) shape: &'a [usize],
    pub(super) bytes: &'a [u8],
}

impl Tensor<'_> {
    /// The storage type, where it is one of ours.
    pub(super) fn weight_type(&self, name: &str) -> Result<WeightType> {
        self.dtype.parse().map_err(|_| {
            let known = WeightType::names();
            failed(self.file, Some(name), format!("is {}, expected one of {known}", self.dtype))
        })
    }
}

/// A mapped file and the tensors in it.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) path: PathBuf,
    pub(super) map: memmap2::Mmap,
    pub(super) tensors: Entries,
}

/// All files of a checkpoint.
#[derive(Debug)]
pub(super) struct Files {
    /// The one that lists them: the only file, the first, or the index.
    pub(super) list: PathBuf,
    pub(super) files: Vec<Mapped>,
}

impl Files {
    /// Whether a directory has safetensors files.
    pub(super) fn are_in(dir: &Path) -> bool {
        dir.join(SINGLE).exists() || dir.join(INDEX).exists()
    }

    /// Opens and maps `model.safetensors`, or all files that `model.safetensors.index.json` names.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE);
        let index = dir.join(INDEX);
        let (list, paths) = if single.exists() || !index.exists() {
            (single.clone(), vec![(single, None)])
        } else {
            let named = header::files_of_index(&index, &read_json_file(&index)?)?;
            let paths = named.into_iter().map(|(file, tensor)| (dir.join(file), Some(tensor)));
            (index, paths.collect())
        };
        let mut room = MOST_HEADERS;
        let mut open = |(path, tensor): (PathBuf, Option<String>)| {
            let mut file = Mapped::open(path, tensor.as_deref())?;
            file.tensors = header::read(&file.path, tensor.as_deref(), &file.map, &mut room)?;
            Ok(file)
        };
        let files = paths.into_iter().map(&mut open).collect::<Result<_>>()?;
        Ok(Self { list, files })
    }

    /// Whether there is a tensor of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.files.iter().any(|file| file.tensors.contains_key(name))
    }

    /// The tensor of this name.
    pub(super) fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let mut found = self.files.iter().filter_map(|file| Some((file, file.tensors.get(name)?)));
        let missing = || failed(&self.list, Some(name), "is missing");
        let (file, Entry { dtype, shape, bytes }) = found.next().ok_or_else(missing)?;
        if let Some((other, _)) = found.next() {
            let reason = format!("is in {} as well", other.path.display());
            return Err(failed(&file.path, Some(name), reason));
        }
        let bytes = file.map.get(bytes.clone()).ok_or_else(missing)?;
        Ok(Tensor { file: &file.path, dtype, shape, bytes })
    }
}

impl Mapped {
    /// Maps a file, of whose tensors nothing is known yet. `item` is what in another file leads to
    /// it.
    pub(super) fn open(path: PathBuf, item: Option<&str>) -> Result<Self> {
        let (file, _) = open_file(&path, item)?;
        #[expect(unsafe_code, reason = "a mapped file is memory that another process may change")]
        // SAFETY: the bytes are only ever read, as plain numbers, so that whatever they become is a valid value. What
        // remains, and is said in `Checkpoint::open`, is that a file cut short while mapped ends the process by a signal.
        let map =
            unsafe { memmap2::Mmap::map(&file) }.map_err(|e| failed(&path, item, e.to_string()))?;
        Ok(Self { path, map, tensors: Entries::new() })
    }
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
