//! The bodies of the fuzz targets that drive whole programs: `control_api` the daemon,
//! `csi_requests` the CSI adapter. The other bodies are in `pando_sim::fuzz`.
//! `fuzz/fuzz_targets/` has a line for each target, and `tests/corpus.rs` replays the corpora.

#![forbid(unsafe_code)]

pub mod control_api;
pub mod csi_requests;

use pando_sim::fuzz::{Reached, Target};

/// The targets of this crate, by name.
pub const TARGETS: &[Target] = &[
    Target { name: "control_api", body: control_api::body, reaches: control_api::REACHES },
    Target { name: "csi_requests", body: csi_requests::body, reaches: csi_requests::REACHES },
];

/// A directory in memory if possible: most of the time of an input goes into a few small files.
fn scratch_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    dir.expect("a scratch directory")
}
