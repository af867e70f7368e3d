//! A daemon in the machine, its devices, its kernel's log.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pando_tests::noise::Noise;
use pando_tests::{System, tools};
use serde_json::Value;

/// The kernel's module for a kind of device.
const MODULES: [(&str, &str); 2] = [("ublk", "ublk_drv"), ("nbd", "nbd")];
/// What the kernel says of I/O that failed, and of its own faults. That a connection of its NBD
/// client was lost is none of them.
const BAD_NEWS: [&str; 8] = [
    "I/O error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "Corruption of",
    "JBD2: Detected",
    "BUG:",
    "WARNING:",
    "blocked for more than",
];

/// Files, and what is in them.
pub(crate) type Files = BTreeMap<PathBuf, Vec<u8>>;

/// Loads the module of a kind of device, with what it depends on.
pub(crate) fn load(kind: &str) {
    let module = MODULES.iter().find(|(of, _)| *of == kind);
    let (_, module) = module.expect("only these kinds have modules");
    tools::run("modprobe", &[*module]);
}

/// A daemon with a pool in memory, and the kernel's module of `kind` loaded.
pub(crate) fn start(kind: &str) -> System {
    load(kind);
    System::start("256MiB")
}

/// Makes a volume.
pub(crate) fn create(system: &System, name: &str, size: &str) {
    system.cli().run(&["volume", "create", name, "--size", size]);
}

/// Attaches a volume; what the daemon says of its device.
pub(crate) fn attach(system: &System, name: &str, kind: &str, more: &[&str]) -> Value {
    let arguments = [&["volume", "attach", name, "--kind", kind], more].concat();
    let attachment = system.cli().json(&arguments);
    assert!(kind == "auto" || attachment["kind"] == kind, "{attachment}");
    attachment
}

/// The path of a device.
pub(crate) fn device(attachment: &Value) -> String {
    attachment["device"].as_str().expect("a device has a path").to_owned()
}

/// Removes the device of a volume.
pub(crate) fn detach(system: &System, name: &str) {
    system.cli().run(&["volume", "detach", name]);
}

/// Bytes that a volume takes up.
pub(crate) fn mapped_bytes(system: &System, name: &str) -> u64 {
    let volume = system.cli().json(&["volume", "show", name]);
    volume["mapped_bytes"].as_u64().expect("a volume has mapped bytes")
}

/// Writes files below `root`, and returns what they hold.
pub(crate) fn write_tree(root: &Path, seed: u64) -> Files {
    let mut noise = Noise::new(seed);
    let mut files = BTreeMap::new();
    for number in 0..40 {
        let directory = root.join(format!("d{}", number % 5));
        fs::create_dir_all(&directory).expect("a directory");
        let path = directory.join(format!("f{number}"));
        let length = usize::try_from(noise.below(60_000)).expect("it is small");
        let content = noise.bytes(length);
        fs::write(&path, &content).expect("a file");
        files.insert(path, content);
    }
    files
}

/// The files are what they were.
pub(crate) fn check_files(files: &Files) {
    for (path, content) in files {
        let found = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(found == *content, "{} has changed", path.display());
    }
}

/// The kernel has nothing bad to say.
pub(crate) fn check_kernel_log() {
    let log = tools::run("dmesg", &[""; 0]);
    let bad: Vec<&str> =
        log.lines().filter(|line| BAD_NEWS.iter().any(|news| line.contains(news))).collect();
    assert!(bad.is_empty(), "the kernel says:\n{}", bad.join("\n"));
}
