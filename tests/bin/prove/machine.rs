//! What the figures of a report belong to.

use std::fs;
use std::path::Path;

use pando_tests::tools::output;
use serde_json::{Value, json};

/// Commit and machine.
pub(crate) fn facts(programs: &Path) -> Value {
    let said = |program: &str, arguments: &[&str]| {
        let done = output(program, arguments);
        String::from_utf8_lossy(&done.stdout).trim().to_owned()
    };
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    json!({
        "commit": said("git", &["rev-parse", "HEAD"]),
        "dirty": !said("git", &["status", "--porcelain"]).is_empty(),
        "begun": said("date", &["-u", "+%Y-%m-%dT%H:%MZ"]),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "processor": after(&cpu, "model name"),
        "memory": after(&memory, "MemTotal"),
        "kernel": said("uname", &["-r"]),
        "rustc": said("rustc", &["--version"]),
        "programs": programs.display().to_string(),
    })
}

/// What stands behind `key :` in a file of /proc.
fn after(text: &str, key: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.unwrap_or_default().trim_start_matches([' ', '\t', ':']).to_owned()
}
