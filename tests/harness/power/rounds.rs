//! Power failures of a machine, one after the other, on one pool.
//!
//! ```text
//! boot -> pandod opens the pool -> batches ... | the emulator is killed
//!                                  `-- "17" on the second serial port: batch 17 is durable
//! what the disk has kept -> sometimes: boot -> pandod opens ... | killed as well
//!                        -> check, open here, compare -> the next round
//! ```
//!
//! The disk is a file whose cache is the host's, which survives the emulator, or a [`VolatileDisk`],
//! whose cache is lost in many ways.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use super::disk::{Cut, VolatileDisk};
use super::model::{Model, Stream};
use super::verify;
use crate::System;
use crate::noise::Noise;
use crate::vm::{Machine, Root};

/// The pool: small, so that its journal wraps and space is used again.
const POOL: [&str; 4] = ["--size", "64MiB", "--journal", "1MiB"];
/// Time until the power goes, in milliseconds: from the beginning of the opening of the pool, and
/// from the last of some lines of the machine, so that a slow one has done something by then.
const OPENING_MS: u64 = 400;
const LOAD_MS: u64 = 800;
const LINES: u64 = 24;
/// Between the batches of one round and those of the next.
const GAP: u32 = 1000;

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Power failures.
    pub power_offs: u64,
    /// Of them, while the pool was being opened.
    pub while_opening: u64,
    /// Batches that were known to be durable when the power went.
    pub durable_batches: u64,
    /// Sectors that the disk had not been told to keep.
    pub cached_sectors: u64,
    /// Of them, how many it has lost.
    pub lost_sectors: u64,
    /// Flushes of the disk.
    pub flushes: u64,
}

/// A pool, machines to use it, and what it must hold.
pub struct Rounds {
    directory: TempDir,
    root: Root,
    noise: Noise,
    model: Model,
    number: u32,
    /// What has happened.
    pub tally: Tally,
}

impl Rounds {
    /// An empty pool; all choices come from the seed.
    ///
    /// # Panics
    /// It cannot be made.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let directory = tempfile::Builder::new().prefix("pando-power-").tempdir();
        let directory = directory.expect("a directory");
        let root = Root::new(directory.path());
        let pool = directory.path().join("pool");
        make_pool(&pool);
        let (model, tally) = (Model::default(), Tally::default());
        Self { directory, root, noise: Noise::new(seed), model, number: 0, tally }
    }

    /// Keeps the directory with the pool and what it was before it was opened last; its path.
    #[must_use]
    pub fn keep(self) -> PathBuf {
        self.directory.keep()
    }

    fn pool(&self) -> PathBuf {
        self.directory.path().join("pool")
    }

    /// One round: one power failure, or two.
    ///
    /// # Errors
    /// What is wrong with what is left, or what went wrong in the machine.
    ///
    /// # Panics
    /// The emulator does not start.
    pub fn round(&mut self) -> Result<(), String> {
        let seed = self.noise.next();
        let mut stream = Stream::new(seed, self.model.clone(), self.number);
        let words = format!("power,{seed},{},{}", self.number, self.model.shape());
        let durable = self.machine(&words, false)?.max(self.number);
        self.tally.durable_batches += u64::from(durable - self.number);
        if self.noise.below(3) == 0 {
            self.machine("power-open", true)?;
        }
        // Opening changes it, and this is what a failure is looked for in.
        std::fs::copy(self.pool(), self.directory.path().join("left")).expect("a copy");
        let system = verify::open(&self.pool())?;
        verify::find(&system, &mut stream, durable)?;
        end(system)?;
        self.model = stream.model;
        self.number = stream.number + GAP;
        Ok(())
    }

    /// Boots a machine and has its power cut; the last batch that it said was durable.
    fn machine(&mut self, words: &str, opening: bool) -> Result<u32, String> {
        let (pool, place) = (self.pool(), self.directory.path().to_owned());
        let volatile = self.noise.below(4) > 0;
        let disk = volatile.then(|| VolatileDisk::start(&pool));
        let drive = match &disk {
            Some(disk) => {
                format!("file=nbd:unix:{},format=raw,if=virtio,cache=none", shown(disk.socket()))
            }
            None => format!("file={},format=raw,if=virtio,cache=writeback", shown(&pool)),
        };
        let mut machine = Machine::boot(&self.root, words, &[drive], &place);
        machine.await_word("opening")?;
        let opening = opening || self.noise.below(8) == 0;
        let milliseconds = if opening {
            self.noise.below(OPENING_MS)
        } else {
            machine.await_word("open")?;
            machine.await_lines(usize::try_from(self.noise.below(LINES)).expect("few"))?;
            self.noise.below(LOAD_MS)
        };
        // The moment is the only thing that is random.
        thread::sleep(Duration::from_millis(milliseconds));
        machine.cut_power()?;
        self.tally.power_offs += 1;
        self.tally.while_opening += u64::from(opening);
        if let Some(disk) = disk {
            let Cut { cached, lost, flushes } = disk.cut(self.noise.next());
            self.tally.cached_sectors += cached;
            self.tally.lost_sectors += lost;
            self.tally.flushes += flushes;
        }
        let said = machine.said();
        Ok(said.iter().rev().find_map(|line| line.parse().ok()).unwrap_or(0))
    }
}

/// Makes a pool for machines in a file.
///
/// # Panics
/// It cannot be made.
pub fn make_pool(path: &Path) {
    let mut system = System::empty();
    system.move_pool(path.to_owned());
    system.create_pool(&[&POOL[..], &["--allocate", "sparse"]].concat());
}

/// Ends a daemon that has opened what was left, after a look at everything.
///
/// # Errors
/// What the checker finds.
pub fn end(mut system: System) -> Result<(), String> {
    let report = system.cli().json(&["pool", "check"]);
    let findings = report["findings"].as_array().ok_or("a report without findings")?;
    if !findings.is_empty() {
        return Err(format!("check of the open pool: {findings:?}"));
    }
    system.stop();
    Ok(())
}

fn shown(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}
