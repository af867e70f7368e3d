//! SIGKILL of the real daemon under load, again and again: `tests/bin/hammer`, a process of its own
//! that keeps the log of what was acknowledged, on real NBD clients. This is the slice for every
//! run of the tests; `pando-hammer campaign` runs as long as one likes.

use std::process::Stdio;

use pando_tests::cli::number;
use pando_tests::system::programs;
use pando_tests::tools::present;
use serde_json::Value;

const KILLS: u64 = 42;

#[test]
fn no_acknowledged_write_is_lost_by_sigkill() {
    if !present(&["fio", "nbdcopy", "qemu-io", "timeout"]) {
        return;
    }
    // The same program under another path: what opens the pool is another process each time, and
    // here not another build. scripts/prove takes one of an older commit.
    let directory = tempfile::tempdir().expect("a directory");
    let old = directory.path().join("pandod-old");
    std::os::unix::fs::symlink(programs().join("pandod"), &old).expect("a link");
    let hammer = std::process::Command::new(programs().join("pando-hammer"))
        .args(["campaign", "--json", "--seed", "7", "--life-ms-max", "1000"])
        .args(["--kills", &KILLS.to_string(), "--seconds", "240", "--old"])
        .arg(&old)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .expect("pando-hammer; `make test` builds it");
    let said = String::from_utf8_lossy(&hammer.stdout);
    let report: Value = serde_json::from_str(&said).unwrap_or_else(|why| panic!("{why}: {said}"));
    eprintln!("{report}");
    assert!(hammer.status.success(), "{report}");
    let least = |key: &str, least: u64| {
        let found = number(&report, &format!("/{key}"));
        assert!(found >= least, "{key}: {found}, at least {least}: {report}");
    };
    least("kills", KILLS);
    least("acknowledged", 10_000);
    least("under_way", 100);
    least("foreign_acknowledged_blocks", 1000);
    least("frozen", 20);
    least("offline_checks", 8);
    least("old_rounds", 10);
    for client in ["fio", "nbdcopy", "qemu-io"] {
        least(&format!("clients/{client}"), 2);
    }
    for strike in ["load", "stopped", "ending", "start"] {
        least(&format!("strikes/{strike}"), 1);
    }
}
