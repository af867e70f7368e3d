//! Programs that change files on a mounted file system, in a process of their own, which knows what
//! is in each file.
//!
//! It is another process than the one that kills and starts the daemon, and for a reason: whoever
//! starts a program has it inherit his open files until it is executed. If one of them is on a volume
//! and was closed meanwhile, then the new daemon is the last to let go of it, and waits for the
//! file's data to be written, which nobody but this daemon can do.
//!
//! ```text
//! pando-guest load ROOT SEED     stdin              stdout
//!                                "stop"   -->       "stopped", everything is synced and closed
//!                                "check"  -->       "right", what is read is what was written
//! ```

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pando_engine::units::to_u64;
use pando_tests::noise::Noise;
use pando_tests::tools::text;

use crate::machine::{Files, check_files};

/// The first argument of the process.
pub(crate) const WORD: &str = "load";
/// Programs that change files at the same time.
const WRITERS: u64 = 3;
/// Files of each.
const FILES: u64 = 24;
const SYNC_PAUSE: Duration = Duration::from_millis(200);

/// The process, as the one that has started it sees it.
pub(crate) struct Load {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Load {
    /// Begins to change files below `root`.
    pub(crate) fn start(root: &Path, seed: u64) -> Self {
        let program = std::env::current_exe().expect("an executable has a path");
        let mut command = Command::new(program);
        command.args([WORD, text(root), &seed.to_string()]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.expect("the load starts");
        let stdin = child.stdin.take().expect("it has a stdin");
        let stdout = BufReader::new(child.stdout.take().expect("it has a stdout"));
        let mut load = Self { child, stdin, stdout };
        load.expect("started");
        load
    }

    fn expect(&mut self, word: &str) {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("the load answers");
        assert_eq!(line.trim_end(), word, "the load has failed");
    }

    fn tell(&mut self, word: &str) {
        writeln!(self.stdin, "{word}").expect("the load listens");
    }

    /// Whether it goes on, without an error.
    pub(crate) fn goes_on(&mut self) -> bool {
        self.child.try_wait().expect("a child can be asked").is_none()
    }

    /// Ends the changes, and waits until they are on the disk.
    pub(crate) fn stop(&mut self) {
        self.tell("stop");
        self.expect("stopped");
    }

    /// Reads all files, wherever they come from by now, and compares.
    pub(crate) fn check(&mut self) {
        self.tell("check");
        self.expect("right");
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // It may be waiting in the kernel, so it is not waited for.
        self.child.kill().unwrap_or_default();
    }
}

/// The process itself.
pub(crate) fn main(root: &Path, seed: u64) -> ExitCode {
    // An error of one writer is the end of all.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        usual(info);
        std::process::exit(101);
    }));
    let stop = Arc::new(AtomicBool::new(false));
    fs::create_dir_all(root).expect("a directory");
    let writers = (0..WRITERS).map(|number| {
        let (root, stop) = (root.join(format!("w{number}")), Arc::clone(&stop));
        thread::spawn(move || change_files(&root, seed + number, &stop))
    });
    let writers: Vec<_> = writers.collect();
    // Beside them somebody who wants everything on the disk.
    let (place, over) = (root.to_owned(), Arc::clone(&stop));
    let syncer = thread::spawn(move || {
        while !over.load(Ordering::Relaxed) {
            sync(&place);
            thread::sleep(SYNC_PAUSE);
        }
    });
    say("started");
    let mut told = io::stdin().lines().map(|line| line.expect("a line"));
    assert_eq!(told.next().as_deref(), Some("stop"));
    stop.store(true, Ordering::Relaxed);
    let files: Vec<_> = writers.into_iter().map(|w| w.join().expect("no error")).collect();
    syncer.join().expect("no error");
    sync(root);
    say("stopped");
    for line in told {
        assert_eq!(line, "check");
        assert!(files.iter().map(Files::len).sum::<usize>() > 0, "there are files");
        files.iter().for_each(check_files);
        say("right");
    }
    ExitCode::SUCCESS
}

fn say(word: &str) {
    writeln!(io::stdout(), "{word}").expect("somebody listens");
}

fn sync(root: &Path) {
    rustix::fs::syncfs(File::open(root).expect("the root")).expect("syncfs");
}

/// One program: makes, overwrites, renames, cuts and removes files of its own, and knows what is
/// in each. Any error ends it.
fn change_files(root: &Path, seed: u64, stop: &AtomicBool) -> Files {
    let mut noise = Noise::new(seed);
    let mut files = Files::new();
    fs::create_dir_all(root).expect("a directory");
    while !stop.load(Ordering::Relaxed) {
        change(root, &mut noise, &mut files);
    }
    files
}

fn change(root: &Path, noise: &mut Noise, files: &mut Files) {
    let name = |noise: &mut Noise| -> PathBuf { root.join(format!("f{}", noise.below(FILES))) };
    let path = name(noise);
    let length = usize::try_from(noise.below(100_000)).expect("it is small");
    match noise.below(8) {
        0 => {
            fs::remove_file(&path).unwrap_or_else(|error| {
                assert!(error.kind() == io::ErrorKind::NotFound, "remove: {error}");
            });
            files.remove(&path);
        }
        1 => {
            if let Some(content) = files.remove(&path) {
                let other = name(noise);
                fs::rename(&path, &other).expect("rename");
                files.insert(other, content);
            }
        }
        2 => {
            if let Some(content) = files.get_mut(&path) {
                let length = length % (content.len() + 1);
                let file = File::options().write(true).open(&path).expect("open");
                file.set_len(to_u64(length)).expect("truncate");
                content.truncate(length);
            }
        }
        way => {
            let content = noise.bytes(length);
            let mut file = File::create(&path).expect("create");
            file.write_all(&content).expect("write");
            if way == 3 {
                file.sync_all().expect("fsync");
            }
            files.insert(path, content);
        }
    }
}
