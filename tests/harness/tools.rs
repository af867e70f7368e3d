//! Programs of others. One that is missing leaves its test out, but with CI=true it is an error.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Where programs are looked for beside PATH: a user's PATH often lacks them.
const SYSTEM_DIRECTORIES: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Whether all of `programs` are there; if not, the caller returns.
///
/// # Panics
/// With CI=true, where nothing may be left out.
#[must_use]
pub fn present(programs: &[&str]) -> bool {
    let missing: Vec<&str> = programs.iter().copied().filter(|p| find(p).is_none()).collect();
    if missing.is_empty() {
        return true;
    }
    let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(!ci, "{missing:?} missing: scripts/setup installs them");
    eprintln!("left out: {missing:?} missing, scripts/setup installs them");
    false
}

/// Where scripts/setup puts the programs that it builds.
fn built() -> Option<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)?;
    Some(cache.join("pando/bin"))
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = SYSTEM_DIRECTORIES.iter().map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(more)
        .chain(built())
        .map(|d| d.join(program))
        .find(|p| p.is_file())
}

/// Runs a program to its end, without input.
///
/// # Panics
/// It cannot be started.
pub fn output<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> Output {
    let path = find(program).unwrap_or_else(|| PathBuf::from(program));
    let command = Command::new(path).args(arguments).stdin(Stdio::null()).output();
    command.unwrap_or_else(|error| panic!("{program} does not start: {error}"))
}

/// Runs a program that must succeed; returns what it printed.
///
/// # Panics
/// It fails.
pub fn run<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> String {
    let output = output(program, arguments);
    let shown: Vec<_> = arguments.iter().map(|a| a.as_ref().to_string_lossy()).collect();
    assert!(
        output.status.success(),
        "{program} {}: {}\n{}{}",
        shown.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The text of a path that the tests have made.
///
/// # Panics
/// It is no UTF-8.
#[must_use]
pub fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}
