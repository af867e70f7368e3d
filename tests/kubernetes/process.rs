//! A program of the cluster that runs: with a log of its own, and ended with what started it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// Longest time for an orderly end.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between looks at something that takes its time.
pub(crate) const PAUSE: Duration = Duration::from_millis(50);
/// Lines of a log that an error shows.
const LINES_SHOWN: usize = 15;

/// One program.
pub(crate) struct Process {
    name: String,
    log: PathBuf,
    child: Child,
}

impl Process {
    /// Starts a program that writes into `logs`/`name`.
    pub(crate) fn start(logs: &Path, name: &str, command: &mut Command) -> Result<Self> {
        let log = logs.join(name);
        let file = File::options().append(true).create(true).open(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("{name} does not start"))?;
        Ok(Self { name: name.to_owned(), log, child })
    }

    /// Its log so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The error of a program that has ended although it should run.
    pub(crate) fn alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let last = lines.len().saturating_sub(LINES_SHOWN);
            bail!("{} ended with {status}:\n{}", self.name, lines[last..].join("\n"));
        }
        Ok(())
    }

    /// SIGKILL, now.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, and its end.
    fn end(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            kill_process(Pid::from_child(&self.child), Signal::TERM)?;
            let since = Instant::now();
            while self.child.try_wait()?.is_none() {
                if since.elapsed() >= PATIENCE {
                    self.child.kill()?;
                    self.child.wait()?;
                    bail!("{} did not end in {PATIENCE:?}", self.name);
                }
                std::thread::sleep(PAUSE);
            }
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("{error}");
        }
    }
}

/// Looks until something is there.
///
/// # Errors
/// That of a look; or that it took longer than `limit`, with what the last look saw.
pub(crate) fn until<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Seen<T>>,
) -> Result<T> {
    let since = Instant::now();
    loop {
        match look()? {
            Seen::There(found) => return Ok(found),
            Seen::NotYet(state) => {
                ensure!(since.elapsed() < limit, "{what}: not within {limit:?}; {state}");
            }
        }
        std::thread::sleep(PAUSE);
    }
}

/// What a look saw.
pub(crate) enum Seen<T> {
    /// What was waited for.
    There(T),
    /// Something else.
    NotYet(String),
}

impl<T> Seen<T> {
    /// What was waited for, if there is some.
    pub(crate) fn of(found: Option<T>, state: impl FnOnce() -> String) -> Self {
        found.map_or_else(|| Self::NotYet(state()), Self::There)
    }
}

impl Seen<()> {
    /// Whether it is so.
    pub(crate) fn is(so: bool, state: impl FnOnce() -> String) -> Self {
        Self::of(so.then_some(()), state)
    }
}
