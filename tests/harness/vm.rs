//! A virtual machine with a kernel that has what this one lacks: for one suite of
//! `tests/bin/guest`, or to have its power cut.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::system::programs;
use crate::tools;

/// What starting a machine takes.
const PROGRAMS: [&str; 6] = ["qemu-system-x86_64", "busybox", "cpio", "depmod", "strip", "dmsetup"];
/// Longest time for a machine to say something that it must say.
const PATIENCE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(5);

/// One machine at a time: it emulates as many processors as there are.
static TURN: Mutex<()> = Mutex::new(());

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts").join(name)
}

/// Whether machines can be had; if not, the caller returns.
///
/// # Panics
/// With CI=true, where nothing may be left out.
#[must_use]
pub fn possible() -> bool {
    tools::present(&PROGRAMS)
}

/// Runs a suite in a machine of its own; all of `cases` must be passed and nothing else.
/// Returns what the console said. Without the programs that it takes, the suite is left out.
///
/// # Panics
/// A case is missing or failed, or the machine did not end in good order.
pub fn run(suite: &str, cases: &[&str]) -> Option<String> {
    if !possible() {
        return None;
    }
    let _turn = TURN.lock();
    let output = Command::new(script("vm"))
        .arg(programs())
        .arg(suite)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .expect("scripts/vm starts");
    let console = String::from_utf8_lossy(&output.stdout).into_owned();
    check(suite, &console, cases);
    assert!(output.status.success(), "suite {suite}: {}\n{console}", output.status);
    Some(console)
}

/// The cases that a console tells of are these, and all were passed.
///
/// # Panics
/// They are not.
pub fn check(suite: &str, console: &str, cases: &[&str]) {
    let lines = console.lines().map(|line| line.trim_end_matches('\r'));
    let passed: Vec<&str> = lines.filter_map(|l| l.strip_prefix("PASS ")).collect();
    assert!(passed == cases, "suite {suite}: passed {passed:?} of {cases:?}\n{console}");
}

/// The initial file system of machines that are booted again and again.
pub struct Root {
    file: PathBuf,
}

impl Root {
    /// Makes it, in `directory`.
    ///
    /// # Panics
    /// It cannot be made.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        let file = directory.join("root");
        let mut command = Command::new(script("vm-root"));
        let status = command.arg(programs()).arg(&file).arg("small").status();
        assert!(status.expect("scripts/vm-root starts").success(), "an initial file system");
        Self { file }
    }
}

/// A machine that runs, until its power goes.
pub struct Machine {
    child: Child,
    console: PathBuf,
    said: PathBuf,
}

impl Machine {
    /// Boots one, which runs pando-guest with `words`, with its disks, as the emulator's option
    /// `-drive` takes them. Files for its console and its second serial port are in `directory`.
    ///
    /// # Panics
    /// The emulator does not start.
    #[must_use]
    pub fn boot(root: &Root, words: &str, drives: &[String], directory: &Path) -> Self {
        let (console, said) = (directory.join("console"), directory.join("said"));
        let out = File::create(&console).expect("a file");
        File::create(&said).expect("a file");
        let mut command = Command::new(script("vm-boot"));
        command.arg(&root.file).arg(words).arg("-serial").arg(format!("file:{}", said.display()));
        for drive in drives {
            command.arg("-drive").arg(drive);
        }
        let errors = out.try_clone().expect("a file");
        command.stdin(Stdio::null()).stdout(out).stderr(errors);
        Self { child: command.spawn().expect("scripts/vm-boot starts"), console, said }
    }

    /// What the machine has said on its console.
    #[must_use]
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// What it has said on its second serial port, in whole lines: it is outside of the machine.
    #[must_use]
    pub fn said(&self) -> Vec<String> {
        let bytes = std::fs::read(&self.said).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| line.trim_end_matches('\r').to_owned()).collect()
    }

    /// Waits until it has said this there.
    ///
    /// # Errors
    /// It ends, or does not say it in time; what is on its console.
    pub fn await_word(&mut self, word: &str) -> Result<(), String> {
        self.await_said(word, |said| said.iter().any(|line| line == word))
    }

    /// Waits until it has said so many lines there.
    ///
    /// # Errors
    /// It ends, or does not say them in time; what is on its console.
    pub fn await_lines(&mut self, count: usize) -> Result<(), String> {
        self.await_said("more", |said| said.len() >= count)
    }

    fn await_said(&mut self, what: &str, found: impl Fn(&[String]) -> bool) -> Result<(), String> {
        let since = Instant::now();
        while !found(&self.said()) {
            if self.ended() || since.elapsed() > PATIENCE {
                return Err(format!("the machine does not say {what:?}:\n{}", self.console()));
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Whether it has been turned off, or has failed.
    ///
    /// # Panics
    /// It cannot be asked.
    pub fn ended(&mut self) -> bool {
        self.child.try_wait().expect("a child can be asked").is_some()
    }

    /// Waits until it is turned off.
    ///
    /// # Panics
    /// It is not, in time.
    pub fn await_end(&mut self, limit: Duration) {
        let since = Instant::now();
        while !self.ended() {
            assert!(since.elapsed() < limit, "the machine does not end:\n{}", self.console());
            std::thread::sleep(PAUSE);
        }
    }

    /// Its power goes, now.
    ///
    /// # Errors
    /// It has been turned off before; what is on its console.
    ///
    /// # Panics
    /// It cannot be killed.
    pub fn cut_power(&mut self) -> Result<(), String> {
        if self.ended() {
            return Err(format!("the machine has ended by itself:\n{}", self.console()));
        }
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child ends");
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.child.kill().unwrap_or_default();
        self.child.wait().map(|_| ()).unwrap_or_default();
    }
}
