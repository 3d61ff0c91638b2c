//! GGUF files, versions 2 and 3, as llama.cpp's converter writes them: one, or the parts of a split
//! one.
//!
//! Own code, for crates that read them do more and need more: `gguf-rs` 0.1.8 brings a command line
//! (clap, comfy-table, simple_logger), `gguf-rs-lib` 0.3.3 has 13,700 lines, most of which write.
mod config;
mod read;
mod types;

use super::files::{Files, MOST_FILES, MOST_HEADERS, Mapped};
use super::{Config, failed};
use crate::Result;
use read::{Header, Value, Values};
use std::path::{Path, PathBuf};

/// The GGUF file that a path stands for: a file itself, or the only one of a directory that has no
/// safetensors files (of the parts of a split one, the first).
pub(super) fn find(path: &Path) -> Result<Option<PathBuf>> {
    if path.is_file() {
        return Ok(Some(path.into()));
    }
    if Files::are_in(path) {
        return Ok(None);
    }
    // What cannot be listed has no `config.json` either, of which the error will be.
    let Ok(entries) = std::fs::read_dir(path) else { return Ok(None) };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
        .filter(|path| Part::of(path).is_none_or(|part| part.number == 1))
        .collect();
    found.sort();
    match &found[..] {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        [one, other, ..] => {
            let [one, other] = [one, other].map(|p| p.file_name().unwrap_or_default().display());
            Err(failed(path, None, format!("has several GGUF files, {one} and {other}: name one")))
        }
    }
}

/// What the name of a part says, as `llama-gguf-split` writes it: `NAME-00001-of-00003.gguf`.
struct Part<'a> {
    name: &'a str,
    /// From 1 on.
    number: u64,
    count: u64,
}

impl<'a> Part<'a> {
    fn of(path: &'a Path) -> Option<Self> {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (name, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| {
            let all = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
            all.then(|| text.parse().ok()).flatten()
        };
        Some(Self { name, number: digits(number)?, count: digits(count)? })
    }

    fn file(name: &str, number: u64, count: u64) -> String {
        format!("{name}-{number:05}-of-{count:05}.gguf")
    }
}

/// Opens a file, and the other parts where it is the first of a split one.
pub(super) fn open(path: PathBuf) -> Result<(Files, Config)> {
    let mut room = MOST_HEADERS;
    let mut first = Mapped::open(path, None)?;
    let Header { values, tensors } = read::read(&first.path, &first.map, &mut room)?;
    let parts = count(&first.path, &values, COUNT, 1)?;
    let mut have = tensors.len() as u64;
    let mut others = vec![];
    // Comes before what the metadata says of the model, which only the first part has.
    for (number, path) in (1..).zip(other_parts(&first.path, &values, parts)?) {
        let mut part = Mapped::open(path, Some(&format!("part {} of {parts}", number + 1)))?;
        let header = read::read(&part.path, &part.map, &mut room)?;
        for (key, want) in [(NUMBER, number), (COUNT, parts)] {
            let got = count(&part.path, &header.values, key, 0)?;
            if got != want {
                return Err(failed(&part.path, Some(key), format!("{got}, expected {want}")));
            }
        }
        part.tensors = header.tensors;
        have += part.tensors.len() as u64;
        others.push(part);
    }
    let total = count(&first.path, &values, TENSORS, have)?;
    if total != have {
        let reason = format!("{total}, but there are {have}");
        return Err(failed(&first.path, Some(TENSORS), reason));
    }
    let config = config::read(&first.path, &values)?;
    first.tensors = tensors;
    let list = first.path.clone();
    let files = std::iter::once(first).chain(others).collect();
    Ok((Files { list, files }, config))
}

const NUMBER: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// A number of things that metadata says, or another where it says none.
fn count(path: &Path, values: &Values<'_>, key: &str, absent: u64) -> Result<u64> {
    match values.get(key) {
        None => Ok(absent),
        Some(&Value::Whole(n)) if (0..=u32::MAX.into()).contains(&n) => Ok(n as u64),
        Some(_) => Err(failed(path, Some(key), format!("expected a number up to {}", u32::MAX))),
    }
}

/// The files of all parts but the first, which this must be.
fn other_parts(path: &Path, values: &Values<'_>, count: u64) -> Result<Vec<PathBuf>> {
    if count <= 1 {
        return Ok(vec![]);
    }
    if count > MOST_FILES as u64 {
        return Err(failed(path, Some(COUNT), format!("{count} parts, at most {MOST_FILES}")));
    }
    let number = self::count(path, values, NUMBER, 0)?;
    let part = Part::of(path).filter(|p| (p.number, p.count) == (number + 1, count));
    let Some(part) = part else {
        let name = Part::file("NAME", number + 1, count);
        let reason = format!("part {} of {count}, expected a file of name {name}", number + 1);
        return Err(failed(path, Some(NUMBER), reason));
    };
    if number != 0 {
        let name = Part::file(part.name, 1, count);
        let reason = format!("part {} of {count}: open the first, {name}", number + 1);
        return Err(failed(path, Some(NUMBER), reason));
    }
    let file = |number| path.with_file_name(Part::file(part.name, number, count));
    Ok((2..=count).map(file).collect())
}
