//! What lies below a pool fails, in a machine; and what was written there is played back, with a look
//! at the pool at every barrier, and at what a failure of the power leaves before it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::disk::{SECTOR, blank, lottery, overwrite};
use super::log::{Change, Entry, WriteLog};
use super::model::{Model, Stream};
use super::{rounds, verify};
use crate::noise::Noise;
use crate::vm::{self, Machine, Root};

/// The cases of `tests/bin/guest/power.rs`.
const CASES: [&str; 3] = ["log of writes", "writes fail", "writes are dropped"];
/// Bytes of the disk for the log, of which it takes what it needs.
const LOG_BYTES: u64 = 1 << 30;
const FLAKY_BYTES: u64 = 64 << 20;
/// Failures of the power before a barrier.
const TORN: u64 = 2;
const PATIENCE: Duration = Duration::from_secs(300);

/// What was played back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Entries of the log.
    pub entries: u64,
    /// Flushes and writes with FUA among them.
    pub barriers: u64,
    /// After how many of them the pool was opened and compared.
    pub compared: u64,
    /// How often it was with a part of what a barrier has made durable, as if the power had gone.
    pub torn: u64,
    /// The last batch that was known to be durable.
    pub durable: u32,
}

/// Has the cases run in a machine, in `directory`, with batches from the seed, and plays the log back
/// that they leave; looks at the pool at one in `stride` barriers, and at the last one.
///
/// # Errors
/// What is wrong with a pool on the way.
///
/// # Panics
/// A case fails.
pub fn devices(root: &Root, directory: &Path, seed: u64, stride: u64) -> Result<Replayed, String> {
    let file = |name: &str| directory.join(name);
    let (pool, log, flaky) = (file("logged-pool"), file("log"), file("flaky-pool"));
    rounds::make_pool(&pool);
    let base = file("base");
    std::fs::copy(&pool, &base).expect("a copy of the pool");
    blank(&log, LOG_BYTES);
    blank(&flaky, FLAKY_BYTES);
    let drive =
        |path: &PathBuf| format!("file={},format=raw,if=virtio,cache.no-flush=on", path.display());
    let drives = [&pool, &log, &flaky].map(drive);
    let mut machine = Machine::boot(root, &format!("power-devices,{seed}"), &drives, directory);
    machine.await_end(PATIENCE);
    vm::check("power-devices", &machine.console(), &CASES);
    replay(&base, &log, seed, stride)
}

/// Plays the log back on `base`, which holds what is durable.
fn replay(base: &Path, log: &Path, seed: u64, stride: u64) -> Result<Replayed, String> {
    let mut log = WriteLog::open(log).map_err(|error| error.to_string())?;
    let mut replayed = Replayed { entries: log.entries(), ..Replayed::default() };
    let mut noise = Noise::new(seed);
    // What is durable with the next barrier.
    let mut unflushed: Vec<Change> = Vec::new();
    let (mut look, mut marked) = (false, false);
    loop {
        let entry = log.entry().map_err(|error| error.to_string())?;
        if entry.is_none() {
            apply(base, unflushed.drain(..));
        }
        // At the end of the marks that come with a barrier, so that they count.
        if entry.is_none() || look && !matches!(entry, Some(Entry::Mark(_))) {
            look = false;
            replayed.compared += 1;
            compare(base, seed, (replayed.durable, &[]))
                .map_err(|what| format!("barrier {}: {what}", replayed.barriers))?;
        }
        match entry {
            None => return Ok(replayed),
            Some(Entry::Change(change)) => unflushed.push(change),
            Some(Entry::Barrier(change)) => {
                replayed.barriers += 1;
                let chosen = replayed.barriers.is_multiple_of(stride);
                for _ in 0..if chosen { TORN } else { 0 } {
                    let some = some_of(&unflushed, noise.next());
                    replayed.torn += 1;
                    compare(base, seed, (replayed.durable, &some))
                        .map_err(|what| format!("before barrier {}: {what}", replayed.barriers))?;
                }
                apply(base, unflushed.drain(..).chain([change]));
                look |= chosen;
                marked = false;
            }
            Some(Entry::Mark(batch)) => {
                // The last one is the target's own.
                replayed.durable = batch.parse().unwrap_or(replayed.durable);
                // The kernel records what was not flushed behind the next flush: without one since
                // the last mark, what this one says is to be looked at.
                look |= marked;
                marked = true;
            }
        }
    }
}

fn apply(path: &Path, changes: impl IntoIterator<Item = Change>) {
    for change in changes {
        overwrite(path, change.offset, &change.data);
    }
}

/// What a disk may have kept of these when the power goes.
fn some_of(unflushed: &[Change], seed: u64) -> Vec<Change> {
    let unit = u64::try_from(SECTOR).expect("few");
    let mut stays = lottery(seed, u64::try_from(unflushed.len()).expect("few"));
    let mut some = Vec::new();
    for (write, change) in (1..).zip(unflushed) {
        for (sector, data) in (change.offset / unit..).zip(change.data.chunks(SECTOR)) {
            if stays(sector, write) {
                some.push(Change { offset: sector * unit, data: data.to_vec() });
            }
        }
    }
    some
}

/// Opens a copy of what there is so far, and some changes.
fn compare(base: &Path, seed: u64, (durable, more): (u32, &[Change])) -> Result<(), String> {
    let copy = base.with_extension("copy");
    std::fs::copy(base, &copy).map_err(|error| error.to_string())?;
    apply(&copy, more.iter().cloned());
    let system = verify::open(&copy)?;
    let mut stream = Stream::new(seed, Model::default(), 0);
    verify::find(&system, &mut stream, durable)?;
    rounds::end(system)
}
