//! A copy of the engine with all mutants in it, asleep: built once, whatever their number.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::list::List;

/// What a mutated piece asks.
const MODULE: &str = r#"//! Which mutant this process is.

static CHOSEN: std::sync::LazyLock<Option<String>> =
    std::sync::LazyLock::new(|| std::env::var("PANDO_MUTANT").ok());

/// Whether it is the mutant `name`.
#[must_use]
pub fn on(name: &str) -> bool {
    CHOSEN.as_deref() == Some(name)
}
"#;
/// What the engine needs of the repository to be built.
const PARTS: [&str; 8] =
    ["engine", "proto", "sim", "docs", "Cargo.toml", "Cargo.lock", "rust-toolchain.toml", "deploy"];

/// The sources of the engine with every edit of `list` applied, by their paths from its root.
///
/// # Errors
/// Every edit that does not fit the code any more.
pub(crate) fn edited(root: &Path, list: &List) -> Result<BTreeMap<String, String>, String> {
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    let mut misfits = String::new();
    for edit in &list.edits {
        let path = format!("engine/src/{}", edit.file);
        let code = files.entry(path).or_insert_with_key(|path| {
            std::fs::read_to_string(root.join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
        });
        match edit.apply(code) {
            Ok(edited) => *code = edited,
            Err(misfit) => misfits.push_str(&misfit),
        }
    }
    if misfits.is_empty() { Ok(files) } else { Err(misfits) }
}

/// Makes the copy in `scratch/tree`, or brings it up to date: what has not changed keeps its time,
/// so that it is not compiled again.
pub(crate) fn make(root: &Path, scratch: &Path, list: &List) -> PathBuf {
    let tree = scratch.join("tree");
    let mut files = BTreeMap::new();
    for part in PARTS {
        read_all(root, &root.join(part), &mut files);
    }
    let edited = edited(root, list).unwrap_or_else(|misfits| panic!("{misfits}"));
    files.extend(edited.into_iter().map(|(path, code)| (path, code.into_bytes())));
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    let lib = text(&files["engine/src/lib.rs"]) + "pub mod mutant;\n";
    let members = r#"members = ["engine", "proto", "csi", "cli", "sim", "benches", "tests"]"#;
    let manifest = text(&files["Cargo.toml"]);
    assert!(manifest.contains(members), "the members of the workspace have changed");
    let manifest = manifest.replace(members, r#"members = ["engine", "proto", "sim"]"#);
    files.insert("engine/src/lib.rs".into(), lib.into_bytes());
    files.insert("engine/src/mutant.rs".into(), MODULE.into());
    files.insert("Cargo.toml".into(), manifest.into_bytes());
    let mut old = BTreeMap::new();
    read_all(&tree, &tree, &mut old);
    for gone in old.keys().filter(|path| !files.contains_key(*path) && *path != "Cargo.lock") {
        std::fs::remove_file(tree.join(gone)).expect("a file of the copy");
    }
    for (path, bytes) in files {
        let place = tree.join(&path);
        // Cargo takes from the list of locked versions what the copy has no use for.
        let same = old.get(&path) == Some(&bytes) || (path == "Cargo.lock" && place.exists());
        if !same {
            std::fs::create_dir_all(place.parent().expect("in a directory")).expect("a directory");
            std::fs::write(place, bytes).expect("a file of the copy");
        }
    }
    tree
}

fn read_all(root: &Path, at: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    if at.is_dir() {
        for entry in std::fs::read_dir(at).expect("a directory") {
            read_all(root, &entry.expect("an entry").path(), files);
        }
    } else if at.is_file() {
        let name = at.strip_prefix(root).expect("below the root").to_string_lossy().into_owned();
        files.insert(name, std::fs::read(at).expect("a file"));
    }
}

/// Builds tests of the copy; the programs by their names. The unit tests are those of `lib`.
pub(crate) fn build(tree: &Path, scratch: &Path, tests: &[&str]) -> BTreeMap<String, PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(tree).args(["test", "--no-run", "--message-format=json-render-diagnostics"]);
    cargo.args(["--package=pando-engine", "--package=pando-sim", "--no-default-features"]);
    cargo.args(["--features=pando-engine/testing", "--target-dir"]);
    cargo.arg(scratch.join("target"));
    for test in tests {
        if *test == "lib" {
            cargo.arg("--lib");
        } else {
            cargo.args(["--test", test]);
        }
    }
    cargo.env("CARGO_INCREMENTAL", "0");
    let output = cargo.stderr(Stdio::inherit()).output().expect("cargo");
    assert!(output.status.success(), "the copy with the mutants does not compile");
    let messages = String::from_utf8(output.stdout).expect("UTF-8");
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    messages
        .filter(|message| message["profile"]["test"] == true)
        .filter_map(|message| {
            let of_lib = message["target"]["kind"][0] == "lib";
            let name = if of_lib { "lib" } else { message["target"]["name"].as_str()? };
            Some((name.to_owned(), PathBuf::from(message["executable"].as_str()?)))
        })
        .collect()
}
