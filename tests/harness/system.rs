//! A daemon of its own for each test: a directory with a pool in a file, a configuration, sockets
//! and a log. Nothing outside the directory is touched; it goes with the test.

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::cli::Cli;
use crate::devices;

/// Longest time for a start, recovery included, and for an orderly end.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between looks at something that takes its time.
const PAUSE: Duration = Duration::from_millis(5);

/// Lines of the daemon's log that a failed test shows.
const LOG_LINES_SHOWN: usize = 60;

/// The variable with the directory of the programs under test.
const PROGRAMS: &str = "PANDO_PROGRAMS";

/// The directory of the programs under test: the one that `PANDO_PROGRAMS` names, where `scripts/test`
/// puts programs that are built as they are shipped. Without it that of the test's own executable.
///
/// # Panics
/// The executable does not know where it is.
#[must_use]
pub fn programs() -> PathBuf {
    if let Some(directory) = std::env::var_os(PROGRAMS) {
        return directory.into();
    }
    let executable = std::env::current_exe().expect("an executable has a path");
    let directory = executable.parent().expect("it lies in a directory");
    let directory = if directory.ends_with("deps") { directory.parent() } else { Some(directory) };
    directory.expect("cargo's layout").to_owned()
}

/// A directory, a pool, and a daemon on it while it runs.
pub struct System {
    directory: TempDir,
    pool: PathBuf,
    extra: String,
    /// The daemon's program, if it is not the one beside the tests.
    program: Option<PathBuf>,
    child: Option<Child>,
    starts: usize,
}

impl System {
    /// A directory without a pool.
    ///
    /// # Panics
    /// The directory cannot be made.
    #[must_use]
    pub fn empty() -> Self {
        let directory = tempfile::Builder::new().prefix("pando-").tempdir();
        let directory = directory.expect("a directory for a test");
        let pool = directory.path().join("pool");
        Self { directory, pool, extra: String::new(), program: None, child: None, starts: 0 }
    }

    /// A pool of `size` (`256MiB`) in a sparse file, and the daemon running on it.
    ///
    /// # Panics
    /// One of the two does not work.
    #[must_use]
    pub fn start(size: &str) -> Self {
        Self::with(size, "")
    }

    /// The same with more lines of configuration.
    ///
    /// # Panics
    /// As [`Self::start`].
    #[must_use]
    pub fn with(size: &str, extra: &str) -> Self {
        let mut system = Self::empty();
        system.configure(extra);
        system.create_pool(&["--size", size, "--allocate", "sparse"]);
        system.spawn();
        system
    }

    /// Makes the pool.
    ///
    /// # Panics
    /// It fails.
    pub fn create_pool(&self, options: &[&str]) {
        let pool = self.pool.to_str().expect("paths of tests are text");
        self.cli().run(&[&["pool", "create", pool], options].concat());
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The file of the pool.
    #[must_use]
    pub fn pool(&self) -> &Path {
        &self.pool
    }

    /// Puts the pool elsewhere, for instance on a file system of its own.
    pub fn move_pool(&mut self, path: PathBuf) {
        self.pool = path;
    }

    /// The command line for this daemon.
    #[must_use]
    pub fn cli(&self) -> Cli {
        Cli::new(&programs(), &self.socket())
    }

    /// More lines of configuration, from the next start on.
    pub fn configure(&mut self, extra: &str) {
        extra.clone_into(&mut self.extra);
    }

    /// The program of the daemon from the next start on; the one beside the tests if none.
    pub fn use_daemon(&mut self, program: Option<PathBuf>) {
        self.program = program;
    }

    fn socket(&self) -> PathBuf {
        self.path().join("pando.sock")
    }

    fn log_path(&self) -> PathBuf {
        self.path().join("log")
    }

    /// What the daemon has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Starts the daemon and waits until it answers.
    ///
    /// # Panics
    /// It ends instead; the log says why.
    pub fn spawn(&mut self) {
        if let Err(log) = self.try_spawn() {
            panic!("pandod does not start:\n{log}");
        }
    }

    /// Starts the daemon and waits until it answers, or has ended.
    ///
    /// # Errors
    /// The log of a daemon that has ended.
    ///
    /// # Panics
    /// It does neither in time.
    pub fn try_spawn(&mut self) -> Result<(), String> {
        self.try_spawn_with(|_| ())
    }

    /// The same; `adjust` changes the command before it is run.
    ///
    /// # Errors
    /// As [`Self::try_spawn`].
    ///
    /// # Panics
    /// As [`Self::try_spawn`].
    pub fn try_spawn_with(&mut self, adjust: impl FnOnce(&mut Command)) -> Result<(), String> {
        // A daemon that was killed has left its socket: ready is who accepts on it.
        let child = self.launch(adjust);
        let mut child = Reaped(Some(child));
        let since = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            if child.get().try_wait().expect("a child can be asked").is_some() {
                return Err(self.log());
            }
            assert!(since.elapsed() < PATIENCE, "pandod is not ready in time:\n{}", self.log());
            std::thread::sleep(PAUSE);
        }
        self.child = child.0.take();
        // The socket is there before the pool is open: the first answer is what counts.
        let ready = self.cli().output(&["pool", "status"]);
        if ready.status.success() {
            return Ok(());
        }
        self.wait();
        Err(self.log())
    }

    /// Starts the daemon and waits for nothing.
    fn launch(&mut self, adjust: impl FnOnce(&mut Command)) -> Child {
        assert!(self.child.is_none(), "one daemon at a time");
        self.starts += 1;
        let log = File::options().append(true).create(true).open(self.log_path());
        let program = self.program.clone().unwrap_or_else(|| programs().join("pandod"));
        let mut command = Command::new(program);
        command.arg("--config").arg(self.write_config()).stdin(Stdio::null());
        command.stderr(log.expect("a log"));
        adjust(&mut command);
        command.spawn().expect("pandod starts; `make test` builds it")
    }

    /// Starts the daemon and kills it soon, ready or not; whether it was there to be killed.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn spawn_and_kill(&mut self, after: Duration) -> bool {
        self.child = Some(self.launch(|_| ()));
        std::thread::sleep(after);
        self.try_kill()
    }

    fn write_config(&self) -> PathBuf {
        let path = self.path().join("pandod.toml");
        let shown = |path: &Path| format!("{:?}", path.to_str().expect("paths of tests are text"));
        let mut text = String::new();
        // Each by itself: daemons of earlier versions, which campaigns start, have no `run_dir`.
        let lines = [
            ("pool", shown(&self.pool)),
            ("socket", shown(&self.socket())),
            ("nbd_dir", shown(&self.path().join("nbd"))),
            ("devices_dir", shown(&self.path().join("devices"))),
            ("journal_dir", shown(&self.path().join("journal"))),
        ];
        for (key, value) in lines {
            writeln!(text, "{key} = {value}").expect("text grows");
        }
        text.push_str(&self.extra);
        std::fs::write(&path, text).expect("a configuration");
        path
    }

    /// SIGKILL, now.
    ///
    /// # Panics
    /// The daemon has ended by itself.
    pub fn kill(&mut self) {
        assert!(self.try_kill(), "pandod has ended by itself:\n{}", self.log());
    }

    /// SIGKILL, now; false if the daemon has ended by itself.
    ///
    /// # Panics
    /// None was started.
    pub fn try_kill(&mut self) -> bool {
        let mut child = self.child.take().expect("a daemon runs");
        let ended = child.try_wait().expect("a child can be asked");
        child.kill().expect("a child can be killed");
        child.wait().expect("a child ends");
        ended.is_none()
    }

    /// Another signal.
    ///
    /// # Panics
    /// No daemon runs.
    pub fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("a daemon runs");
        kill_process(Pid::from_child(child), signal).expect("a child can be signalled");
    }

    /// SIGTERM, and an orderly end.
    ///
    /// # Panics
    /// It does not end in time, or not in good order.
    pub fn stop(&mut self) {
        let status = self.terminate();
        assert!(status.success(), "pandod ends with {status}:\n{}", self.log());
    }

    /// SIGTERM, and any end.
    ///
    /// # Panics
    /// It does not end in time.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// Process id of the daemon.
    ///
    /// # Panics
    /// None runs.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a daemon runs").id()
    }

    /// Waits for an end that is under way.
    fn wait(&mut self) -> ExitStatus {
        let mut child = Reaped(self.child.take());
        let since = Instant::now();
        loop {
            if let Some(status) = child.get().try_wait().expect("a child can be asked") {
                child.0 = None;
                return status;
            }
            assert!(since.elapsed() < PATIENCE, "pandod does not end:\n{}", self.log());
            std::thread::sleep(PAUSE);
        }
    }

    /// SIGKILL and a start.
    ///
    /// # Panics
    /// As [`Self::kill`] and [`Self::spawn`].
    pub fn crash(&mut self) {
        self.kill();
        self.spawn();
    }

    /// Verifies the pool while the daemon runs.
    ///
    /// # Panics
    /// Something is wrong with it.
    pub fn check(&self) {
        let report = self.cli().json(&["pool", "check"]);
        let findings = report["findings"].as_array().expect("a report has findings");
        assert!(findings.is_empty(), "{findings:#?}");
    }
}

impl Drop for System {
    fn drop(&mut self) {
        drop(Reaped(self.child.take()));
        devices::clean(self.path());
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let last = lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n");
            eprintln!("end of the log of pandod after {} starts:\n{last}", self.starts);
        }
    }
}

/// A child that does not outlive its owner.
struct Reaped(Option<Child>);

impl Reaped {
    const fn get(&mut self) -> &mut Child {
        self.0.as_mut().expect("taken only at the end")
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            child.kill().unwrap_or_default();
            child.wait().map(|_| ()).unwrap_or_default();
        }
    }
}
