//! `cargo metadata … | notices PACKAGE`: what is built into a package, with licences and their texts. Reads what cargo says of
//! the target's dependency graph; what only builds (build scripts, macros) is not in the product, and is left out.
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

/// The ids of what is compiled into a package.
fn built_in<'a>(metadata: &'a Value, root: &'a str) -> BTreeSet<&'a str> {
    let nodes: BTreeMap<&str, &Value> =
        items(&metadata["resolve"]["nodes"]).map(|node| (text(node, "id"), node)).collect();
    let is_macro = |id: &str| {
        let package = items(&metadata["packages"]).find(|p| text(p, "id") == id);
        package.is_some_and(|p| {
            items(&p["targets"]).any(|t| items(&t["kind"]).any(|kind| kind == "proc-macro"))
        })
    };
    let (mut found, mut next) = (BTreeSet::new(), vec![root]);
    while let Some(id) = next.pop() {
        if is_macro(id) || !found.insert(id) {
            continue;
        }
        let ordinary = |dep: &&Value| items(&dep["dep_kinds"]).any(|kind| kind["kind"].is_null());
        next.extend(items(&nodes[id]["deps"]).filter(ordinary).map(|dep| text(dep, "pkg")));
    }
    found
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

fn notices(metadata: &Value, name: &str) -> Option<String> {
    let packages = || items(&metadata["packages"]);
    let root = text(packages().find(|p| text(p, "name") == name)?, "id");
    let ids = built_in(metadata, root);
    let mut list = vec![];
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    // What has no source is of this repository.
    for package in packages().filter(|p| ids.contains(text(p, "id")) && p["source"].is_string()) {
        let of = format!("{} {}", text(package, "name"), text(package, "version"));
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
    let name = std::env::args().nth(1).unwrap_or_default();
    let read = serde_json::from_reader(std::io::stdin().lock()).map_err(|e| e.to_string());
    match read.map(|metadata| notices(&metadata, &name)) {
        Ok(Some(text)) => print!("{text}"),
        Ok(None) => fail(&format!("no package {name}, or nothing is built into it")),
        Err(e) => fail(&e),
    }
}

fn fail(why: &str) -> ! {
    eprintln!("notices: {why}");
    std::process::exit(1);
}
