//! The layout of the sources, kept by a check: which folder may use which, and how long things are.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Folders and files of `src`, each of which uses only itself and those before it.
const ORDER: [&str; 13] = [
    "error",
    "routing",
    "plan",
    "report",
    "device",
    "weights",
    "ops",
    "layer",
    "reference",
    "models",
    "headless",
    "checkpoint",
    "measure",
];

fn rank(folder: &str) -> Option<usize> {
    ORDER.iter().position(|&name| name == folder)
}

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut files = vec![];
    for entry in std::fs::read_dir(dir).expect("a folder of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files
}

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The code of a file, without comments.
fn code(path: &Path) -> String {
    let text = std::fs::read_to_string(path).expect("a source");
    // Unit tests may look at what comes after.
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// The names that the paths `crate::...` of some code begin with, those of `crate::{a, b::{c}}` apart.
fn used(code: &str) -> Vec<String> {
    let word = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut names = vec![];
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let Some(group) = rest.strip_prefix('{') else {
            names.push(word(rest));
            continue;
        };
        let mut depth = 0;
        let mut start = 0;
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => {
                    names.push(word(&group[start..i]));
                    break;
                }
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    names.push(word(&group[start..i]));
                    start = i + 1;
                }
                _ => {}
            }
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// Which folder the names at the root of the crate come from: `pub use folder::{...}` in `lib.rs`.
fn root() -> BTreeMap<String, String> {
    let lib = code(&src().join("lib.rs"));
    let mut root = BTreeMap::new();
    for item in lib.split(';').filter_map(|item| item.trim().strip_prefix("pub use ")) {
        let (folder, names) = item.split_once("::").unwrap_or((item, item));
        for name in names.split([',', '{', '}', ':']).map(str::trim) {
            root.insert(name.to_string(), folder.to_string());
        }
    }
    root
}

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
        let inside = path.strip_prefix(src()).expect("inside");
        let folder = inside.iter().next().expect("a part").to_str().expect("a name");
        let folder = folder.trim_end_matches(".rs");
        if folder == "lib" {
            continue;
        }
        assert!(rank(folder).is_some(), "{folder} is missing from the order of folders");
        if let Some(arrow) = arrow_back(folder, &code(&path), &root) {
            panic!("{}: {arrow}", inside.display());
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
