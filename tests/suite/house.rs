//! The layout of the sources, kept by a check: which folder may use which, and how long things are.
use std::collections::BTreeMap;
use std::path::Path;
use testkit::house::{code, folder_of, picture, rank, repository, root, sources, src, used};

/// The arrow that points back, if a file of `folder` with this code has one.
fn arrow_back(folder: &str, code: &str, root: &BTreeMap<String, String>) -> Option<String> {
    let own = rank(folder)?;
    used(code).into_iter().find_map(|name| {
        let of = root.get(&name).unwrap_or(&name);
        rank(of).filter(|&rank| rank > own).map(|_| format!("{folder} uses {of} ({name})"))
    })
}

#[test]
fn arrows_point_one_way() {
    let root = root();
    for path in sources(&src()) {
        let folder = folder_of(&path);
        if folder == "lib" {
            continue;
        }
        assert!(rank(&folder).is_some(), "{folder} is missing from the order of folders");
        if let Some(arrow) = arrow_back(&folder, &code(&path), &root) {
            panic!("{}: {arrow}", path.display());
        }
    }
}

#[test]
fn an_arrow_back_is_seen() {
    let root = BTreeMap::from([("MoeLayer".to_string(), "layer".to_string())]);
    let back = |code| arrow_back("ops", code, &root);
    assert_eq!(back("use crate::plan::{PlanShape, Stats};\nuse crate::{Error, routing};"), None);
    assert!(back("use crate::layer::Batch;").is_some());
    assert!(back("use crate::{Error, plan::{Stats, bits}, MoeLayer};").is_some());
    assert!(back("fn f() -> crate::measure::Profile {}").is_some());
}

/// The picture is of the sources as they are.
#[test]
fn the_picture_of_the_layout_is_current() {
    let committed = std::fs::read_to_string(repository().join("docs/architecture.svg"));
    assert!(
        committed.expect("docs/architecture.svg") == picture(),
        "docs/architecture.svg is stale: run `cargo run -p wgmoe-testkit --bin architecture`"
    );
}

/// Each twin of an op stands in `reference.rs` too.
#[test]
fn every_twin_is_a_reference() {
    let reference = code(&src().join("reference.rs"));
    let mut missing = vec![];
    for path in sources(&src().join("ops")) {
        let code = code(&path);
        let stem = path.file_stem().expect("a stem").to_string_lossy();
        let from = format!("pub use crate::ops::{stem}::");
        let there = reference.split(';').find_map(|item| item.trim().strip_prefix(&from));
        let there: Vec<&str> = there.unwrap_or_default().split([' ', ',', '{', '}']).collect();
        let twins = code.split("\npub fn ").skip(1).filter(|rest| rest.starts_with("cpu"));
        let twins = twins.filter_map(|rest| rest.split(['(', '<']).next());
        missing.extend(twins.filter(|t| !there.contains(t)).map(|twin| format!("{stem}::{twin}")));
    }
    assert!(missing.is_empty(), "missing in src/reference.rs: {missing:?}");

    // Each that is renamed or made here has a row in the table at the head.
    let text = std::fs::read_to_string(src().join("reference.rs")).expect("a text");
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("//! | [`")).collect();
    let word = |rest: &str| rest.split([',', ';', '}', '(', '\n']).next().map(str::to_string);
    let named = reference.split(" as ").skip(1).filter_map(word);
    let made = reference.split("\npub fn ").skip(1).filter_map(word);
    let listed = |name: &String| rows.iter().any(|row| row.contains(&format!("[`{name}`]")));
    let unlisted: Vec<String> = named.chain(made).filter(|name| !listed(name)).collect();
    assert!(unlisted.is_empty(), "no row in the table of src/reference.rs: {unlisted:?}");
}

/// What a change touches, as CONTRIBUTING.md has it: the files are there. `x` is a new one.
#[test]
fn the_files_that_a_change_touches_exist() {
    let text = std::fs::read_to_string(repository().join("CONTRIBUTING.md")).expect("a text");
    let (_, table) = text.split_once("\n## What a change touches\n").expect("the table");
    let (table, _) = table.split_once("\n## ").expect("the next title");
    let names = table.split('`').skip(1).step_by(2).filter(|name| name.contains('/'));
    let mut seen = 0;
    for name in names {
        let path = repository().join(name);
        let stem = path.file_stem().expect("a stem").to_string_lossy().into_owned();
        let new = stem == "x" || stem.ends_with("_x");
        let path = if new { path.parent().expect("a folder") } else { &path };
        assert!(path.exists(), "CONTRIBUTING.md names {name}, which does not exist");
        seen += 1;
    }
    assert!(seen > 20, "only {seen} files found in the table");
}

/// Lines of a file: more need a reason in its first comment that says `Long:`.
const FILE: usize = 500;
/// Lines of a function.
const FUNCTION: usize = 100;

/// Name and lines of each function of some code.
fn functions(code: &str) -> Vec<(String, usize)> {
    let mut found = vec![];
    let lines: Vec<&str> = code.lines().collect();
    for (i, line) in lines.iter().enumerate() {
        let Some(at) = line.find("fn ").filter(|_| !line.trim_end().ends_with(';')) else {
            continue;
        };
        let before = line[..at].trim();
        if !before.is_empty() && !before.ends_with(['b', ')', 't', 'c', 'e']) {
            continue; // no item: `pub`, `pub(..)`, `const`, `async`, `unsafe` or nothing stand before one
        }
        let indent = line.len() - line.trim_start().len();
        let close = format!("{}}}", " ".repeat(indent));
        if let Some(n) = lines[i..].iter().position(|l| l.trim_end() == close) {
            let name = line[at + 3..].split(['(', '<']).next().unwrap_or_default();
            found.push((name.to_string(), n + 1));
        }
    }
    found
}

#[test]
fn files_and_functions_are_short() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut long = vec![];
    for folder in ["src", "bench", "testkit", "studies", "examples", "tests", "benches"] {
        let dir = root.join(folder);
        for path in if dir.is_dir() { sources(&dir) } else { vec![] } {
            let text = std::fs::read_to_string(&path).expect("a source");
            let reason =
                text.lines().take_while(|l| l.starts_with("//")).any(|l| l.contains("Long:"));
            let name = path.strip_prefix(root).expect("inside").display().to_string();
            if text.lines().count() > FILE && !reason {
                long.push(format!("{name}: {} lines", text.lines().count()));
            }
            // A test may be one long table of cases.
            for (function, lines) in functions(&text).into_iter().filter(|_| folder != "tests") {
                if lines > FUNCTION {
                    long.push(format!("{name}: `{function}` has {lines} lines"));
                }
            }
        }
    }
    assert!(long.is_empty(), "longer than {FILE} or {FUNCTION} lines:\n{}", long.join("\n"));
}

#[test]
fn long_functions_are_seen() {
    let body = "        let x = 1;\n".repeat(120);
    let code =
        format!("impl A {{\n    pub fn long(&self) {{\n{body}    }}\n}}\nfn short() {{\n}}\n");
    assert_eq!(functions(&code), [("long".to_string(), 122), ("short".to_string(), 2)]);
}
