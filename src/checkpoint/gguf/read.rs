//! The header of one GGUF file: what it says of itself and of its tensors. It is read where it is
//! mapped: nothing is made of a number in it before that many bytes are known to be there.
use super::super::failed;
use super::super::files::{Entries, Entry, MOST_HEADERS};
use super::types::{self, Type};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// Most dimensions of a tensor: ggml's own limit.
const MOST_DIMENSIONS: u32 = 4;
/// Most arrays inside each other.
const MOST_NESTED: u32 = 8;
/// Where tensors begin, in a file that does not say it.
const ALIGNMENT: u64 = 32;

/// A value of a file's metadata.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value<'a> {
    Whole(i128),
    Real(f64),
    Flag(bool),
    Text(&'a [u8]),
    /// Checked and passed over: nothing that is read here is an array.
    Array,
}

/// Metadata by key.
pub(super) type Values<'a> = BTreeMap<&'a str, Value<'a>>;

/// What a header says.
#[derive(Debug)]
pub(super) struct Header<'a> {
    pub(super) values: Values<'a>,
    pub(super) tensors: Entries,
}

/// Reads the header of a file; `room` is what is left of [`MOST_HEADERS`].
pub(super) fn read<'a>(path: &'a Path, bytes: &'a [u8], room: &mut u64) -> Result<Header<'a>> {
    let most = usize::try_from(*room).unwrap_or(usize::MAX);
    let mut reader = Reader { path, bytes, at: 0, most, item: None };
    if reader.take(4)? != b"GGUF" {
        return Err(reader.fail("is no GGUF file: it does not begin with `GGUF`"));
    }
    match reader.u32()? {
        2 | 3 => {}
        // A small number in the other order.
        version if version & 0xffff == 0 && version != 0 => {
            return Err(reader.fail("is big-endian, of which none is read"));
        }
        version => {
            return Err(reader.fail(format!("is GGUF version {version}, expected 2 or 3")));
        }
    }
    let [tensors, keys] = [reader.u64()?, reader.u64()?];
    let mut values = Values::new();
    for i in 0..keys {
        let key = reader.name(&format!("key {i} of {keys}"))?;
        reader.item = Some(key);
        let value = reader.u32()?;
        let value = reader.value(value, 0)?;
        if values.insert(key, value).is_some() {
            return Err(reader.fail("is there twice"));
        }
        reader.item = None;
    }
    let mut infos = vec![];
    for i in 0..tensors {
        infos.push(reader.tensor(&format!("tensor {i} of {tensors}"))?);
    }
    *room -= reader.at as u64; // `most` keeps it below
    let alignment = alignment(path, &values)?;
    let tensors = place(path, &infos, reader.at as u64, alignment, bytes.len() as u64)?;
    Ok(Header { values, tensors })
}

/// `general.alignment`, which must be a power of two.
fn alignment(path: &Path, values: &Values<'_>) -> Result<u64> {
    let key = "general.alignment";
    match values.get(key) {
        None => Ok(ALIGNMENT),
        Some(Value::Whole(n)) if *n > 0 && *n <= 1 << 31 && (*n as u64).is_power_of_two() => {
            Ok(*n as u64)
        }
        Some(Value::Whole(n)) => {
            Err(failed(path, Some(key), format!("expected a power of two up to 2^31, got {n}")))
        }
        Some(_) => Err(failed(path, Some(key), "expected a whole number")),
    }
}

/// What a header says of a tensor.
struct Info<'a> {
    name: &'a str,
    kind: Type,
    shape: Vec<usize>,
    offset: u64,
}

impl Info<'_> {
    /// Bytes of its values. Fails where they are no whole blocks, or more than there are numbers.
    fn bytes(&self) -> std::result::Result<u64, String> {
        let Type { name, block, bytes, .. } = self.kind;
        let row = self.shape.last().map_or(1, |&n| n as u64);
        if !row.is_multiple_of(block) {
            return Err(format!("has rows of {row} values, no whole blocks of {block} of {name}"));
        }
        let rows = self.shape.iter().rev().skip(1);
        let all = rows.fold((row / block).checked_mul(bytes), |n, &d| n?.checked_mul(d as u64));
        all.ok_or_else(|| format!("has shape {:?}, whose bytes overflow", self.shape))
    }
}

/// Where the tensors lie. As ggml has it, they lie in the order of the header, one behind the
/// other, each at the next multiple of the alignment: so none overlaps another.
fn place(
    path: &Path,
    infos: &[Info<'_>],
    header: u64,
    alignment: u64,
    have: u64,
) -> Result<Entries> {
    let data = header.next_multiple_of(alignment); // both far below 2^63
    let mut tensors = Entries::new();
    let mut next = 0;
    for info in infos {
        let fail = |reason: String| failed(path, Some(info.name), reason);
        let size = info.bytes().map_err(fail)?;
        let offset = info.offset;
        if !offset.is_multiple_of(alignment) {
            let reason = format!("begins at byte {offset}, no multiple of {alignment}");
            return Err(fail(reason));
        }
        let range = data.checked_add(offset).and_then(|from| Some((from, from.checked_add(size)?)));
        let Some((from, to)) = range.filter(|&(_, to)| to <= have) else {
            return Err(fail(format!(
                "has {size} bytes from {offset} on, of {} behind the header: the file is cut \
                 short, or its header lies",
                have.saturating_sub(data)
            )));
        };
        if offset != next {
            return Err(fail(format!("begins at byte {offset}, expected {next}")));
        }
        next = (offset + size).next_multiple_of(alignment); // both inside the file
        let entry = Entry {
            dtype: info.kind.name.into(),
            shape: info.shape.clone(),
            bytes: from as usize..to as usize,
        };
        if tensors.insert(info.name.into(), entry).is_some() {
            return Err(fail("is there twice".into()));
        }
    }
    Ok(tensors)
}

struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
    /// Most bytes of the header.
    most: usize,
    /// What is being read.
    item: Option<&'a str>,
}

impl<'a> Reader<'a> {
    fn fail(&self, reason: impl Into<String>) -> Error {
        failed(self.path, self.item, reason)
    }

    /// The next `n` bytes, which must be there.
    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let Some(taken) = usize::try_from(n).ok().and_then(|n| rest.get(..n)) else {
            return Err(self.fail(format!(
                "the header needs {n} bytes at byte {}, of {}: the file is cut short, or its \
                 header lies",
                self.at,
                self.bytes.len()
            )));
        };
        if taken.len() > self.most - self.at {
            return Err(self.fail(format!(
                "a header of more than {} bytes: all headers together may have {MOST_HEADERS}",
                self.most
            )));
        }
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<&'a [u8]> {
        let length = self.u64()?;
        self.take(length)
    }

    /// The name of a key or tensor; `place` is what an error calls one that cannot be read.
    fn name(&mut self, place: &str) -> Result<&'a str> {
        let path = self.path;
        let text = self.text().map_err(|e| match e {
            Error::Checkpoint { reason, .. } => failed(path, Some(place), reason),
            other => other,
        })?;
        std::str::from_utf8(text).map_err(|_| failed(path, Some(place), "its name is no UTF-8"))
    }

    /// A value of a type, inside so many arrays.
    fn value(&mut self, kind: u32, nested: u32) -> Result<Value<'a>> {
        Ok(match kind {
            0 => Value::Whole(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Whole(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Whole(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Whole(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Whole(self.u32()?.into()),
            5 => Value::Whole(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Real(f32::from_le_bytes(self.array()?).into()),
            7 => match self.array()? {
                [byte @ (0 | 1)] => Value::Flag(byte == 1),
                [byte] => return Err(self.fail(format!("expected 0 or 1, got {byte}"))),
            },
            8 => Value::Text(self.text()?),
            9 if nested < MOST_NESTED => {
                let kind = self.u32()?;
                let count = self.u64()?;
                self.skip(kind, count, nested + 1)?;
                Value::Array
            }
            9 => return Err(self.fail(format!("more than {MOST_NESTED} arrays in each other"))),
            10 => Value::Whole(self.u64()?.into()),
            11 => Value::Whole(i64::from_le_bytes(self.array()?).into()),
            12 => Value::Real(f64::from_le_bytes(self.array()?)),
            _ => return Err(self.fail(format!("a value of type {kind}, which is not known"))),
        })
    }

    /// Passes over the elements of an array. Each has a byte at least, so a count that lies ends
    /// with the file.
    fn skip(&mut self, kind: u32, count: u64, nested: u32) -> Result<()> {
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            _ => {
                for _ in 0..count {
                    self.value(kind, nested)?;
                }
                return Ok(());
            }
        };
        let size = count.checked_mul(size);
        let size = size.ok_or_else(|| self.fail(format!("an array of {count} elements")))?;
        self.take(size).map(|_| ())
    }

    fn tensor(&mut self, place: &str) -> Result<Info<'a>> {
        let name = self.name(place)?;
        self.item = Some(name);
        let dimensions = self.u32()?;
        if dimensions > MOST_DIMENSIONS {
            let reason = format!("has {dimensions} dimensions, at most {MOST_DIMENSIONS}");
            return Err(self.fail(reason));
        }
        let mut shape = vec![];
        for _ in 0..dimensions {
            let size = self.u64()?;
            let size = usize::try_from(size).ok().filter(|&n| n <= isize::MAX as usize);
            shape.push(size.ok_or_else(|| self.fail("has a size that is no number of values"))?);
        }
        shape.reverse(); // files have them fastest first
        let id = self.u32()?;
        let kind = types::find(id);
        let kind = kind.ok_or_else(|| self.fail(format!("is of type {id}, which is not known")))?;
        let offset = self.u64()?;
        self.item = None;
        Ok(Info { name, kind, shape, offset })
    }
}
