//! The rules of the house that a compiler does not know, as a test: length and alphabet of files,
//! words that must not stay, layers, where `unsafe` may be, sizes of what is on the disk, and
//! `docs/ARCHITECTURE.md` against the tree. Each rule says what to do about a breach.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

const LINES_MAX: usize = 600;
/// Files of others, kept as they are.
const VENDORED: &str = "csi/proto/csi/";
const ARCHITECTURE_LINES_MAX: usize = 250;
/// Where code and documents are.
const TOP: [&str; 12] = [
    ".ci",
    "benches",
    "cli",
    "csi",
    "deploy",
    "docs",
    "engine",
    "fuzz/bodies",
    "proto",
    "scripts",
    "sim",
    "tests",
];
/// Written in two halves, so that this file does not contain them.
const LEFTOVERS: [(&str, &str); 4] =
    [("FIX", "ME"), ("to", "do!("), ("unimple", "mented!("), ("#[ig", "nore")];
/// The layers of the engine, from the bottom. A module names only lower layers, and its own.
const LAYERS: [&[&str]; 10] = [
    &["units", "limits", "error", "crc"],
    &["runtime"],
    &["format", "disk", "device"],
    &["map", "space"],
    &["state"],
    &["journal"],
    &["pool"],
    &["volume"],
    &["export"],
    &["daemon", "bin"],
];
/// Arrows that would point down and are forbidden all the same.
const FORBIDDEN: [(&str, &str); 11] = [
    ("export", "pool"),
    ("export", "volume"),
    ("format", "disk"),
    ("format", "runtime"),
    ("map", "disk"),
    ("map", "runtime"),
    ("space", "disk"),
    ("space", "runtime"),
    ("state", "disk"),
    ("state", "runtime"),
    ("state", "journal"),
];
/// Where `unsafe` may be.
const UNSAFE: [&str; 8] = [
    "csi/src/node/sys.rs",
    "engine/src/disk/file.rs",
    "engine/src/disk/mapped.rs",
    "engine/src/runtime/reactor/mod.rs",
    "engine/src/runtime/reactor/ops.rs",
    "engine/src/export/loopdev.rs",
    "engine/src/export/ublk/control.rs",
    "engine/src/export/ublk/queue.rs",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// All files of the repository with their texts, by their paths from its root.
fn files() -> Vec<(String, String)> {
    let root = root();
    let mut left: Vec<PathBuf> = TOP.iter().map(|top| root.join(top)).collect();
    let own = std::fs::read_dir(&root).expect("the workspace").map(|e| e.expect("an entry").path());
    left.extend(own.filter(|path| path.is_file()));
    let mut files = Vec::new();
    while let Some(path) = left.pop() {
        if path.is_dir() {
            let entries = std::fs::read_dir(&path).expect("a directory");
            left.extend(entries.map(|entry| entry.expect("an entry").path()));
        } else if path.is_file() {
            let name = path.strip_prefix(&root).expect("below it").display().to_string();
            files.push((name, std::fs::read_to_string(&path).unwrap_or_default()));
        }
    }
    files.sort();
    files
}

fn is_rust(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "rs")
}

fn is_test(name: &str) -> bool {
    let stem = Path::new(name).file_stem().and_then(|s| s.to_str()).unwrap_or_default();
    stem.ends_with("tests")
        || stem == "testing"
        || (name.contains("/src/") && name.contains("/tests/"))
}

/// The code of a file, without its unit tests and comments.
fn code(text: &str) -> impl Iterator<Item = &str> {
    let text = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    text.lines().map(|line| line.split("//").next().unwrap_or_default())
}

fn report(breaches: &str) {
    assert!(breaches.is_empty(), "\n{breaches}");
}

#[test]
fn files_are_short_and_plain() {
    let mut breaches = String::new();
    for (name, text) in files() {
        let lines = text.lines().count();
        if is_rust(&name) && lines > LINES_MAX {
            writeln!(breaches, "{name}: {lines} lines; split it").expect("text grows");
        }
        if let Some(line) = text.lines().position(|line| !line.is_ascii()) {
            writeln!(breaches, "{name}:{}: not ASCII", line + 1).expect("text grows");
        }
        let leftover = LEFTOVERS.iter().find(|(a, b)| text.contains(&format!("{a}{b}")));
        if let Some((a, b)) = leftover {
            writeln!(breaches, "{name}: {a}{b}; do it or open an issue").expect("text grows");
        }
        if text.lines().any(|line| line.ends_with(' ')) && !name.starts_with(VENDORED) {
            writeln!(breaches, "{name}: spaces at the end of a line").expect("text grows");
        }
    }
    report(&breaches);
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// The modules of the engine that a line of code names.
fn named(line: &str) -> BTreeSet<&str> {
    let after = line.split("crate::").skip(1);
    let mut modules = BTreeSet::new();
    for rest in after {
        let grouped = rest.strip_prefix('{');
        let words = grouped.unwrap_or(rest).split(|c: char| !(c.is_alphanumeric() || c == '_'));
        let first = words.take(1);
        modules.extend(first.filter(|word| layer(word).is_some()));
        if let Some(group) = grouped {
            modules.extend(group.split([',', '}']).map(str::trim).filter(|w| layer(w).is_some()));
        }
    }
    modules
}

#[test]
fn layers_only_point_down() {
    let mut breaches = String::new();
    for (name, text) in files() {
        let Some(inside) = name.strip_prefix("engine/src/") else { continue };
        let from = inside.split(['/', '.']).next().unwrap_or_default();
        let Some(level) = layer(from) else {
            assert_eq!(from, "lib", "{name}: give the module a layer in tests/tidy.rs");
            continue;
        };
        if is_test(&name) {
            continue;
        }
        for to in code(&text).flat_map(named) {
            let down = layer(to).is_some_and(|other| other <= level);
            if !down || FORBIDDEN.contains(&(from, to)) {
                writeln!(breaches, "{name}: {from} must not name {to}").expect("text grows");
            }
        }
    }
    report(&breaches);
}

/// What shards share can be put under a scheduler that chooses who goes on.
#[test]
fn locks_come_from_one_place() {
    let mut breaches = String::new();
    for (name, text) in files() {
        let Some(inside) = name.strip_prefix("engine/src/") else { continue };
        let above =
            ["daemon/", "export/", "bin/", "runtime/sync.rs"].iter().any(|a| inside.starts_with(a));
        if !above && code(&text).any(|line| line.contains("parking_lot")) {
            writeln!(breaches, "{name}: take the lock from crate::runtime::sync")
                .expect("text grows");
        }
    }
    report(&breaches);
}

#[test]
fn unsafe_stays_where_it_is() {
    let mut breaches = String::new();
    for (name, text) in files().into_iter().filter(|(name, _)| is_rust(name) && !is_test(name)) {
        let unsafely = |line: &str| {
            line.split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|word| word == "unsafe")
        };
        if code(&text).any(unsafely) && !UNSAFE.contains(&name.as_str()) && name != "tests/tidy.rs"
        {
            writeln!(breaches, "{name}: unsafe; see UNSAFE for where the kernel is met")
                .expect("text grows");
        }
    }
    report(&breaches);
}

#[test]
fn what_is_on_the_disk_has_a_size() {
    let mut breaches = String::new();
    for (name, text) in files() {
        if !name.starts_with("engine/src/format/") {
            continue;
        }
        for part in text.split("#[repr(C").skip(1) {
            let after = part.split("struct ").nth(1).unwrap_or_default();
            let structure = after.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
            // A transmutation from bytes asserts the size as well.
            let asserted = text.contains(&format!("size_of::<{structure}>() =="))
                || text.contains(&format!("&{structure} = transmute_ref!"));
            if !asserted {
                writeln!(breaches, "{name}: assert the size of {structure}").expect("text grows");
            }
        }
    }
    report(&breaches);
}

/// The table of files in docs/ARCHITECTURE.md: directory and files, as `engine/src/map/edit.rs`.
fn described() -> BTreeSet<String> {
    let text = std::fs::read_to_string(root().join("docs/ARCHITECTURE.md")).expect("a document");
    assert!(text.lines().count() <= ARCHITECTURE_LINES_MAX, "docs/ARCHITECTURE.md is too long");
    let mut names = BTreeSet::new();
    for line in text.lines() {
        let Some((directory, rest)) = line.strip_prefix("| `").and_then(|l| l.split_once("/` |"))
        else {
            continue;
        };
        let stems = rest.split('|').next().unwrap_or_default();
        names.extend(stems.split_whitespace().map(|stem| format!("{directory}/{stem}.rs")));
    }
    names
}

#[test]
fn the_map_of_the_code_is_true() {
    let tree: BTreeSet<String> = files()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| {
            ["engine/src/", "cli/src/", "csi/src/", "fuzz/bodies/src/", "sim/src/"]
                .iter()
                .any(|d| name.starts_with(d))
        })
        .filter(|name| is_rust(name) && !is_test(name))
        .collect();
    let described = described();
    let missing: Vec<_> = tree.difference(&described).collect();
    let gone: Vec<_> = described.difference(&tree).collect();
    assert!(missing.is_empty(), "not in docs/ARCHITECTURE.md: {missing:#?}");
    assert!(gone.is_empty(), "in docs/ARCHITECTURE.md, but not in the tree: {gone:#?}");
}

#[test]
fn each_invariant_is_cited_by_code() {
    let files = files();
    let code: Vec<&str> = files
        .iter()
        .filter(|(name, _)| name.starts_with("engine/"))
        .map(|(_, text)| text.as_str())
        .collect();
    let document = files.iter().find(|(name, _)| name == "docs/ARCHITECTURE.md");
    for number in 1..=7 {
        let cited = code.iter().any(|text| text.contains(&format!("(I{number})")));
        assert!(cited, "I{number} is cited nowhere in the code");
        let stated = document.is_some_and(|(_, text)| text.contains(&format!("**I{number}**")));
        assert!(stated, "I{number} is not stated in docs/ARCHITECTURE.md");
    }
}
