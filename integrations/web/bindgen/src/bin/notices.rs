//! `cargo metadata … | notices TREE`: what is built into a package, with licences and their texts. TREE is a file of what
//! `cargo tree --prefix none` says is: a name and a version a line. What only builds (build scripts, macros) is to be left out.
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// How the file begins.
const HEAD: &str = "\
What is built into the WebAssembly of this page, besides wgmoe itself (LICENSE-MIT or LICENSE-APACHE).

Rust's standard library, https://github.com/rust-lang/rust: MIT OR Apache-2.0.
";

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The licence files of a package.
fn licences(manifest: &str) -> Vec<String> {
    let starts = ["licen", "copying", "notice", "unlicense", "copyright"];
    let folder = Path::new(manifest).parent().and_then(|folder| std::fs::read_dir(folder).ok());
    let mut files: Vec<_> = folder.into_iter().flatten().flatten().map(|f| f.path()).collect();
    files.sort();
    let named = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        starts.iter().any(|start| name.starts_with(start))
    };
    files.iter().filter(|p| named(p)).filter_map(|p| std::fs::read_to_string(p).ok()).collect()
}

fn notices(metadata: &Value, tree: &str) -> Option<String> {
    // `name v1.2.3`, and more behind.
    let built_in: BTreeSet<String> = tree
        .lines()
        .filter_map(|line| line.split_once(" v"))
        .map(|(name, rest)| format!("{name} {}", rest.split(' ').next().unwrap_or_default()))
        .collect();
    let mut list = vec![];
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    // What has no source is of this repository.
    for package in items(&metadata["packages"]).filter(|p| p["source"].is_string()) {
        let of = format!("{} {}", text(package, "name"), text(package, "version"));
        if !built_in.contains(&of) {
            continue;
        }
        let found = licences(text(package, "manifest_path"));
        let without = if found.is_empty() { " (no text in its package)" } else { "" };
        list.push(format!(
            "{of}, {}: {}{without}",
            text(package, "repository"),
            text(package, "license")
        ));
        for licence in found {
            // The same words, however their lines are broken.
            let words: Vec<&str> = licence.split_whitespace().collect();
            let same = texts.keys().find(|t| t.split_whitespace().eq(words.iter().copied()));
            let key = same.cloned().unwrap_or(licence);
            texts.entry(key).or_default().push(of.clone());
        }
    }
    list.sort();
    let rule = "-".repeat(100);
    let mut all = format!("{HEAD}{}\n", list.join("\n"));
    for (licence, of) in texts {
        all += &format!("\n{rule}\n{}:\n\n{}\n", of.join(", "), licence.trim_end());
    }
    (!list.is_empty()).then_some(all)
}

fn main() {
    let tree = std::env::args().nth(1).unwrap_or_default();
    let tree = std::fs::read_to_string(&tree).map_err(|e| format!("{tree}: {e}"));
    let metadata = serde_json::from_reader(std::io::stdin().lock()).map_err(|e| e.to_string());
    match tree.and_then(|tree| Ok(notices(&metadata?, &tree))) {
        Ok(Some(text)) => print!("{text}"),
        Ok(None) => fail("nothing is built in"),
        Err(e) => fail(&e),
    }
}

fn fail(why: &str) -> ! {
    eprintln!("notices: {why}");
    std::process::exit(1);
}
