//! The helper process: it does what may wait for the I/O of a device that the daemon serves.
//!
//! A thread that waits for I/O inside the kernel cannot be killed. Its process does not end as long as
//! the thread waits: its sockets stay open and the pool stays locked. If the daemon itself waited for the
//! I/O of a device that it serves, SIGKILL at that moment would be a deadlock: the I/O waits for the next
//! daemon, and the next daemon waits for the lock of the pool. So the daemon never opens, flushes or
//! adjusts a device that may have I/O. It starts its own program again to do that, in a process that has
//! none of its files open:
//!
//! ```text
//! daemon                              pandod device-apart hold /dev/nbd0 43 0
//!   |--- starts ------------------------> opens it exclusively, writes back what is dirty
//!   |<-- stdout: "held" ----------------- waits for the end of its stdin
//!   |    removes the device
//!   '--- closes its stdin --------------> ends, and with it the last use of the device
//! ```
//!
//! If the daemon is killed meanwhile, the helper waits until the next daemon serves the device. Then it
//! finds that its stdin was closed, and ends. The next helper for the device waits for that.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};

use super::driver::DeviceNode;
use super::held::{self, HELPER_ARGUMENT};
use crate::error::{Error, ErrorKind, Result};

/// This program, even if its file has been replaced since it was started.
const PROGRAM: &str = "/proc/self/exe";

const HOLD: &str = "hold";
const LOOK_EARLY: &str = "look-early";

/// First words of answers.
const HELD: &str = "held";
const BUSY: &str = "busy";
const FAILED: &str = "failed";

/// Does what the arguments of this process say, if they are those of a helper process; every
/// program with devices calls this first.
#[must_use]
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let arguments: Vec<String> =
        arguments.into_iter().filter_map(|word| word.into_string().ok()).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        [_, HELPER_ARGUMENT, HOLD, path, major, minor] => node(path, major, minor).map_or_else(
            || Err(io::ErrorKind::InvalidInput.into()),
            |node| hold_for_somebody(&node),
        ),
        [_, HELPER_ARGUMENT, LOOK_EARLY, file] => held::write_look_after(&PathBuf::from(file)),
        [_, HELPER_ARGUMENT, ..] => Err(io::ErrorKind::InvalidInput.into()),
        _ => return None,
    };
    Some(if done.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn node(path: &str, major: &str, minor: &str) -> Option<DeviceNode> {
    Some(DeviceNode { path: path.into(), major: major.parse().ok()?, minor: minor.parse().ok()? })
}

/// Holds a device until whoever has started this process lets go of it or is dead.
fn hold_for_somebody(node: &DeviceNode) -> io::Result<()> {
    let mut stdout = io::stdout();
    let held = match held::hold(node) {
        Ok((file, lost)) => {
            writeln!(stdout, "{HELD} {}", line(lost.as_ref().map_or(&"" as &dyn Display, |e| e)))?;
            Some(file)
        }
        Err(error) if error.kind() == ErrorKind::Busy => {
            writeln!(stdout, "{BUSY} {}", line(&error))?;
            None
        }
        Err(error) => {
            writeln!(stdout, "{FAILED} {} {}", error.errno(), line(&error))?;
            None
        }
    };
    stdout.flush()?;
    if let Some(file) = held {
        io::stdin().read_to_end(&mut Vec::new())?;
        drop(file);
    }
    Ok(())
}

fn line(text: &dyn Display) -> String {
    text.to_string().replace('\n', " ")
}

/// A helper process, until this is dropped: dropping waits for its end.
struct Helper(Child);

impl Helper {
    fn start(words: &[&str]) -> Result<Self> {
        let mut command = Command::new(PROGRAM);
        command.arg0("pandod").arg(HELPER_ARGUMENT).args(words).env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let child = command.spawn().map_err(|error| Error::io("helper process", error))?;
        Ok(Self(child))
    }

    /// The next line that it says; empty when it has ended.
    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        if let Some(stdout) = &mut self.0.stdout {
            let read = BufReader::new(stdout).read_line(&mut line);
            read.map_err(|error| Error::io("answer of the helper process", error))?;
        }
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // It ends by itself; there is nothing to be done about one that cannot be waited for.
        let _ignored = self.0.wait();
    }
}

/// A device that is held: nobody mounts it, or takes it for himself otherwise.
pub(super) struct Held {
    _process: Helper,
}

/// Takes a device away from everybody, and writes back what the kernel still holds for it. Blocks
/// for as long as that takes; dropping what is returned blocks until the device is let go of.
///
/// # Errors
/// `Busy` while it is mounted, held by another device, or open in a program that can be seen.
pub(super) fn hold(node: &DeviceNode) -> Result<Held> {
    let shown = node.path.display().to_string();
    let (major, minor) = (node.major.to_string(), node.minor.to_string());
    let mut process = Helper::start(&[HOLD, &shown, &major, &minor])?;
    let answer = process.answer()?;
    let (word, rest) = answer.split_once(' ').unwrap_or((&answer, ""));
    match word {
        HELD => {
            if !rest.is_empty() {
                // Who wrote it without asking for more will not hear of it; it must not stay for
                // that.
                tracing::warn!(device = shown, error = rest, "device is removed with writes lost");
            }
            Ok(Held { _process: process })
        }
        BUSY => Err(Error::new(ErrorKind::Busy, rest)),
        FAILED => {
            let (errno, what) = rest.split_once(' ').unwrap_or((rest, ""));
            let errno = errno.parse().unwrap_or(libc::EIO);
            Err(Error::io(what, io::Error::from_raw_os_error(errno)))
        }
        _ => {
            let what = format!("{shown}: the process that was to hold it has ended");
            Err(Error::io(what, io::ErrorKind::UnexpectedEof.into()))
        }
    }
}

/// Lets the kernel ask the driver of a device early about requests that take long; see
/// [`held::LOOK_AFTER`]. Blocks until all its I/O under way has ended, as the kernel does not change
/// the setting before.
pub(super) fn look_early(node: &DeviceNode) {
    let file = held::sysfs(node).join(held::LOOK_AFTER_FILE);
    if held::looks_early(&file) {
        return;
    }
    let started = Helper::start(&[LOOK_EARLY, &file.display().to_string()]);
    let ended = started.ok().and_then(|mut process| process.0.wait().ok());
    if !ended.is_some_and(|status| status.success()) {
        held::warn_of_late_looks(&node.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_words(words: &[&str]) -> Option<ExitCode> {
        run(words.iter().map(OsString::from))
    }

    #[test]
    fn only_its_own_arguments_are_taken() {
        assert!(run_words(&["pandod"]).is_none());
        assert!(run_words(&["pandod", "--pool", HELPER_ARGUMENT]).is_none());
        for words in [
            &[HELPER_ARGUMENT][..],
            &[HELPER_ARGUMENT, HOLD, "/dev/null", "1", "x"],
            &[HELPER_ARGUMENT, "other"],
        ] {
            let code = run_words(&[&["pandod"][..], words].concat());
            assert_eq!(code, Some(ExitCode::FAILURE), "{words:?}");
        }
    }
}
