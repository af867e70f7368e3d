//! A copy of the engine with all mutants in it, asleep: built once, whatever their number.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value as Json;
use toml::{Table, Value};

use super::anchors::{self, Sources};
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
/// The crate that has the mutants, and the crate whose tests kill most of them.
const CRATES: [&str; 2] = ["engine", "sim"];
/// What is copied besides crates: some tests read documents and what is deployed.
const PARTS: [&str; 5] = ["docs", "deploy", "Cargo.toml", "Cargo.lock", "rust-toolchain.toml"];

fn table(text: &str) -> Table {
    text.parse().unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The members of the workspace in `root` that [`CRATES`] are and need.
fn members(root: &Path, workspace: &Table) -> BTreeSet<String> {
    let all = workspace["workspace"]["members"].as_array().expect("a list of members");
    let read = |member: &Value| {
        let name = member.as_str().expect("a directory").to_owned();
        let manifest = std::fs::read_to_string(root.join(&name).join("Cargo.toml"));
        (name, table(&manifest.expect("a manifest")))
    };
    let manifests: BTreeMap<String, Table> = all.iter().map(read).collect();
    let mut wanted: Vec<&String> =
        manifests.keys().filter(|name| CRATES.contains(&name.as_str())).collect();
    let mut needed = BTreeSet::new();
    while let Some(name) = wanted.pop() {
        if !needed.insert(name.clone()) {
            continue;
        }
        let kinds = ["dependencies", "dev-dependencies", "build-dependencies"];
        let kinds = kinds.iter().filter_map(|kind| manifests[name].get(*kind)?.as_table());
        for package in kinds.flat_map(Table::keys) {
            let is_it = |(_, m): &(&String, &Table)| m["package"]["name"].as_str() == Some(package);
            wanted.extend(manifests.iter().find(is_it).map(|(name, _)| name));
        }
    }
    needed
}

/// The text files of the crates whose tests and code the list of mutants names.
pub(crate) fn sources(root: &Path) -> Sources {
    let mut files = BTreeMap::new();
    for part in CRATES {
        read_all(root, &root.join(part), &mut files);
    }
    let as_text = |(path, bytes)| Some((path, String::from_utf8(bytes).ok()?));
    files.into_iter().filter_map(as_text).collect()
}

/// Makes the copy in `scratch/tree`, or brings it up to date: what has not changed keeps its time,
/// so that it is not compiled again.
pub(crate) fn make(root: &Path, scratch: &Path, list: &List) -> PathBuf {
    let tree = scratch.join("tree");
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).expect("the workspace");
    let mut workspace = table(&manifest);
    let members = members(root, &workspace);
    let mut files = BTreeMap::new();
    for part in members.iter().map(String::as_str).chain(PARTS) {
        read_all(root, &root.join(part), &mut files);
    }
    let edited = anchors::edited(&sources(root), list).unwrap_or_else(|why| panic!("{why}"));
    files.extend(edited.into_iter().map(|(path, code)| (path, code.into_bytes())));
    files.get_mut("engine/src/lib.rs").expect("the engine").extend(b"pub mod mutant;\n");
    workspace["workspace"]["members"] =
        Value::Array(members.into_iter().map(Value::from).collect());
    files.insert("engine/src/mutant.rs".into(), MODULE.into());
    files.insert("Cargo.toml".into(), workspace.to_string().into_bytes());
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
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Json>(line).ok());
    messages
        .filter(|message| message["profile"]["test"] == true)
        .filter_map(|message| {
            let of_lib = message["target"]["kind"][0] == "lib";
            // Of the two libraries the engine is the one whose unit tests kill mutants.
            if of_lib && message["target"]["name"] != "pando_engine" {
                return None;
            }
            let name = if of_lib { "lib" } else { message["target"]["name"].as_str()? };
            Some((name.to_owned(), PathBuf::from(message["executable"].as_str()?)))
        })
        .collect()
}
