//! Headers of safetensors files, and the index of a sharded checkpoint. Everything in them is
//! checked before it is used: lengths against the file's own, products without overflow, names
//! against leaving the directory.
use super::failed;
use super::files::{Entries, Entry, MOST_FILES, MOST_HEADERS};
use crate::Result;
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::BTreeMap;
use std::path::{Component, Path};

/// The tensors of a safetensors file. `tensor` is one that an index says is here; `room` is what is
/// left of [`MOST_HEADERS`].
pub(super) fn read(
    path: &Path,
    tensor: Option<&str>,
    bytes: &[u8],
    room: &mut u64,
) -> Result<Entries> {
    let fail = |reason: String| failed(path, tensor, reason);
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return Err(fail(format!("{} bytes, too short for a safetensors file", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > rest.len() as u64 {
        let have = bytes.len();
        let reason = format!(
            "a header of {length} bytes in a file of {have}: cut short, or no safetensors file"
        );
        return Err(fail(reason));
    }
    *room = room.checked_sub(length).ok_or_else(|| {
        fail(format!("a header of {length} bytes: all headers together may have {MOST_HEADERS}"))
    })?;
    let (text, data) = rest.split_at(length as usize);
    // Not the crate's reading of whole files, which adds up what a header claims before it looks at
    // the file's length.
    let header = match serde_json::from_slice::<Metadata>(text) {
        Ok(header) => header,
        Err(e) => {
            culprit(path, text, data.len())?;
            return Err(fail(format!("the header is no safetensors header: {e}")));
        }
    };
    let names = header.offset_keys();
    let infos = names.iter().filter_map(|name| Some((&**name, header.info(name)?)));
    check(path, infos.clone().collect(), data.len())?;
    let from = 8 + text.len();
    let entry = |(name, info): (&str, &TensorInfo)| {
        let bytes = from + info.data_offsets.0..from + info.data_offsets.1;
        (
            name.into(),
            Entry { dtype: format!("{:?}", info.dtype), shape: info.shape.clone(), bytes },
        )
    };
    Ok(infos.map(entry).collect())
}

/// Checks what a header says: tensors that lie one behind the other, are as large as their shapes,
/// and fill what the file has behind its header.
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
        // Backslashes and drives, too: a path that is plain on one system must not lead away on
        // another.
        let components: Vec<_> = Path::new(file).components().collect();
        let plain = matches!(components[..], [Component::Normal(name)] if name == file);
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
