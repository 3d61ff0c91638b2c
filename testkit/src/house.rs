//! How the sources of the library are laid out, read from them: which folder uses which. The test
//! of the layout and the picture `docs/architecture.svg` are made of this.
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Folders and files of `src`, each of which uses only itself and those before it.
pub const ORDER: [&str; 13] = [
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

/// Place in [`ORDER`].
pub fn rank(folder: &str) -> Option<usize> {
    ORDER.iter().position(|&name| name == folder)
}

/// The root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The sources of the library.
pub fn src() -> PathBuf {
    repository().join("src")
}

/// All Rust files below a folder.
pub fn sources(dir: &Path) -> Vec<PathBuf> {
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

/// The folder of `src` that a file of it belongs to, or its own name without `.rs`.
pub fn folder_of(path: &Path) -> String {
    let inside = path.strip_prefix(src()).expect("a file of src");
    let first = inside.iter().next().expect("a part").to_str().expect("a name");
    first.trim_end_matches(".rs").into()
}

/// The code of a file, without comments.
pub fn code(path: &Path) -> String {
    let text = std::fs::read_to_string(path).expect("a source");
    // Unit tests may look at what comes after.
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// The names that the paths `crate::...` of some code begin with, those of `crate::{a, b::{c}}`
/// apart.
pub fn used(code: &str) -> Vec<String> {
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
pub fn root() -> BTreeMap<String, String> {
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

/// The other folders that each folder uses, by their places in [`ORDER`].
fn uses() -> Vec<BTreeSet<usize>> {
    let root = root();
    let mut uses = vec![BTreeSet::new(); ORDER.len()];
    for path in sources(&src()) {
        let Some(own) = rank(&folder_of(&path)) else { continue };
        let of = used(&code(&path));
        let of = of.iter().filter_map(|name| rank(root.get(name).unwrap_or(name)));
        uses[own].extend(of.filter(|&other| other != own));
    }
    uses
}

/// Those of `uses` that do not follow from others: a folder that is used through another one needs
/// no arrow of its own.
fn direct(uses: &[BTreeSet<usize>]) -> Vec<(usize, usize)> {
    // Whoever is used comes before.
    let mut reach: Vec<BTreeSet<usize>> = vec![];
    for of in uses {
        let all = of.iter().flat_map(|&o| reach.get(o).into_iter().flatten().copied());
        reach.push(all.chain(of.iter().copied()).collect());
    }
    let mut arrows = vec![];
    for (from, of) in uses.iter().enumerate() {
        for &to in of {
            let through = |&other: &usize| other != to && reach[other].contains(&to);
            if !of.iter().any(through) {
                arrows.push((from, to));
            }
        }
    }
    arrows
}

/// What a folder holds: the first sentence of its documentation, which must fit one line.
fn summary(folder: &str) -> String {
    let file = [format!("{folder}.rs"), format!("{folder}/mod.rs")];
    let path = file.iter().map(|f| src().join(f)).find(|p| p.is_file()).expect("a module");
    let text = std::fs::read_to_string(path).expect("a source");
    let lines = text.lines().map_while(|line| line.strip_prefix("//!"));
    let first: Vec<&str> = lines.map(str::trim).take_while(|line| !line.is_empty()).collect();
    let first = first.join(" ").replace('`', "");
    let sentence = first.split(". ").next().expect("a part").trim_end_matches('.');
    assert!(!sentence.is_empty(), "{folder} has no documentation");
    assert!(sentence.chars().count() < 100, "{folder}: the first sentence is long: {sentence}");
    sentence.into()
}

const ROW: f64 = 34.0;
const TOP: f64 = 62.0;
const LEFT: f64 = 150.0;
const WIDTH: f64 = 920.0;

/// The picture of the layout, as SVG: users above, what they use below.
pub fn picture() -> String {
    let rows = ORDER.len();
    // The last of the order stands highest.
    let y = |rank: usize| TOP + ROW * (rows - 1 - rank) as f64 + ROW / 2.0;
    let height = TOP + ROW * rows as f64 + 14.0;
    let mut text = String::new();
    let title = "Folders of src, and which uses which";
    let _ = write!(
        text,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">
<title>{title}</title>
<style>
text{{font:12px system-ui,sans-serif;fill:#1f2328}}.title{{font-size:15px;font-weight:600}}.name{{font-weight:600}}.note{{font-size:11.5px}}
.ground{{fill:#fff}}.box{{fill:#f6f8fa;stroke:#d0d7de}}.arrow{{fill:none;stroke:#0969da;stroke-width:1.3}}.head{{fill:#0969da}}
@media(prefers-color-scheme:dark){{text{{fill:#e6edf3}}.ground{{fill:#0d1117}}.box{{fill:#161b22;stroke:#30363d}}.arrow{{stroke:#4493f8}}.head{{fill:#4493f8}}}}
</style>
<rect class="ground" width="100%" height="100%"/>
<text class="title" x="16" y="26">{title}</text>
<text class="note" x="16" y="45">An arrow leads from a folder to one that it uses. What it uses through another one has no arrow.</text>
"##
    );
    for (from, to) in direct(&uses()) {
        // Leaving below the middle, arriving above it; the farther, the wider the arc.
        let (start, end) = (y(from) + 4.0, y(to) - 4.0);
        let wide = 12.0 + 10.0 * from.abs_diff(to) as f64;
        let bend = LEFT - 8.0 - wide;
        let _ = writeln!(
            text,
            r#"<path class="arrow" d="M{LEFT} {start}C{bend} {start} {bend} {end} {} {end}"/><path class="head" d="M{LEFT} {end}l-8 -3.5v7z"/>"#,
            LEFT - 7.0
        );
    }
    for (rank, folder) in ORDER.iter().enumerate() {
        let what = summary(folder).replace('&', "&amp;").replace('<', "&lt;");
        let (top, base) = (y(rank) - ROW / 2.0 + 3.0, y(rank) + 4.5);
        let (tall, wide) = (ROW - 6.0, WIDTH - LEFT - 16.0);
        let _ = writeln!(
            text,
            r#"<rect class="box" x="{LEFT}" y="{top}" width="{wide}" height="{tall}" rx="5"/><text class="name" x="{}" y="{base}">{folder}</text><text x="{}" y="{base}">{what}</text>"#,
            LEFT + 10.0,
            LEFT + 98.0
        );
    }
    text.push_str("</svg>\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_has_no_arrow() {
        let of = |list: &[usize]| list.iter().copied().collect();
        // 3 uses 0 through 2 and 1; 4 uses 0 alone.
        let uses = [of(&[]), of(&[0]), of(&[1]), of(&[0, 2]), of(&[0])];
        assert_eq!(direct(&uses), [(1, 0), (2, 1), (3, 2), (4, 0)]);
    }
}
