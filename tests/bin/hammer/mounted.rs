//! A mounted file system on the loop device of a volume, whose daemon is killed under a changing
//! tree. Afterwards the file system is sound, and all that was synced is in it.
//!
//! ```text
//! attach -> mount -> writers, each in a directory of its own -> SIGKILL -> unmount what is dead
//!   ^                                                                          |
//!   `--- compare files with the log <- mount <- fsck <- mount, unmount <- attach <- restart
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pando_engine::units::{to_u64, to_usize};
use pando_tests::System;
use pando_tests::devices::Mounted;
use pando_tests::noise::Noise;
use pando_tests::tools::{output, run};
use serde_json::{Value, json};

/// Programs that change files at the same time.
const WRITERS: u64 = 3;
/// Files of each.
const FILES: u64 = 40;
const FILE_BYTES_MAX: u64 = 150_000;
/// What is overwritten in place at once.
const PIECE_BYTES_MAX: u64 = 20_000;
/// Least and most time under load; most rounds are short.
const LIFE_MS: (u64, u64) = (150, 3000);

/// A file system: how it is made, how it is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Fs {
    Ext4,
    Xfs,
}

impl Fs {
    /// What it takes.
    pub(crate) const fn programs(self) -> [&'static str; 4] {
        match self {
            Self::Ext4 => ["mkfs.ext4", "e2fsck", "mount", "umount"],
            Self::Xfs => ["mkfs.xfs", "xfs_repair", "mount", "umount"],
        }
    }

    /// Smaller ones are refused by mkfs.
    const fn size(self) -> &'static str {
        match self {
            Self::Ext4 => "96MiB",
            Self::Xfs => "320MiB",
        }
    }

    fn make(self, device: &str) {
        match self {
            Self::Ext4 => run("mkfs.ext4", &["-q", device]),
            Self::Xfs => run("mkfs.xfs", &["-q", device]),
        };
    }

    /// What is wrong with it.
    fn check(self, device: &str) -> Result<(), String> {
        let done = match self {
            Self::Ext4 => output("e2fsck", &["-fn", device]),
            Self::Xfs => output("xfs_repair", &["-n", device]),
        };
        let said = [done.stdout, done.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        done.status.success().then_some(()).ok_or_else(|| format!("{self:?}: {said}"))
    }
}

/// What a file must be.
#[derive(Clone, Debug)]
enum State {
    /// Synced, with its directory.
    Synced(Vec<u8>),
    /// Synced and then changed, without a word that the change is done: anything that was written.
    Changing,
}

/// The files that a writer has ever synced, by their names.
type Tree = BTreeMap<String, State>;

/// Changes files of its own, and keeps the log.
struct Writer {
    name: String,
    /// Its directory, in the present mount.
    root: PathBuf,
    noise: Noise,
    tree: Tree,
    syncs: u64,
    /// Set before the daemon is killed. A file system that has lost its device is made read-only (ext4)
    /// or shut down (XFS), and may say from then on that there was nothing to sync: that is no promise.
    killed: Arc<AtomicBool>,
}

impl Writer {
    /// Until an error, which is the end of the daemon.
    fn run(&mut self) {
        while self.step().is_ok() {}
    }

    fn step(&mut self) -> io::Result<()> {
        fs::create_dir_all(&self.root)?;
        let name = format!("f{}", self.noise.below(FILES));
        match self.noise.below(10) {
            0 => self.remove(&name),
            1 => self.rename(&name),
            2 | 3 => self.change(&name),
            // A load that nobody has synced.
            4 | 5 => {
                let scratch = self.root.join(format!("unsynced{}", self.noise.below(4)));
                fs::write(scratch, self.bytes(FILE_BYTES_MAX))
            }
            _ => self.replace(&name),
        }
    }

    fn bytes(&mut self, max: u64) -> Vec<u8> {
        let len = to_usize(self.noise.below(max));
        self.noise.bytes(len)
    }

    fn sync_directory(&mut self) -> io::Result<()> {
        File::open(&self.root)?.sync_all()?;
        self.synced()
    }

    /// A sync has succeeded. If that means something, it is counted.
    fn synced(&mut self) -> io::Result<()> {
        if self.killed.load(Ordering::SeqCst) {
            return Err(io::Error::other("the daemon was killed meanwhile"));
        }
        self.syncs += 1;
        Ok(())
    }

    /// A file is changed from here on, and if it is one that was synced, it may be anything.
    fn touch(&mut self, name: &str) -> Option<Vec<u8>> {
        match self.tree.insert(name.to_owned(), State::Changing) {
            Some(State::Synced(content)) => Some(content),
            Some(State::Changing) | None => None,
        }
    }

    /// A new content takes the place of the old one, or of none, as editors do it.
    fn replace(&mut self, name: &str) -> io::Result<()> {
        let content = self.bytes(FILE_BYTES_MAX);
        let fresh = self.root.join(format!("{name}.new"));
        let mut file = File::create(&fresh)?;
        file.write_all(&content)?;
        file.sync_all()?;
        self.touch(name);
        fs::rename(&fresh, self.root.join(name))?;
        self.sync_directory()?;
        self.tree.insert(name.to_owned(), State::Synced(content));
        Ok(())
    }

    /// A part is overwritten in place.
    fn change(&mut self, name: &str) -> io::Result<()> {
        let Some(State::Synced(_)) = self.tree.get(name) else { return Ok(()) };
        let piece = self.bytes(PIECE_BYTES_MAX);
        let Some(mut content) = self.touch(name) else { return Ok(()) };
        let at = to_usize(self.noise.below(to_u64(content.len()) + 1));
        let file = File::options().write(true).open(self.root.join(name))?;
        file.write_all_at(&piece, to_u64(at))?;
        file.sync_data()?;
        self.synced()?;
        content.resize(content.len().max(at + piece.len()), 0);
        content[at..at + piece.len()].copy_from_slice(&piece);
        self.tree.insert(name.to_owned(), State::Synced(content));
        Ok(())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.touch(name);
        match fs::remove_file(self.root.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.sync_directory()?;
        self.tree.remove(name);
        Ok(())
    }

    fn rename(&mut self, name: &str) -> io::Result<()> {
        let Some(State::Synced(_)) = self.tree.get(name) else { return Ok(()) };
        let other = format!("f{}", self.noise.below(FILES));
        if other == name {
            return Ok(());
        }
        let content = self.touch(name);
        self.touch(&other);
        fs::rename(self.root.join(name), self.root.join(&other))?;
        self.sync_directory()?;
        self.tree.remove(name);
        if let Some(content) = content {
            self.tree.insert(other, State::Synced(content));
        }
        Ok(())
    }

    /// Compares what was synced with what is there; then what is there is what was synced.
    fn verify(&mut self) -> Result<u64, String> {
        let mut compared = 0;
        for (name, state) in std::mem::take(&mut self.tree) {
            let path = self.root.join(&name);
            let found = fs::read(&path);
            let found = match (found, &state) {
                (Err(error), State::Changing) if error.kind() == ErrorKind::NotFound => continue,
                (found, _) => found.map_err(|error| format!("{}: {error}", path.display()))?,
            };
            if let State::Synced(content) = &state {
                if let Some(why) = difference(content, &found) {
                    return Err(format!("{} was synced, {why}", path.display()));
                }
                compared += 1;
            }
            self.tree.insert(name, State::Synced(found));
        }
        Ok(compared)
    }
}

fn difference(expected: &[u8], found: &[u8]) -> Option<String> {
    if expected == found {
        return None;
    }
    let at = expected.iter().zip(found).take_while(|(left, right)| left == right).count();
    Some(format!(
        "has {} bytes of {}, the first that is wrong at {at}",
        found.len(),
        expected.len()
    ))
}

/// What is wished.
pub(crate) struct Options {
    pub(crate) fs: Fs,
    pub(crate) kills: u64,
    pub(crate) seconds: u64,
    pub(crate) seed: u64,
}

/// What was done.
#[derive(Default)]
pub(crate) struct Done {
    kills: u64,
    syncs: u64,
    files: u64,
    seconds: f64,
    pub(crate) failures: Vec<String>,
}

impl Done {
    pub(crate) fn json(&self, options: &Options) -> Value {
        json!({
            "fs": format!("{:?}", options.fs).to_lowercase(),
            "seed": options.seed,
            "kills": self.kills,
            "syncs": self.syncs,
            "synced_files": self.files,
            "seconds": (self.seconds * 10.0).round() / 10.0,
            "failures": self.failures,
        })
    }
}

/// Runs rounds; the first failure ends them.
pub(crate) fn campaign(options: &Options) -> Done {
    let since = Instant::now();
    let mut done = Done::default();
    let mut system = System::start("768MiB");
    let cli = system.cli();
    cli.run(&["volume", "create", "fs", "--size", options.fs.size()]);
    options.fs.make(&attach(&system));
    cli.run(&["volume", "detach", "fs"]);
    let mut noise = Noise::new(options.seed);
    let mut writers: Vec<Writer> = Vec::new();
    while done.kills < options.kills && since.elapsed().as_secs() < options.seconds {
        match round(&mut system, options.fs, &mut noise, writers, done.kills) {
            Ok((left, compared)) => {
                done.files += compared;
                done.syncs = left.iter().map(|writer| writer.syncs).sum();
                writers = left;
            }
            Err(why) => {
                let failure = format!("seed {}, kill {}: {why}", options.seed, done.kills);
                eprintln!("{failure}\n{}", system.log());
                done.failures.push(failure);
                break;
            }
        }
        done.kills += 1;
    }
    done.seconds = since.elapsed().as_secs_f64();
    done
}

fn attach(system: &System) -> String {
    let answer = system.cli().json(&["volume", "attach", "fs", "--kind", "loop"]);
    answer["device"].as_str().expect("an attachment has a device").to_owned()
}

/// Load, kill, comparison; leaves the daemon running and nothing attached.
fn round(
    system: &mut System,
    fs: Fs,
    noise: &mut Noise,
    writers: Vec<Writer>,
    number: u64,
) -> Result<(Vec<Writer>, u64), String> {
    // Each mount has a place of its own, since a dead one may take its time.
    let place = |what: &str| system.path().join(format!("{what}{number}"));
    let (loaded, checked, compared) = (place("load"), place("check"), place("compare"));
    let mounted = Mounted::new(&attach(system), &loaded);
    let mut writers = if writers.is_empty() { fresh(noise) } else { writers };
    let killed = Arc::new(AtomicBool::new(false));
    let part = noise.below(1000);
    let life = LIFE_MS.0 + (LIFE_MS.1 - LIFE_MS.0) * part.pow(2) / 1_000_000;
    thread::scope(|scope| {
        for writer in &mut writers {
            writer.root = loaded.join(&writer.name);
            writer.killed = Arc::clone(&killed);
            scope.spawn(|| writer.run());
        }
        thread::sleep(Duration::from_millis(life));
        killed.store(true, Ordering::SeqCst);
        system.kill();
    });
    mounted.unmount();
    system.spawn();
    let device = attach(system);
    // The first mount replays the journal of the file system; then it must be sound.
    Mounted::new(&device, &checked).unmount();
    fs.check(&device)?;
    let mounted = Mounted::new(&device, &compared);
    let mut files = 0;
    for writer in &mut writers {
        writer.root = compared.join(&writer.name);
        files += writer.verify()?;
    }
    mounted.unmount();
    system.cli().run(&["volume", "detach", "fs"]);
    system.check();
    Ok((writers, files))
}

fn fresh(noise: &mut Noise) -> Vec<Writer> {
    let writer = |number| Writer {
        name: format!("w{number}"),
        root: PathBuf::new(),
        noise: Noise::new(noise.next()),
        tree: Tree::new(),
        syncs: 0,
        killed: Arc::default(),
    };
    (0..WRITERS).map(writer).collect()
}
