//! SIGKILL of the daemon under a mounted file system whose tree changes: the file system is sound
//! afterwards, and what was synced is in it. The work is done by `tests/bin/hammer/mounted.rs`.

use std::process::{Command, Stdio};

use pando_tests::cli::number;
use pando_tests::devices::possible;
use pando_tests::system::programs;
use pando_tests::tools::present;
use serde_json::Value;

const KILLS: u64 = 4;

fn kills(fs: &str, programs_needed: &[&str]) {
    if !possible() || !present(&["mount", "umount", "losetup"]) || !present(programs_needed) {
        return;
    }
    let hammer = Command::new(programs().join("pando-hammer"))
        .args(["mounted", "--fs", fs, "--seed", "3", "--seconds", "120"])
        .args(["--kills", &KILLS.to_string(), "--json"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .expect("pando-hammer; `make test` builds it");
    let said = String::from_utf8_lossy(&hammer.stdout);
    let report: Value = serde_json::from_str(&said).unwrap_or_else(|why| panic!("{why}: {said}"));
    eprintln!("{report}");
    assert!(hammer.status.success(), "{report}");
    assert_eq!(number(&report, "/kills"), KILLS);
    assert!(number(&report, "/synced_files") >= 50, "{report}");
}

#[test]
fn ext4_keeps_what_was_synced() {
    kills("ext4", &["mkfs.ext4", "e2fsck"]);
}

#[test]
fn xfs_keeps_what_was_synced() {
    kills("xfs", &["mkfs.xfs", "xfs_repair"]);
}
