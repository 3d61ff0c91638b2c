//! Checkpoints that are not as they should be: an error that names the file, and the tensor or field; never a panic.
use crate::checkpoint::{Layout, plan, small, written};
use std::fs;
use std::path::Path;
use wgmoe::checkpoint::{Checkpoint, Config};
use wgmoe::weights::Projection;
use wgmoe::{Error, Result};

/// Opens it and looks at all of a layer.
fn check(dir: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(dir)?;
    checkpoint.expert_shape(1)?;
    checkpoint.check_layer(1)
}

/// Damages a good checkpoint, and expects an error of this file, about this tensor or field, that says this.
#[track_caller]
fn expect(
    layout: Layout,
    shards: usize,
    damage: impl Fn(&Path),
    file: &str,
    item: Option<&str>,
    says: &str,
) {
    let dir = written(&plan(layout, shards));
    check(dir.path()).expect("good before");
    damage(dir.path());
    match check(dir.path()).expect_err("damaged") {
        Error::Checkpoint { file: path, item: found, reason } => {
            assert_eq!(Path::new(&path), dir.path().join(file), "{reason}");
            assert_eq!(found.as_deref(), item, "{reason}");
            assert!(reason.contains(says), "`{reason}` does not say `{says}`");
        }
        other => panic!("expected an error about a file, got {other}"),
    }
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const UP: &str = "model.layers.1.mlp.experts.3.up_proj.weight";

/// Rewrites a file's header as text.
fn with_header(path: &Path, change: impl Fn(String) -> String) {
    let bytes = fs::read(path).expect("read");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header = change(String::from_utf8(bytes[8..8 + length].to_vec()).expect("text"));
    let new =
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes[8 + length..]].concat();
    fs::write(path, new).expect("written");
}

/// Changes what a header says of a tensor.
fn with_tensor(path: &Path, name: &str, change: impl Fn(&mut serde_json::Value)) {
    with_header(path, |header| {
        let mut json: serde_json::Value = serde_json::from_str(&header).expect("JSON");
        change(&mut json[name]);
        json.to_string()
    });
}

fn each(damage: impl Fn(&Path), item: Option<&str>, says: &str) {
    expect(Layout::Each, 1, |dir| damage(&dir.join(SINGLE)), SINGLE, item, says);
}

#[test]
fn missing_files_and_directories() {
    let one = |damage: &dyn Fn(&Path), file: &str, says: &str| {
        expect(Layout::Each, 1, damage, file, None, says);
    };
    one(&|dir| fs::remove_file(dir.join(SINGLE)).expect("removed"), SINGLE, "");
    one(&|dir| fs::remove_file(dir.join("config.json")).expect("removed"), "config.json", "");
    for file in [SINGLE, "config.json"] {
        let damage = |dir: &Path| {
            fs::remove_file(dir.join(file)).expect("removed");
            fs::create_dir(dir.join(file)).expect("made");
        };
        one(&damage, file, "is a directory");
    }
    assert!(Checkpoint::open("/nonexistent").is_err());
    // A file where the directory should be.
    let dir = written(&plan(Layout::Each, 1));
    assert!(Checkpoint::open(dir.path().join(SINGLE)).is_err());
}

#[test]
fn missing_and_misshapen_tensors() {
    let rename = |path: &Path| with_header(path, |h| h.replace(UP, &UP.replace("up_", "hup_")));
    each(rename, Some(UP), "is missing");
    let [d, f] = [small().hidden, small().intermediate];
    each(
        |path| with_tensor(path, UP, |t| t["shape"] = [d, f].into()),
        Some(UP),
        "has shape [70, 33], expected [33, 70]",
    );
    each(|path| with_tensor(path, UP, |t| t["shape"] = [1, f, d].into()), Some(UP), "has shape");
    each(
        |path| with_tensor(path, UP, |t| t["dtype"] = "I16".into()),
        Some(UP),
        "is I16, expected one of F32, F16, BF16",
    );
    let gate = "model.layers.1.mlp.gate.weight";
    each(|path| with_tensor(path, gate, |t| t["shape"] = [d, 10].into()), Some(gate), "has shape");
    let bias = "model.layers.1.mlp.gate.expert_bias";
    each(|path| with_header(path, |h| h.replace(bias, "b")), Some(bias), "is missing");
    let shared = "model.layers.1.mlp.shared_experts.down_proj.weight";
    each(
        |path| with_tensor(path, shared, |t| t["shape"] = [2 * f, d].into()),
        Some(shared),
        "has shape",
    );
    // Fused: shapes that fit neither way, and that fit two different ways.
    let (gate_up, down) =
        ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj");
    let fused = |damage: &dyn Fn(&Path), item: &str, says: &str| {
        expect(Layout::Fused, 1, |dir| damage(&dir.join(SINGLE)), SINGLE, Some(item), says);
    };
    fused(
        &|path| with_tensor(path, gate_up, |t| t["shape"] = [10, d * 2, f].into()),
        gate_up,
        "has shape [10, 140, 33], expected [10, 66, 70] or [10, 70, 66]",
    );
    fused(
        &|path| with_tensor(path, gate_up, |t| t["shape"] = [10, d, 2 * f].into()),
        down,
        "does not go with",
    );
    fused(&|path| with_tensor(path, down, |t| t["shape"] = [10 * d, f].into()), down, "has shape");
}

#[test]
fn files_cut_short_and_lying_headers() {
    let cut = |to: usize| {
        move |path: &Path| {
            let bytes = fs::read(path).expect("read");
            fs::write(path, &bytes[..to.min(bytes.len() - 1)]).expect("written");
        }
    };
    each(cut(0), None, "too short");
    each(cut(7), None, "too short");
    each(cut(8), None, "cut short");
    each(cut(500), None, "cut short");
    // The last tensor is one byte short.
    each(cut(usize::MAX), Some("model.layers.2.mlp.shared_experts.down_proj.weight"), "cut short");
    each(
        |path| {
            fs::write(path, [&fs::read(path).expect("read")[..], b"x"].concat()).expect("written")
        },
        None,
        "behind the last tensor",
    );
    for length in [u64::MAX, u64::MAX - 7, 1 << 62, 1 << 40, 0, 1] {
        let lie = |path: &Path| {
            let mut bytes = fs::read(path).expect("read");
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            fs::write(path, bytes).expect("written");
        };
        each(lie, None, "header");
    }
    // A header that really is that long; of zeros, which cost nothing where files can be sparse.
    let huge = |path: &Path| {
        let file = fs::File::create(path).expect("made");
        std::io::Write::write_all(&mut &file, &(1u64 << 27).to_le_bytes()).expect("written");
        file.set_len((1 << 27) + 8).expect("grown");
    };
    each(huge, None, "header of 134217728 bytes");
    each(|path| with_header(path, |h| h[1..].to_string()), None, "header");
    each(|path| with_header(path, |_| "[]".into()), None, "header");
    each(
        |path| with_tensor(path, UP, |t| t["dtype"] = "BF17".into()),
        Some(UP),
        "in the header: unknown variant",
    );
    each(|path| with_tensor(path, UP, |t| t["shape"] = "wide".into()), Some(UP), "in the header: ");
    each(|path| with_tensor(path, UP, |t| *t = 5.into()), Some(UP), "in the header: ");
    each(|path| with_header(path, |h| h.replacen('{', "{\"\u{0}", 1)), None, "header");
    each(|path| with_header(path, |_| "[".repeat(100_000)), None, "header");
    let not_utf8 = |path: &Path| {
        let mut bytes = fs::read(path).expect("read");
        bytes[20] = 0xff;
        fs::write(path, bytes).expect("written");
    };
    each(not_utf8, None, "header");

    let offsets = |from: u64, to: u64| {
        move |path: &Path| with_tensor(path, UP, |t| t["data_offsets"] = vec![from, to].into())
    };
    let bytes = u64::from(small().hidden * small().intermediate * 2);
    // Overlapping, running backwards, past the end, past all numbers; whichever tensor is named, one is.
    for (from, to) in [
        (0, bytes),
        (bytes, 0),
        (1 << 40, (1 << 40) + bytes),
        (u64::MAX - bytes, u64::MAX),
        (0, u64::MAX),
        (u64::MAX, 0),
    ] {
        let dir = written(&plan(Layout::Each, 1));
        offsets(from, to)(&dir.path().join(SINGLE));
        let error = check(dir.path()).expect_err("damaged");
        let Error::Checkpoint { file, item: Some(_), reason } = &error else { panic!("{error}") };
        assert!(
            file.ends_with(SINGLE) && reason.contains("lies at bytes"),
            "{from}..{to}: {error}"
        );
    }
    for shape in [
        vec![u64::MAX, u64::MAX],
        vec![1 << 63, 2],
        vec![1 << 32, 1 << 32, 0],
        vec![0, 0],
        vec![],
        vec![u64::MAX],
    ] {
        each(
            |path| with_tensor(path, UP, |t| t["shape"] = shape.clone().into()),
            Some(UP),
            "has 4620 bytes, not those of",
        );
    }
    // Every length together wraps around.
    let wrap = |path: &Path| {
        let part = (u64::MAX / 8) & !1;
        let tensors: Vec<String> = (0..9)
            .map(|i| {
                let from = part.wrapping_mul(i);
                format!(
                    r#""{i}":{{"dtype":"U8","shape":[{part}],"data_offsets":[{from},{}]}}"#,
                    from.wrapping_add(part)
                )
            })
            .collect();
        let header = format!("{{{}}}", tensors.join(","));
        fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat())
            .expect("written");
    };
    each(wrap, Some("0"), "cut short");
    // A tensor twice: the same name in the header, and in two files.
    let dir = written(&plan(Layout::Each, 2));
    let [first, second] =
        [1, 2].map(|i| dir.path().join(format!("model-{i:05}-of-00002.safetensors")));
    fs::copy(first, second).expect("copied");
    let error = check(dir.path()).expect_err("twice").to_string();
    assert!(error.contains("`model.layers.1.mlp.") && error.contains("as well"), "{error}");
}

#[test]
fn bad_indices() {
    let index = |text: &'static [u8], item: Option<&str>, says: &str| {
        expect(
            Layout::Each,
            2,
            |dir| fs::write(dir.join(INDEX), text).expect("written"),
            INDEX,
            item,
            says,
        );
    };
    index(b"", None, "is not JSON");
    index(b"{", None, "is not JSON");
    index(b"\xff\xfe", None, "is not JSON");
    index(b"{\"weight_map\":{\"a\":\"\xff\"}}", None, "is not JSON");
    index(b"[]", Some("weight_map"), "expected an object");
    index(b"{}", Some("weight_map"), "expected an object");
    index(b"{\"weight_map\":3}", Some("weight_map"), "expected an object");
    index(b"{\"weight_map\":{}}", Some("weight_map"), "names no file");
    index(b"{\"weight_map\":{\"t\":7}}", Some("t"), "expected a file's name");
    for name in [
        "../x.safetensors",
        "/etc/passwd",
        "",
        ".",
        "..",
        "a/b",
        "a/",
        "./a",
        "..\\\\x",
        "c:x",
        "a\\u0000",
    ] {
        let text = format!("{{\"weight_map\":{{\"t\":\"{name}\"}}}}");
        let text: &'static [u8] = text.leak().as_bytes();
        index(text, Some("t"), "is not the name of a file beside the index");
    }
    // A file that is missing, or a directory, is named with a tensor that should be in it.
    let second = "model-00002-of-00002.safetensors";
    let dir = written(&plan(Layout::Each, 2));
    let text = fs::read_to_string(dir.path().join(INDEX)).expect("read");
    let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let map = json["weight_map"].as_object().expect("an object");
    let tensor = map.iter().find(|(_, file)| *file == second).expect("it has tensors").0;
    let gone = |dir: &Path| fs::remove_file(dir.join(second)).expect("removed");
    expect(Layout::Each, 2, gone, second, Some(tensor), "");
    let directory = |dir: &Path| {
        fs::remove_file(dir.join(second)).expect("removed");
        fs::create_dir(dir.join(second)).expect("made");
    };
    expect(Layout::Each, 2, directory, second, Some(tensor), "is a directory");
    let empty = |dir: &Path| fs::write(dir.join(second), []).expect("written");
    expect(Layout::Each, 2, empty, second, Some(tensor), "too short");
    // A tensor that no file has, though the index says so.
    let hidden = |dir: &Path| {
        for i in [1, 2] {
            with_header(&dir.join(format!("model-{i:05}-of-00002.safetensors")), |h| {
                h.replace(UP, "x")
            });
        }
    };
    expect(Layout::Each, 2, hidden, INDEX, Some(UP), "is missing");
    let large = |dir: &Path| {
        fs::File::create(dir.join(INDEX)).expect("made").set_len(1 << 26).expect("grown");
    };
    expect(Layout::Each, 2, large, INDEX, None, "at most");
    expect(
        Layout::Each,
        2,
        |dir| {
            fs::remove_file(dir.join(INDEX)).expect("removed");
            fs::create_dir(dir.join(INDEX)).expect("made");
        },
        INDEX,
        None,
        "is a directory",
    );
}

#[test]
fn bad_configs() {
    let raw = |text: &[u8]| Config::from_json(Path::new("dir/config.json"), text);
    for text in
        [&b""[..], b"{", b"\xff", b"{\"hidden_size\":\"\xff\"}", b"[1]", b"null", b"{\"a\":1e999}"]
    {
        let error = raw(text).expect_err("bad").to_string();
        assert!(error.starts_with("dir/config.json: "), "{error}");
    }
    assert!(raw("[".repeat(100_000).as_bytes()).is_err());
    let good = plan(Layout::Each, 1).config().expect("a config");
    let config = |key: &str, value: serde_json::Value| {
        let mut json = good.clone();
        json[key] = value;
        raw(json.to_string().as_bytes())
    };
    assert_eq!(config("unknown", "field".into()).map(|c| c.layer), Ok(small()));
    // A model whose fields have the same names and mean something else.
    assert_eq!(
        config("model_type", "mixtral".into()).expect_err("not known").to_string(),
        "dir/config.json: `model_type`: \"mixtral\" is not known: expected one that begins with llada, sdar, qwen3_moe, \
         qwen3_vl_moe, bailing_moe, deepseek_v3, diffusion_gemma, or no field where the layers are of such a model"
    );
    for known in ["llada2_moe", "llada2_moe_veomni", "lladamoe", "sdar_moe", "qwen3_moe"] {
        assert!(config("model_type", known.into()).is_ok(), "{known}");
    }
    assert_eq!(config("model_type", serde_json::Value::Null).map(|c| c.layer), Ok(small()));
    use serde_json::json;
    let absurd = [
        json!(-1),
        json!(1e30),
        json!(2.5),
        json!("70"),
        json!(u64::MAX),
        json!([1]),
        json!({}),
        json!(true),
    ];
    for key in [
        "hidden_size",
        "moe_intermediate_size",
        "num_experts",
        "num_experts_per_tok",
        "num_hidden_layers",
        "num_shared_experts",
        "n_group",
        "topk_group",
        "first_k_dense_replace",
    ] {
        for value in &absurd {
            let error = config(key, value.clone()).expect_err(key).to_string();
            assert!(error.contains(&format!("config.json: `{key}`: expected")), "{error}");
        }
    }
    for key in [
        "hidden_size",
        "moe_intermediate_size",
        "num_experts",
        "num_experts_per_tok",
        "num_hidden_layers",
    ] {
        for (value, says) in [(json!(0), "must not be 0"), (json!(null), "is missing")] {
            let error = config(key, value).expect_err(key).to_string();
            assert!(error.contains(&format!("`{key}`: {says}")), "{error}");
        }
    }
    for (key, value) in [
        ("hidden_size", json!(u32::MAX)),
        ("moe_intermediate_size", json!(u32::MAX)),
        ("num_experts", json!(100_000)),
        ("num_shared_experts", json!(u32::MAX)),
        ("routed_scaling_factor", json!("x")),
        ("routed_scaling_factor", json!(1e300)),
        ("norm_topk_prob", json!(1)),
        ("score_function", json!("tanh")),
        ("score_function", json!(1)),
        ("moe_router_enable_expert_bias", json!("yes")),
        ("hidden_act", json!("gelu")),
        ("mlp_only_layers", json!(["x"])),
        ("mlp_only_layers", json!(3)),
        ("decoder_sparse_step", json!(0)),
        ("moe_layer_freq", json!([2])),
        ("moe_layer_freq", json!("x")),
        ("expert_capacity", json!(-1)),
        ("block_size", json!("x")),
    ] {
        let error = config(key, value.clone()).expect_err(key).to_string();
        assert!(error.contains(&format!("config.json: `{key}`: ")), "{value}: {error}");
    }
    // Each is possible, together they are not.
    for (key, value) in [
        ("num_experts_per_tok", 11),
        ("n_group", 3),
        ("topk_group", 6),
        ("num_experts", 2),
        ("expert_capacity", 11),
    ] {
        let error = config(key, value.into()).expect_err(key).to_string();
        assert!(error.starts_with("dir/config.json: "), "{error}");
    }
    let mut without = good.clone();
    without.as_object_mut().expect("an object").remove("topk_group");
    let error = raw(without.to_string().as_bytes()).expect_err("groups of how many").to_string();
    assert!(error.contains("`topk_group`: is missing"), "{error}");
    let mut size = good.clone();
    size["num_shared_experts"] = json!(null);
    size["shared_expert_intermediate_size"] = json!(34);
    let error = raw(size.to_string().as_bytes()).expect_err("no multiple of F").to_string();
    assert!(error.contains("`shared_expert_intermediate_size`: 34"), "{error}");
}

/// Sizes that a `config.json` may have and the files do not: found before anything is made of them.
#[test]
fn configs_that_do_not_fit_the_files() {
    for (key, value) in [
        ("hidden_size", 1 << 20),
        ("moe_intermediate_size", 1 << 20),
        ("num_experts", 1024),
        ("num_shared_experts", 1024),
    ] {
        let dir = written(&plan(Layout::Stacked, 1));
        let path = dir.path().join("config.json");
        let mut json: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).expect("read")).expect("JSON");
        json[key] = value.into();
        json["n_group"] = 1.into();
        fs::write(path, json.to_string()).expect("written");
        let error = check(dir.path()).expect_err(key);
        let Error::Checkpoint { file, item: Some(_), reason } = &error else { panic!("{error}") };
        assert!(file.ends_with(SINGLE) && reason.contains("has shape"), "{key}: {error}");
    }
}

#[test]
fn layers_and_experts_that_are_not_there() {
    let dir = written(&plan(Layout::Each, 1));
    let checkpoint = Checkpoint::open(dir.path()).expect("opened");
    let says = |error: Error| error.to_string();
    for (layer, reason) in
        [(0, "`layer`: 0 is dense"), (3, "`layer`: 3 of 3"), (u32::MAX, "`layer`: 4294967295 of 3")]
    {
        for error in [
            checkpoint.check_layer(layer).map_err(says),
            checkpoint.router(layer).map(|_| ()).map_err(says),
            checkpoint.bias(layer).map(|_| ()).map_err(says),
            checkpoint.expert_shape(layer).map(|_| ()).map_err(says),
            checkpoint.expert(layer, 0, Projection::Up).map(|_| ()).map_err(says),
        ] {
            let error = error.expect_err("no such layer");
            assert!(error.contains("config.json: ") && error.contains(reason), "{error}");
        }
    }
    for expert in [12, 13, u32::MAX] {
        for projection in Projection::ALL {
            assert!(checkpoint.expert(1, expert, projection).is_err());
        }
    }
}
