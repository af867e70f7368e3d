//! A virtual machine with a kernel that has what this one lacks, for one suite of
//! `tests/bin/guest`.

use std::path::Path;
use std::process::{Command, Stdio};

use parking_lot::Mutex;

use crate::system::programs;
use crate::tools;

/// What starting a machine takes.
const PROGRAMS: [&str; 5] = ["qemu-system-x86_64", "busybox", "cpio", "depmod", "strip"];

/// One machine at a time: it emulates as many processors as there are.
static TURN: Mutex<()> = Mutex::new(());

/// Runs a suite in a machine of its own; all of `cases` must be passed and nothing else.
/// Returns what the console said. Without the programs that it takes, the suite is left out.
///
/// # Panics
/// A case is missing or failed, or the machine did not end in good order.
pub fn run(suite: &str, cases: &[&str]) -> Option<String> {
    if !tools::present(&PROGRAMS) {
        return None;
    }
    let _turn = TURN.lock();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/vm");
    let output = Command::new(script)
        .arg(programs())
        .arg(suite)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .expect("scripts/vm starts");
    let console = String::from_utf8_lossy(&output.stdout).into_owned();
    let passed: Vec<&str> = console.lines().filter_map(|l| l.strip_prefix("PASS ")).collect();
    assert!(
        output.status.success() && passed == cases,
        "suite {suite}: {}, passed {passed:?} of {cases:?}\n{console}",
        output.status
    );
    Some(console)
}
