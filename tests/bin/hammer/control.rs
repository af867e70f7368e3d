//! What is done to volumes while they are written: snapshots, clones, clones of clones, several
//! volumes frozen together, growth, deletion, and what makes the daemon write a checkpoint or read
//! everything. Each thing that is asked for is told to the killer, who may want that very moment.

use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use pando_tests::Cli;
use pando_tests::noise::Noise;

use crate::log::{Clock, Moment};

/// What the names of all that is made begin with.
pub(crate) const PREFIX: &str = "frozen-";
/// Snapshots and clones at a time: all are read in the end.
const FROZEN_MAX: usize = 10;
/// By how much clones grow.
const GROWTH: u64 = 1 << 20;

/// Something that is done to volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    Snapshot,
    Clone,
    /// A clone of a clone or snapshot.
    Again,
    /// Two volumes at one instant.
    Group,
    Grow,
    Delete,
    /// A checkpoint, and all data read.
    Scrub,
    /// All structures verified under load.
    Check,
}

pub(crate) const DEEDS: [Deed; 8] = [
    Deed::Snapshot,
    Deed::Clone,
    Deed::Again,
    Deed::Group,
    Deed::Grow,
    Deed::Delete,
    Deed::Scrub,
    Deed::Check,
];

/// A snapshot or clone.
#[derive(Clone, Debug)]
pub(crate) struct Frozen {
    pub(crate) name: String,
    /// Its source, by number.
    pub(crate) volume: usize,
    /// When it was taken.
    pub(crate) at: Moment,
    /// What was taken at the same instant has the same number.
    pub(crate) group: u64,
    pub(crate) acknowledged: bool,
    /// Its size, and the one that it may have instead if its growth was not acknowledged.
    pub(crate) bytes: [u64; 2],
    clone: bool,
}

/// What was made and unmade.
#[derive(Default)]
pub(crate) struct Made {
    pub(crate) frozen: Vec<Frozen>,
    /// Names whose deletion was acknowledged.
    pub(crate) deleted: Vec<String>,
    pub(crate) deeds: u64,
}

/// Does things until told to stop, or until the daemon is gone.
pub(crate) struct Control<'a> {
    pub(crate) cli: Cli,
    pub(crate) clock: Arc<Clock>,
    /// Names of the volumes that are written.
    pub(crate) volumes: &'a [&'a str],
    pub(crate) volume_bytes: u64,
    pub(crate) round: u64,
    pub(crate) noise: Noise,
    pub(crate) tell: Sender<Deed>,
    /// The daemon is told to end, and may refuse.
    pub(crate) may_end: bool,
}

/// What was made so far.
struct Work<'a> {
    by: Control<'a>,
    made: Made,
    /// What the last command said that failed.
    said: String,
}

impl Control<'_> {
    pub(crate) fn run(self, stop: &AtomicBool) -> Result<Made, String> {
        let mut work = Work { by: self, made: Made::default(), said: String::new() };
        while !stop.load(Ordering::Relaxed) {
            if !work.step()? {
                // Killed, or refused without a reason.
                if work.by.may_end || work.gone() {
                    break;
                }
                return Err(work.said);
            }
        }
        Ok(work.made)
    }
}

impl Work<'_> {
    /// One deed; false if it did not succeed.
    fn step(&mut self) -> Result<bool, String> {
        let many = self.made.frozen.len() >= FROZEN_MAX;
        let chosen = DEEDS[usize::try_from(self.by.noise.below(8)).expect("few")];
        let deed = if many { Deed::Delete } else { chosen };
        // Nobody may be waiting for it.
        self.by.tell.send(deed).unwrap_or_default();
        self.made.deeds += 1;
        Ok(match deed {
            Deed::Snapshot => self.freeze(false, 1),
            Deed::Clone => self.freeze(true, 1),
            Deed::Group => self.freeze(true, self.by.volumes.len()),
            Deed::Again => self.again(),
            Deed::Grow => self.grow(),
            Deed::Delete => self.delete(),
            Deed::Scrub => self.verify(&["pool", "scrub", "--rate", "64GiB"])?,
            Deed::Check => self.verify(&["pool", "check"])?,
        })
    }

    fn ask(&mut self, arguments: &[&str]) -> Output {
        let output = self.by.cli.output(&[&["--output", "json"], arguments].concat());
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            self.said = format!("pando {}: {}", arguments.join(" "), why.trim());
        }
        output
    }

    fn done(&mut self, arguments: &[&str]) -> bool {
        self.ask(arguments).status.success()
    }

    fn gone(&self) -> bool {
        !self.by.cli.output(&["pool", "status"]).status.success()
    }

    fn name(&self, volume: usize) -> String {
        format!("{PREFIX}{}-{}-{volume}", self.by.round, self.made.deeds)
    }

    /// Snapshots or clones of the first `count` volumes, or of one that is chosen.
    fn freeze(&mut self, clone: bool, count: usize) -> bool {
        let all: Vec<usize> = match count {
            1 => vec![usize::from(self.by.noise.below(2) == 1)],
            _ => (0..count).collect(),
        };
        let names: Vec<String> = all.iter().map(|volume| self.name(*volume)).collect();
        let verb = if clone { "clone" } else { "snapshot" };
        let mut arguments = vec![verb, self.by.volumes[all[0]], &names[0]];
        let others: Vec<String> = all[1..]
            .iter()
            .zip(&names[1..])
            .map(|(volume, name)| format!("{}={name}", self.by.volumes[*volume]))
            .collect();
        for other in &others {
            arguments.extend(["--with", other.as_str()]);
        }
        let asked = self.by.clock.tick();
        let acknowledged = self.done(&arguments);
        let at = Moment { asked, answered: self.by.clock.tick() };
        for (volume, name) in all.into_iter().zip(names) {
            let bytes = [self.by.volume_bytes; 2];
            let frozen = Frozen { name, volume, at, group: asked, acknowledged, bytes, clone };
            self.made.frozen.push(frozen);
        }
        acknowledged
    }

    /// One of what was made, chosen among those that `fit`.
    fn choose(&mut self, fit: impl Fn(&Frozen) -> bool) -> Option<usize> {
        let fits = |frozen: &&Frozen| frozen.acknowledged && fit(frozen);
        let count = self.made.frozen.iter().filter(fits).count();
        let wanted = self.by.noise.below(u64::try_from(count).expect("few").max(1));
        let mut all = (0..).zip(&self.made.frozen).filter(|(_, frozen)| fits(frozen));
        all.nth(usize::try_from(wanted).expect("few")).map(|(index, _)| index)
    }

    fn again(&mut self) -> bool {
        let Some(index) = self.choose(|_| true) else { return true };
        let source = self.made.frozen[index].clone();
        let name = self.name(source.volume);
        let acknowledged = self.done(&["clone", &source.name, &name]);
        self.made.frozen.push(Frozen { name, acknowledged, clone: true, ..source });
        acknowledged
    }

    fn grow(&mut self) -> bool {
        let Some(index) = self.choose(|frozen| frozen.clone) else { return true };
        let frozen = &mut self.made.frozen[index];
        let size = frozen.bytes[0] + GROWTH;
        frozen.bytes[1] = size;
        let name = frozen.name.clone();
        let grown = self.done(&["volume", "grow", &name, &size.to_string()]);
        if grown {
            self.made.frozen[index].bytes[0] = size;
        }
        grown
    }

    fn delete(&mut self) -> bool {
        let Some(index) = self.choose(|_| true) else { return true };
        let name = self.made.frozen.remove(index).name;
        let deleted = self.done(&["volume", "delete", &name]);
        if deleted {
            self.made.deleted.push(name);
        }
        deleted
    }

    /// Verifies the pool under load. What it finds is a failure; to be killed is none.
    fn verify(&mut self, arguments: &[&str]) -> Result<bool, String> {
        let output = self.ask(arguments);
        let report = String::from_utf8_lossy(&output.stdout);
        if output.status.success() || report.trim().is_empty() {
            return Ok(output.status.success());
        }
        Err(format!("pando {}: {report}", arguments.join(" ")))
    }
}
