//! GGUF files that are not as they should be: an error that names the file, and the tensor or key;
//! never a panic.
use crate::checkpoint::{Layout, plan};
use crate::gguf::written_gguf;
use std::fs;
use std::path::Path;
use testkit::gguf::{Header, Info, Value, string};
use wgmoe::checkpoint::Checkpoint;
use wgmoe::weights::Projection;
use wgmoe::{Error, Result, WeightType};

const UP: &str = "blk.0.ffn_up_exps.weight";
const ARCH: &str = "general.architecture";

/// A header, and what lies behind it and its padding.
#[derive(Clone)]
struct File {
    header: Header,
    alignment: usize,
    data: Vec<u8>,
}

impl File {
    /// One layer of two experts, D = 32, F = 64, in f32.
    fn good() -> Self {
        let key = |key: &str, n| (format!("qwen3moe.{key}"), Value::U32(n));
        let values = vec![
            (ARCH.into(), Value::Text("qwen3moe".into())),
            key("block_count", 1),
            key("embedding_length", 32),
            key("expert_feed_forward_length", 64),
            key("expert_count", 2),
            key("expert_used_count", 1),
        ];
        let mut file =
            Self { header: Header { values, ..Header::default() }, alignment: 32, data: vec![] };
        file.add("blk.0.ffn_gate_inp.weight", &[32, 2]);
        file.add("blk.0.ffn_gate_exps.weight", &[32, 64, 2]);
        file.add(UP, &[32, 64, 2]);
        file.add("blk.0.ffn_down_exps.weight", &[64, 32, 2]);
        file
    }

    fn add(&mut self, name: &str, shape: &[u64]) {
        let offset = self.data.len() as u64;
        let (name, shape) = (name.to_string(), shape.to_vec());
        self.data.resize(self.data.len() + shape.iter().product::<u64>() as usize * 4, 0);
        self.header.tensors.push(Info { name, shape, kind: 0, offset });
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header.bytes();
        bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
        bytes.extend(&self.data);
        bytes
    }

    fn up(&mut self) -> &mut Info {
        &mut self.header.tensors[2]
    }

    fn set(&mut self, key: &str, value: Value) {
        match self.header.values.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.header.values.push((key.into(), value)),
        }
    }
}

/// Opens it and looks at all of its layer.
fn check(path: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    checkpoint.check_layer(0)?;
    checkpoint.expert_shape(0).map(|_| ())
}

fn check_bytes(bytes: &[u8]) -> Result<()> {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("model.gguf");
    fs::write(&path, bytes).expect("written");
    check(&path)
}

/// Expects an error of the file, about this item, that says this.
#[track_caller]
fn expect_bytes(bytes: &[u8], item: Option<&str>, says: &str) {
    match check_bytes(bytes).expect_err("damaged") {
        Error::Checkpoint { file, item: found, reason } => {
            assert!(file.ends_with("model.gguf"), "{file}");
            assert_eq!(found.as_deref(), item, "{reason}");
            assert!(reason.contains(says), "`{reason}` does not say `{says}`");
        }
        other => panic!("expected an error about a file, got {other}"),
    }
}

#[track_caller]
fn expect(damage: impl FnOnce(&mut File), item: Option<&str>, says: &str) {
    let mut file = File::good();
    damage(&mut file);
    expect_bytes(&file.bytes(), item, says);
}

#[test]
fn the_file_is_good_before() {
    check_bytes(&File::good().bytes()).expect("good");
    // An older version, the same layout; an array of arrays; a key that nothing reads.
    let mut file = File::good();
    file.header.version = 2;
    let strings = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &string(b"a"), &string(b"")];
    let array = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &strings.concat()].concat();
    file.set("a.b", Value::Raw(9, array));
    file.set("a.c", Value::Raw(12, 1f64.to_le_bytes().to_vec()));
    // Sizes before there was a key for them.
    file.header.values.retain(|(key, _)| key != "qwen3moe.expert_feed_forward_length");
    file.set("qwen3moe.feed_forward_length", Value::U32(64));
    check_bytes(&file.bytes()).expect("good");
    // The last tensor's padding may be missing; more may follow.
    let mut file = File::good();
    file.header.tensors[3].name = "x".into();
    file.add("blk.0.ffn_down_exps.weight", &[64, 32, 2]);
    file.add("y", &[1]);
    check_bytes(&file.bytes()).expect("good");
    // Larger alignments.
    let mut file = File::good();
    file.alignment = 4096;
    file.set("general.alignment", Value::U32(4096));
    file.data.clear();
    for (i, tensor) in file.header.tensors.iter_mut().enumerate() {
        tensor.offset = [0, 4096, 20480, 36864][i];
    }
    file.data.resize(36864 + 16384, 0);
    check_bytes(&file.bytes()).expect("good");
}

#[test]
fn no_gguf_files() {
    expect_bytes(b"", None, "cut short");
    expect_bytes(b"GGU", None, "cut short");
    expect_bytes(b"GGUF\x03\0\0", None, "cut short");
    expect_bytes(b"GGML\x03\0\0\0", None, "is no GGUF file");
    expect(|f| f.header.version = 1, None, "is GGUF version 1, expected 2 or 3");
    expect(|f| f.header.version = 4, None, "is GGUF version 4");
    expect(|f| f.header.version = 0, None, "is GGUF version 0");
    expect(|f| f.header.version = 3u32.swap_bytes(), None, "is big-endian");
    let dir = tempfile::tempdir().expect("a folder");
    for path in [dir.path().to_path_buf(), dir.path().join("model.gguf")] {
        // Nothing there, or an empty directory: as for safetensors.
        let error = check(&path).expect_err("nothing there").to_string();
        assert!(error.contains("config.json"), "{error}");
    }
    // Several files: none is better than another.
    for name in ["a.gguf", "b.gguf"] {
        fs::write(dir.path().join(name), File::good().bytes()).expect("written");
    }
    let error = check(dir.path()).expect_err("two").to_string();
    assert!(error.contains("several GGUF files, a.gguf and b.gguf"), "{error}");
    fs::remove_file(dir.path().join("b.gguf")).expect("removed");
    check(dir.path()).expect("the only one");
}

/// Cut at every byte of its header, and at some behind it.
#[test]
fn cut_short_anywhere() {
    let file = File::good();
    let bytes = file.bytes();
    let header = bytes.len() - file.data.len();
    for to in (0..header).chain([header, header + 1, bytes.len() / 2, bytes.len() - 1]) {
        let error = check_bytes(&bytes[..to]).expect_err("cut short").to_string();
        assert!(error.contains("cut short"), "{to}: {error}");
    }
    expect_bytes(&bytes[..bytes.len() - 1], Some("blk.0.ffn_down_exps.weight"), "has 16384 bytes");
}

#[test]
fn counts_and_lengths_that_lie() {
    for count in [u64::MAX, 1 << 63, 1 << 40, 100] {
        let mut file = File::good();
        file.header.counts = Some([4, count]);
        let error = check_bytes(&file.bytes()).expect_err("lies");
        assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
        let mut file = File::good();
        file.header.counts = Some([count, 6]);
        // Without padding, which would be read as a tensor.
        expect_bytes(&file.header.bytes(), Some(&format!("tensor 4 of {count}")), "cut short");
    }
    let array = |kind: u32, count: u64| {
        Value::Raw(9, [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat())
    };
    for count in [u64::MAX, 1 << 61, 1 << 40, 1 << 20] {
        for kind in 0..13 {
            let mut file = File::good();
            file.header.values.insert(0, ("a.b".into(), array(kind, count)));
            let error = check_bytes(&file.bytes()).expect_err("lies").to_string();
            assert!(error.contains("`a.b`: "), "{kind}, {count}: {error}");
        }
        let text = Value::Raw(8, count.to_le_bytes().to_vec());
        expect(|f| f.set(ARCH, text), Some(ARCH), "cut short");
    }
    // A key of this length: nothing has a name yet.
    let mut bytes = File::good().bytes();
    bytes[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
    expect_bytes(&bytes, Some("key 0 of 6"), "needs 18446744073709551615 bytes");
    // Arrays in arrays, deeper than any file has.
    let mut deep = vec![];
    for _ in 0..100_000 {
        deep.extend([&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat());
    }
    expect(|f| f.set("a.b", Value::Raw(9, deep)), Some("a.b"), "arrays in each other");
    // A header that really is that long; of zeros, which cost nothing where files can be sparse.
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("model.gguf");
    let mut file = File::good();
    let long = [&0u32.to_le_bytes()[..], &(1u64 << 27).to_le_bytes()].concat();
    file.header.values = vec![("a.b".into(), Value::Raw(9, long))];
    file.header.tensors.clear();
    fs::write(&path, file.header.bytes()).expect("written");
    let sparse = fs::OpenOptions::new().write(true).open(&path).expect("opened");
    sparse.set_len(1 << 28).expect("grown");
    let error = check(&path).expect_err("too long").to_string();
    assert!(error.contains("`a.b`: a header of more than 67108864 bytes"), "{error}");
}

#[test]
fn bad_keys() {
    expect(|f| f.set("a.b", Value::Raw(13, vec![])), Some("a.b"), "of type 13");
    expect(|f| f.set("a.b", Value::Raw(u32::MAX, vec![])), Some("a.b"), "not known");
    expect(|f| f.set("a.b", Value::Raw(7, vec![2])), Some("a.b"), "expected 0 or 1, got 2");
    let twice = |f: &mut File| f.header.values.push((ARCH.into(), Value::U32(1)));
    expect(twice, Some(ARCH), "is there twice");
    let mut bytes = File::good().bytes();
    bytes[32] = 0xff;
    expect_bytes(&bytes, Some("key 0 of 6"), "no UTF-8");
    for n in [0, 3, 33] {
        let set = |f: &mut File| f.set("general.alignment", Value::U32(n));
        expect(set, Some("general.alignment"), "expected a power of two");
    }
    let set = |f: &mut File| f.set("general.alignment", Value::F32(32.0));
    expect(set, Some("general.alignment"), "expected a whole number");
    let set = |f: &mut File| f.set("general.alignment", Value::I32(-32));
    expect(set, Some("general.alignment"), "expected a power of two");
}

#[test]
fn bad_tensors() {
    expect(|f| f.up().kind = 4, Some(UP), "is of type 4, which is not known");
    expect(|f| f.up().kind = u32::MAX, Some(UP), "not known");
    // A type that is not computed with, and one of whose blocks a row is no whole number.
    let q5 = |f: &mut File| {
        f.up().kind = 6;
        for tensor in 3..4 {
            f.header.tensors[tensor].offset = 256 + 16384 + 2816;
        }
    };
    expect(q5, Some(UP), "is Q5_0, expected one of F32, F16, BF16, Q8_0");
    expect(|f| f.up().kind = 14, Some(UP), "has rows of 32 values, no whole blocks of 256 of Q6_K");
    for shape in [vec![1 << 40, 1 << 40], vec![1 << 62, 8], vec![i64::MAX as u64, 3, 3, 3]] {
        expect(|f| f.up().shape = shape, Some(UP), "overflow");
    }
    expect(|f| f.up().shape = vec![u64::MAX, 1], Some(UP), "no number of values");
    expect(|f| f.up().shape = vec![1; 5], Some(UP), "has 5 dimensions, at most 4");
    expect(|f| f.up().shape = vec![1; 5], Some(UP), "has 5 dimensions");
    // As many bytes, another shape: outermost first, as for safetensors.
    let reason = "has shape [2, 32, 64], expected [2, 64, 32]";
    expect(|f| f.up().shape = vec![64, 32, 2], Some(UP), reason);
    expect(|f| f.up().shape = vec![32, 128], Some(UP), "has shape [128, 32]");
    // Overlapping, with a gap, past the end, past all numbers.
    expect(|f| f.up().offset = 0, Some(UP), "begins at byte 0, expected 16640");
    expect(|f| f.up().offset += 32, Some(UP), "begins at byte 16672, expected 16640");
    expect(|f| f.up().offset += 16, Some(UP), "no multiple of 32");
    for offset in [1 << 20, 1 << 40, 1 << 63, u64::MAX - 31] {
        expect(|f| f.up().offset = offset, Some(UP), "cut short");
    }
    let other = "blk.0.ffn_gate_exps.weight";
    expect(|f| f.up().name = other.into(), Some(other), "is there twice");
    for (at, name) in [
        (0, "blk.0.ffn_gate_inp.weight"),
        (1, "blk.0.ffn_gate_exps.weight"),
        (2, UP),
        (3, "blk.0.ffn_down_exps.weight"),
    ] {
        expect(|f| f.header.tensors[at].name = "x".into(), Some(name), "is missing");
    }
}

/// Blocks of two shared experts' width that none of the two has a whole number of.
#[test]
fn shared_experts_that_cut_blocks() {
    let mut plan = plan(Layout::Each, 1);
    [plan.config.hidden, plan.config.intermediate] = [256, 128];
    let (_dir, path) = written_gguf(&plan, WeightType::Q8_0);
    let good = Checkpoint::open(path).and_then(|c| c.check_layer(1));
    good.expect("whole blocks of 32");
    // The routed experts' own rows would be refused first: only the shared ones' say Q4_K.
    let mut file = File::good();
    file.set("qwen3moe.expert_shared_count", Value::U32(4));
    let mut add = |name: &str, shape: [u64; 2], kind, bytes: usize| {
        let offset = file.data.len() as u64;
        file.data.resize(file.data.len() + bytes, 0);
        let (name, shape) = (format!("blk.0.ffn_{name}_shexp.weight"), shape.to_vec());
        file.header.tensors.push(Info { name, shape, kind, offset });
    };
    add("gate", [32, 256], 0, 32 * 256 * 4);
    add("up", [32, 256], 0, 32 * 256 * 4);
    add("down", [256, 32], 12, 32 * 144);
    let says = "is Q4_K: the 64 of 256 values of a row that are one shared expert's";
    expect_bytes(&file.bytes(), Some("blk.0.ffn_down_shexp.weight"), says);
}

#[test]
fn metadata_that_makes_no_model() {
    expect(|f| f.header.values.clear(), Some(ARCH), "is missing");
    expect(|f| f.set(ARCH, Value::U32(1)), Some(ARCH), "expected a string");
    let reason = "\"llama\" is not known: expected one of bailingmoe2, llada-moe, qwen3moe";
    expect(|f| f.set(ARCH, Value::Text("llama".into())), Some(ARCH), reason);
    let array = [&4u32.to_le_bytes()[..], &1u64.to_le_bytes(), &2u32.to_le_bytes()].concat();
    for name in [
        "block_count",
        "embedding_length",
        "expert_feed_forward_length",
        "expert_count",
        "expert_used_count",
        "expert_shared_count",
        "expert_group_count",
        "expert_group_used_count",
        "expert_gating_func",
        "leading_dense_block_count",
        "nextn_predict_layers",
    ] {
        let key = format!("qwen3moe.{name}");
        for value in [
            Value::I32(-1),
            Value::F32(2.0),
            Value::Bool(true),
            Value::Text("2".into()),
            Value::Raw(9, array.clone()),
            Value::Raw(10, u64::MAX.to_le_bytes().to_vec()),
        ] {
            expect(|f| f.set(&key, value), Some(&key), "expected a whole number");
        }
    }
    for name in ["block_count", "embedding_length", "expert_count", "expert_used_count"] {
        let key = format!("qwen3moe.{name}");
        expect(|f| f.set(&key, Value::U32(0)), Some(&key), "must not be 0");
        expect(|f| f.header.values.retain(|(k, _)| *k != key), Some(&key), "is missing");
    }
    for (name, value, says) in [
        ("expert_gating_func", Value::U32(3), "expected 1 (softmax) or 2 (sigmoid), got 3"),
        ("expert_weights_norm", Value::U32(1), "expected true or false"),
        ("expert_weights_scale", Value::U32(1), "expected a finite number"),
        ("expert_weights_scale", Value::F32(f32::NAN), "expected a finite number"),
        ("nextn_predict_layers", Value::U32(1), "1 of 1 layers"),
        ("expert_count", Value::U32(100_000), "expected a whole number up to"),
        ("expert_feed_forward_length", Value::U32(0), "must not be 0"),
    ] {
        let key = format!("qwen3moe.{name}");
        expect(|f| f.set(&key, value), Some(&key), says);
    }
    let shared = |width| {
        move |f: &mut File| {
            f.set("qwen3moe.expert_shared_count", Value::U32(1));
            f.set("qwen3moe.expert_shared_feed_forward_length", Value::U32(width));
        }
    };
    let key = "qwen3moe.expert_shared_feed_forward_length";
    expect(shared(65), Some(key), "65 is no multiple of the experts' 64");
    expect(shared(1 << 20), Some(key), "16384 experts' size");
    let gate = "blk.0.ffn_gate_shexp.weight";
    expect(shared(64), Some(gate), "is missing");
    let groups = |f: &mut File| f.set("qwen3moe.expert_group_count", Value::U32(2));
    expect(groups, Some("qwen3moe.expert_group_used_count"), "is missing, with groups");
    // Each is possible, together they are not.
    expect(|f| f.set("qwen3moe.expert_used_count", Value::U32(3)), None, "");
    // Sizes that the file's tensors do not have.
    for (name, n) in [("embedding_length", 64), ("expert_count", 1024)] {
        let set = |f: &mut File| f.set(&format!("qwen3moe.{name}"), Value::U32(n));
        expect(set, Some("blk.0.ffn_gate_inp.weight"), "has shape");
    }
    // Where the score is not said, and where the architecture wants it.
    let bailing = |f: &mut File| {
        for (key, _) in &mut f.header.values {
            *key = key.replace("qwen3moe", "bailingmoe2");
        }
        f.set(ARCH, Value::Text("bailingmoe2".into()));
    };
    expect(bailing, Some("bailingmoe2.expert_gating_func"), "is missing");
}

#[test]
fn layers_that_are_not_there() {
    let (_dir, path) = written_gguf(&plan(Layout::Each, 1), WeightType::F16);
    let checkpoint = Checkpoint::open(path).expect("opened");
    for (layer, reason) in [(0, "`layer`: 0 is dense"), (3, "`layer`: 3 of 3")] {
        let error = checkpoint.check_layer(layer).expect_err("no such layer").to_string();
        assert!(error.contains("model.gguf: ") && error.contains(reason), "{error}");
    }
    assert!(checkpoint.expert(1, 12, Projection::Up).is_err());
}

/// Damages one of three parts.
#[track_caller]
fn parts(damage: impl FnOnce(&Path), file: &str, item: Option<&str>, says: &str) {
    let (dir, path) = written_gguf(&plan(Layout::Each, 3), WeightType::F16);
    Checkpoint::open(&path).and_then(|c| c.check_layer(1)).expect("good before");
    damage(dir.path());
    let opened = Checkpoint::open(dir.path().join(file_to_open(dir.path())));
    match opened.and_then(|c| c.check_layer(1)).expect_err("damaged") {
        Error::Checkpoint { file: path, item: found, reason } => {
            assert!(path.ends_with(file), "{path}: {reason}");
            assert_eq!(found.as_deref(), item, "{reason}");
            assert!(reason.contains(says), "`{reason}` does not say `{says}`");
        }
        other => panic!("expected an error about a file, got {other}"),
    }
}

/// The first part, or what it is called now.
fn file_to_open(dir: &Path) -> &'static str {
    let names = [PART[0], "renamed.gguf", PART[1]];
    names.into_iter().find(|name| dir.join(name).exists()).expect("a file")
}

const PART: [&str; 3] =
    ["model-00001-of-00003.gguf", "model-00002-of-00003.gguf", "model-00003-of-00003.gguf"];

#[test]
fn parts_that_do_not_fit() {
    let gone = |dir: &Path| fs::remove_file(dir.join(PART[1])).expect("removed");
    parts(gone, PART[1], Some("part 2 of 3"), "");
    let directory = |dir: &Path| {
        fs::remove_file(dir.join(PART[2])).expect("removed");
        fs::create_dir(dir.join(PART[2])).expect("made");
    };
    parts(directory, PART[2], Some("part 3 of 3"), "is a directory");
    let empty = |dir: &Path| fs::write(dir.join(PART[1]), []).expect("written");
    parts(empty, PART[1], None, "cut short");
    let again = |dir: &Path| {
        fs::copy(dir.join(PART[1]), dir.join(PART[2])).expect("copied");
    };
    parts(again, PART[2], Some("split.no"), "1, expected 2");
    let first_again = |dir: &Path| {
        fs::copy(dir.join(PART[0]), dir.join(PART[1])).expect("copied");
    };
    parts(first_again, PART[1], Some("split.no"), "0, expected 1");
    let renamed = |dir: &Path| {
        fs::rename(dir.join(PART[0]), dir.join("renamed.gguf")).expect("renamed");
    };
    let reason = "part 1 of 3, expected a file of name NAME-00001-of-00003.gguf";
    parts(renamed, "renamed.gguf", Some("split.no"), reason);
    let second = |dir: &Path| fs::remove_file(dir.join(PART[0])).expect("removed");
    let reason = "part 2 of 3: open the first, model-00001-of-00003.gguf";
    parts(second, PART[1], Some("split.no"), reason);
    // Numbers of a first part alone.
    for (key, value, says) in [
        ("split.count", Value::U16(5000), "5000 parts, at most 4096"),
        ("split.count", Value::I32(-1), "expected a number"),
        ("split.count", Value::Text("2".into()), "expected a number"),
        ("split.tensors.count", Value::I32(5), "5, but there are 4"),
        ("split.tensors.count", Value::Bool(true), "expected a number"),
    ] {
        expect(|f| f.set(key, value), Some(key), says);
    }
    // The same tensor in two parts.
    let dir = tempfile::tempdir().expect("a folder");
    for i in 0..2u16 {
        let mut file = File::good();
        file.set("split.no", Value::U16(i));
        file.set("split.count", Value::U16(2));
        let name = format!("m-{:05}-of-00002.gguf", i + 1);
        fs::write(dir.path().join(name), file.bytes()).expect("written");
    }
    let error = check(dir.path()).expect_err("twice").to_string();
    assert!(error.contains("`blk.0.") && error.contains("as well"), "{error}");
}
