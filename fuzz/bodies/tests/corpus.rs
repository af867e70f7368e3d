//! Replays the inputs of all fuzz targets in `fuzz/corpus/`: inputs that once found a bug, and
//! inputs that reach the corners of the code. Fails for a target without a corpus, for a corpus
//! that no longer reaches what it should, and for files of `fuzz/` that do not belong together.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use pando_sim::{
    Told,
    fuzz::{self, Reached, Target},
};

/// Bytes of all corpora together: every clone of the repository contains them.
const CORPUS_BYTES_MAX: u64 = 600 << 10;
const TARGETS_DIR: &str = "fuzz_targets";

/// All targets.
fn targets() -> impl Iterator<Item = &'static Target> {
    fuzz::TARGETS.iter().chain(pando_fuzz_bodies::TARGETS)
}

fn fuzz_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the directory of the targets")
}

/// The names in a directory, without extensions.
fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    let stem = |path: PathBuf| path.file_stem().expect("a name").display().to_string();
    entries.map(|entry| stem(entry.expect("an entry").path())).collect()
}

fn inputs(target: &str) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(fuzz_dir().join("corpus").join(target)).expect("a corpus");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let read = |path: PathBuf| (path.display().to_string(), fs::read(&path).expect("an input"));
    let mut inputs: Vec<_> = paths.map(read).collect();
    inputs.sort();
    inputs
}

/// Replays a corpus. Returns what it reached.
fn replay(target: &Target) -> String {
    let mut reached = Reached::default();
    let inputs = inputs(target.name);
    for (path, bytes) in &inputs {
        let _told = Told(|| path.clone());
        (target.body)(bytes, &mut reached);
    }
    for what in target.reaches {
        let count = reached.0.get(what).copied().unwrap_or(0);
        assert!(count > 0, "the corpus of {} no longer reaches: {what}", target.name);
    }
    format!("{}: {} inputs, {:?}", target.name, inputs.len(), reached.0)
}

/// One test for each target, so that they run in parallel.
macro_rules! replayed {
    ($($name:ident)*) => {
        const REPLAYED: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            fn $name() {
                let target = targets().find(|target| target.name == stringify!($name));
                println!("{}", replay(target.expect("a target")));
            }
        )*
    };
}

replayed! {
    allocator
    control_api
    crash
    csi_requests
    engine_model
    image_mutate
    io_errors
    journal
    nbd_handshake
    nbd_transmission
    node
    node_graph
    superblock
    ublk_descriptor
}

/// The names of all targets, each with the call of its program.
fn calls() -> BTreeMap<String, String> {
    let body_call = |name: &str| format!("pando_sim::fuzz::run(\"{name}\", bytes)");
    let program_call = |name: &str| format!("pando_fuzz_bodies::{name}::run(bytes)");
    let bodies = fuzz::TARGETS.iter().map(|t| (t.name.to_owned(), body_call(t.name)));
    let programs = pando_fuzz_bodies::TARGETS.iter();
    bodies.chain(programs.map(|t| (t.name.to_owned(), program_call(t.name)))).collect()
}

/// Bodies, files, entries of the manifest, corpora and the tests above are the same targets.
#[test]
fn every_target_is_built_and_replayed() {
    let files = names(&fuzz_dir().join(TARGETS_DIR));
    let calls = calls();
    assert_eq!(files, calls.keys().cloned().collect());
    assert_eq!(names(&fuzz_dir().join("corpus")), files, "corpora");
    let replayed: BTreeSet<&str> = REPLAYED.iter().copied().collect();
    assert_eq!(replayed, targets().map(|target| target.name).collect());
    let manifest = fs::read_to_string(fuzz_dir().join("Cargo.toml")).expect("a manifest");
    for (name, call) in &calls {
        let source = fs::read_to_string(fuzz_dir().join(TARGETS_DIR).join(format!("{name}.rs")));
        let whole = format!("#![no_main]\n\nlibfuzzer_sys::fuzz_target!(|bytes: &[u8]| {call});\n");
        assert_eq!(source.expect("a target"), whole, "{name}.rs");
        let entry = format!("[[bin]]\nname = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"\n");
        assert!(manifest.contains(&entry), "fuzz/Cargo.toml lacks {name}");
    }
    assert_eq!(manifest.matches("[[bin]]").count(), files.len(), "programs of fuzz/Cargo.toml");
}

#[test]
fn corpora_are_small() {
    let sizes = calls().into_keys().flat_map(|target| inputs(&target));
    let bytes: u64 = sizes.map(|(_, bytes)| u64::try_from(bytes.len()).expect("small")).sum();
    assert!(bytes <= CORPUS_BYTES_MAX, "{bytes} bytes; run scripts/fuzz-corpus");
}
