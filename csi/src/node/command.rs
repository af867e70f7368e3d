//! Runs external programs such as mkfs and blkid. No shell is involved: arguments are a list, the
//! environment contains only PATH and the C locale, and each program has a time limit.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tonic::Status;

/// Directories that contain these programs.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// Maximum number of characters of a program's message that are kept.
const SHOWN_MAX: usize = 1000;

/// The result of a program.
pub(crate) struct Output {
    /// Its exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    /// Its standard output.
    pub(crate) stdout: String,
    /// Its message, for errors: what it wrote to stderr, or else to stdout, shortened.
    pub(crate) message: String,
}

/// Runs a program to its end.
///
/// # Errors
/// `INTERNAL`: it is not installed, does not start, or does not end within `limit`; then it is
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
    let message = message(if stderr.trim().is_empty() { &stdout } else { &stderr });
    Ok(Output { code: output.status.code(), stdout, message })
}

/// The message of a program on one line, without the usage text that many print after an error.
fn message(text: &str) -> String {
    let is_usage = |line: &str| {
        line.trim_start().get(..6).is_some_and(|start| start.eq_ignore_ascii_case("usage:"))
    };
    let lines = text.lines().take_while(|line| !is_usage(line));
    let words: Vec<_> = lines.flat_map(str::split_whitespace).collect();
    words.join(" ").chars().take(SHOWN_MAX).collect()
}

/// Runs a program that must succeed.
///
/// # Errors
/// As [`run`]; `INTERNAL` with its message if it fails.
pub(crate) async fn succeed<S: AsRef<OsStr>>(
    program: &str,
    arguments: &[S],
    limit: Duration,
) -> Result<Output, Status> {
    let output = run(program, arguments, limit).await?;
    if output.code == Some(0) { Ok(output) } else { Err(output.failure(program)) }
}

impl Output {
    /// The error for a program that failed.
    pub(crate) fn failure(&self, program: &str) -> Status {
        let end = self.code.map_or("killed".to_owned(), |code| format!("exit code {code}"));
        let message = if self.message.is_empty() { "no message" } else { &self.message };
        Status::internal(format!("{program}: {end}: {message}"))
    }
}

fn find(program: &str) -> Result<PathBuf, Status> {
    let paths = DIRECTORIES.iter().map(|directory| Path::new(directory).join(program));
    let missing = || {
        Status::internal(format!(
            "{program} is missing: install e2fsprogs, xfsprogs, btrfs-progs and util-linux"
        ))
    };
    paths.into_iter().find(|path| path.is_file()).ok_or_else(missing)
}

/// Whether the programs that a test needs are installed. If not, the test is skipped with a
/// message; in CI it fails.
#[cfg(test)]
pub(crate) fn present(programs: &[&str]) -> bool {
    let missing: Vec<&str> = programs.iter().copied().filter(|p| find(p).is_err()).collect();
    let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(missing.is_empty() || !ci, "{missing:?} missing: scripts/setup installs them");
    if !missing.is_empty() {
        eprintln!("skipped: {missing:?} missing, scripts/setup installs them");
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
    fn usage_texts_are_removed() {
        let mkfs = "mkfs.ext4: invalid option -- 'x'\nUsage: mkfs.ext4 [-c|-l filename]\n\t[-b]\n";
        assert_eq!(message(mkfs), "mkfs.ext4: invalid option -- 'x'");
        assert_eq!(message("unknown option\n  usage: btrfs <command>\n"), "unknown option");
        assert_eq!(message("Usage: mkfs.xfs\n/* blocksize */\n"), "");
        assert_eq!(message("two\n  lines\n"), "two lines");
    }

    #[tokio::test]
    async fn programs_have_a_time_limit_and_must_exist() {
        let late = run("sleep", &["60"], Duration::from_millis(50)).await.err().unwrap();
        assert_eq!(late.message(), "sleep: not finished after 0 s");
        let missing = run("no-such-program", &["x"], Duration::from_secs(5)).await.err().unwrap();
        assert!(missing.message().contains("is missing: install"), "{missing}");
    }
}
