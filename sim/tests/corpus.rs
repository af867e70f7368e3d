//! Replays the inputs of all fuzz targets that are kept in `fuzz/corpus/`: what they have found once,
//! and what reaches the corners of the code. A target without a corpus, or with one that reaches
//! nothing any more, fails; so does a file of `fuzz/` that does not fit.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use pando_sim::Told;
use pando_sim::fuzz::{Reached, TARGETS, Target};

/// Bytes of all corpora together: they are cloned by everybody.
const CORPUS_BYTES_MAX: u64 = 600 << 10;
const TARGETS_DIR: &str = "fuzz_targets";
/// Targets whose bodies are elsewhere: what their programs call, and where their corpora are replayed.
const OTHERS: [(&str, &str, &str); 1] =
    [("csi_requests", "pando_csi::testing::run(bytes)", "csi/src/testing/mod.rs")];

fn fuzz() -> PathBuf {
    let engine = Path::new(env!("CARGO_MANIFEST_DIR"));
    engine.parent().expect("the workspace").join("fuzz")
}

/// The names in a directory, without what comes behind the dot.
fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    let stem = |path: PathBuf| path.file_stem().expect("a name").display().to_string();
    entries.map(|entry| stem(entry.expect("an entry").path())).collect()
}

fn inputs(target: &str) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(fuzz().join("corpus").join(target)).expect("a corpus");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let read = |path: PathBuf| (path.display().to_string(), fs::read(&path).expect("an input"));
    let mut inputs: Vec<_> = paths.map(read).collect();
    inputs.sort();
    inputs
}

/// Runs all of a corpus; what it has reached.
fn replay(target: &Target) -> String {
    let mut reached = Reached::default();
    let inputs = inputs(target.name);
    for (path, bytes) in &inputs {
        let _told = Told(|| path.clone());
        (target.body)(bytes, &mut reached);
    }
    for what in target.reaches {
        let count = reached.0.get(what).copied().unwrap_or(0);
        assert!(count > 0, "the corpus of {} has rotted: no {what} any more", target.name);
    }
    format!("{}: {} inputs, {:?}", target.name, inputs.len(), reached.0)
}

/// One test for each target, so that they run side by side.
macro_rules! replayed {
    ($($name:ident)*) => {
        const REPLAYED: &[&str] = &[$(stringify!($name)),*];
        $(
            #[test]
            fn $name() {
                let target = TARGETS.iter().find(|target| target.name == stringify!($name));
                println!("{}", replay(target.expect("a target")));
            }
        )*
    };
}

replayed! {
    allocator
    control_api
    crash
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

/// The targets, each with what its program calls.
fn calls() -> BTreeMap<String, String> {
    let here = |target: &Target| {
        let name = target.name;
        (name.to_owned(), format!("pando_sim::fuzz::run(\"{name}\", bytes)"))
    };
    let other = |(name, call, _): &(&str, &str, &str)| ((*name).to_owned(), (*call).to_owned());
    TARGETS.iter().map(here).chain(OTHERS.iter().map(other)).collect()
}

/// Bodies, files, entries of the manifest, corpora and the tests above are the same targets.
#[test]
fn every_target_is_built_and_replayed() {
    let files = names(&fuzz().join(TARGETS_DIR));
    let calls = calls();
    assert_eq!(files, calls.keys().cloned().collect());
    assert_eq!(names(&fuzz().join("corpus")), files, "corpora");
    let replayed: BTreeSet<&str> = REPLAYED.iter().copied().collect();
    assert_eq!(replayed, TARGETS.iter().map(|target| target.name).collect());
    for (name, _, replay) in OTHERS {
        let code =
            fs::read_to_string(fuzz().join("..").join(replay)).expect("where it is replayed");
        assert!(code.contains(&format!("corpus/{name}")), "{replay} does not replay {name}");
    }
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).expect("a manifest");
    for (name, call) in &calls {
        let source = fs::read_to_string(fuzz().join(TARGETS_DIR).join(format!("{name}.rs")));
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
