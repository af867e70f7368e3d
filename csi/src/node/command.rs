//! Programs of others: mkfs, blkid and their like. Never through a shell; arguments are a list, the
//! environment is empty but for what makes messages plain, and each has a limit of time.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tonic::Status;

/// Where these programs are.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// Characters of a program's messages that are passed on.
const SHOWN_MAX: usize = 1000;

/// How a program ended.
pub(crate) struct Output {
    /// Its exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    /// What it printed.
    pub(crate) stdout: String,
    /// What it printed to stderr, or else to stdout, shortened, for messages.
    pub(crate) said: String,
}

/// Runs a program to its end.
///
/// # Errors
/// `INTERNAL`: it is not installed, does not start, or does not end within `limit`, when it is
/// killed.
pub(crate) async fn run<S: AsRef<OsStr>>(
    program: &str,
    arguments: &[S],
    limit: Duration,
) -> Result<Output, Status> {
    let path = find(program)?;
    let mut command = Command::new(&path);
    command.args(arguments).env_clear().env("LC_ALL", "C").env("PATH", DIRECTORIES.join(":"));
    command.stdin(Stdio::null()).kill_on_drop(true);
    let failed = |error: &dyn std::fmt::Display| Status::internal(format!("{program}: {error}"));
    let output = match tokio::time::timeout(limit, command.output()).await {
        Ok(output) => output.map_err(|error| failed(&error))?,
        Err(_) => return Err(failed(&format!("not finished after {} s", limit.as_secs()))),
    };
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let said = said(if stderr.trim().is_empty() { &stdout } else { &stderr });
    Ok(Output { code: output.status.code(), stdout, said })
}

/// What a program said, on one line, without the description of its options that many print after
/// an error.
fn said(text: &str) -> String {
    let is_usage = |line: &str| {
        line.trim_start().get(..6).is_some_and(|start| start.eq_ignore_ascii_case("usage:"))
    };
    let lines = text.lines().take_while(|line| !is_usage(line));
    let said = lines.flat_map(str::split_whitespace).collect::<Vec<_>>().join(" ");
    said.chars().take(SHOWN_MAX).collect()
}

/// Runs a program that must succeed.
///
/// # Errors
/// As [`run`]; `INTERNAL` with its words if it fails.
pub(crate) async fn succeed<S: AsRef<OsStr>>(
    program: &str,
    arguments: &[S],
    limit: Duration,
) -> Result<Output, Status> {
    let output = run(program, arguments, limit).await?;
    if output.code == Some(0) { Ok(output) } else { Err(output.failure(program)) }
}

impl Output {
    /// The error that its end is.
    pub(crate) fn failure(&self, program: &str) -> Status {
        let end = self.code.map_or("killed".to_owned(), |code| format!("exit code {code}"));
        let said = if self.said.is_empty() { "no message" } else { &self.said };
        Status::internal(format!("{program}: {end}: {said}"))
    }
}

fn find(program: &str) -> Result<PathBuf, Status> {
    let paths = DIRECTORIES.iter().map(|directory| Path::new(directory).join(program));
    let missing = || {
        Status::internal(format!(
            "{program} is not installed: the node needs e2fsprogs, xfsprogs, btrfs-progs, util-linux"
        ))
    };
    paths.into_iter().find(|path| path.is_file()).ok_or_else(missing)
}

/// Whether the programs that a test runs are there; if not, the test is left out, loudly, and in
/// CI it fails.
#[cfg(test)]
pub(crate) fn present(programs: &[&str]) -> bool {
    let missing: Vec<&str> = programs.iter().copied().filter(|p| find(p).is_err()).collect();
    let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(missing.is_empty() || !ci, "{missing:?} missing: scripts/setup installs them");
    if !missing.is_empty() {
        eprintln!("left out: {missing:?} missing, scripts/setup installs them");
    }
    missing.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn programs_get_arguments_and_no_shell() {
        let output = run("echo", &["$HOME; `id`", "*"], Duration::from_secs(5)).await.unwrap();
        assert_eq!((output.code, &*output.stdout), (Some(0), "$HOME; `id` *\n"));
        let failed = succeed("ls", &["/nonexistent"], Duration::from_secs(5)).await.err().unwrap();
        assert!(failed.message().starts_with("ls: exit code 2: "), "{failed}");
    }

    #[test]
    fn no_usage_is_passed_on() {
        let mkfs = "mkfs.ext4: invalid option -- 'x'\nUsage: mkfs.ext4 [-c|-l filename]\n\t[-b]\n";
        assert_eq!(said(mkfs), "mkfs.ext4: invalid option -- 'x'");
        assert_eq!(said("unknown option\n  usage: btrfs <command>\n"), "unknown option");
        assert_eq!(said("Usage: mkfs.xfs\n/* blocksize */\n"), "");
        assert_eq!(said("two\n  lines\n"), "two lines");
    }

    #[tokio::test]
    async fn programs_have_a_limit_and_must_exist() {
        let late = run("sleep", &["60"], Duration::from_millis(50)).await.err().unwrap();
        assert_eq!(late.message(), "sleep: not finished after 0 s");
        let missing = run("no-such-program", &["x"], Duration::from_secs(5)).await.err().unwrap();
        assert!(missing.message().contains("is not installed"), "{missing}");
    }
}
