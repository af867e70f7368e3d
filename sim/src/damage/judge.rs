//! The judge: uses a damaged pool in every way and compares what it gives with what it must hold.
//!
//! ```text
//! check offline -> open -> read all -> check -> change -> read all -> kill or close
//!               -> open -> read all
//! ```
//! What is read is right, or an error that names a structure and its place. Nothing panics, hangs or
//! takes memory without bound; what was acknowledged on the damaged pool is there when it is opened
//! again.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::subject::Subject;
use crate::gen_ops::{Bounds, Generator, Op};
use crate::model::{BLOCK_SECTORS, Model, Stamps, stamps_of};
use crate::run::{Log, perform};
use pando_engine::disk::sim::{Rng, SimDisk, SimImage, SimOptions};
use pando_engine::error::{Error, ErrorKind};
use pando_engine::pool::{DumpForm, Pool, check_offline, dump_offline};
use pando_engine::runtime::executor::end_of_turn;
use pando_engine::units::{BLOCK_BYTES, VolumeId, to_u32};

/// Events after which a pool is said to hang.
const EVENTS_MAX: u64 = 20_000;
/// Operations on a damaged pool.
const OPS: usize = 6;

/// What an image is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// The oldest state that it may be in.
    pub least: usize,
    /// Whether it is changed as well, or only read.
    pub change: bool,
    /// Whether a checksum was made right: then what the checker has found excuses wrong data.
    pub forged: bool,
    /// For the random choices.
    pub seed: u64,
}

/// What has come of an image.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Why it was not opened.
    pub refused: Option<String>,
    /// Numbers of the kinds that the checker has found.
    pub findings: BTreeSet<String>,
    /// Errors met while it was used.
    pub errors: BTreeSet<String>,
    /// What must not be.
    pub wrong: Option<String>,
}

impl Verdict {
    /// Whether nothing was noticed of the damage, by anybody.
    #[must_use]
    pub fn unnoticed(&self) -> bool {
        self.refused.is_none() && self.findings.is_empty() && self.errors.is_empty()
    }

    fn wrong(&mut self, what: impl Into<String>) {
        self.wrong.get_or_insert(what.into());
    }

    /// Takes an error, which must name a structure and a place.
    fn met(&mut self, error: &Error, forged: bool) {
        let text = error.to_string();
        let damage = matches!(
            error.kind(),
            ErrorKind::Corrupt
                | ErrorKind::Checksum
                | ErrorKind::NotAPool
                | ErrorKind::Unsupported
                | ErrorKind::Poisoned
        );
        if !forged && (!damage || structure_in(&text).is_none()) {
            self.wrong(format!("an error that names no damage: {text} ({:?})", error.kind()));
        }
        self.errors.insert(text);
    }
}

/// What errors call the structures.
const NAMES: [&str; 10] = [
    "superblock",
    "catalogue",
    "journal",
    "map node",
    "header of group",
    "reference-count page",
    "checksum page",
    "data does not match",
    "group",
    "block",
];

/// The structure that an error names, if it names one and a number.
#[must_use]
pub fn structure_in(error: &str) -> Option<&'static str> {
    let place = error.contains(|c: char| c.is_ascii_digit());
    NAMES.into_iter().find(|name| place && error.contains(name))
}

/// Asks an image.
#[must_use]
pub fn judge(subject: &Subject, image: &SimImage, question: Question) -> Verdict {
    let mut verdict = Verdict::default();
    let sim = SimDisk::from_image(image.clone(), question.seed, SimOptions::default());
    sim.set_cut_at(EVENTS_MAX);
    let mut judge = Judge { subject, question, verdict: &mut verdict, log: subject.log.clone() };
    let closed = sim.run(judge.first_life(&sim));
    let Some(goes_on) = closed else {
        judge.verdict.wrong("it hangs");
        return verdict;
    };
    if goes_on {
        let left = sim.image_after_kill(question.seed);
        let sim = SimDisk::from_image(left, question.seed + 1, SimOptions::default());
        sim.set_cut_at(EVENTS_MAX);
        if sim.run(judge.second_life(&sim)).is_none() {
            judge.verdict.wrong("it hangs when it is opened again");
        }
    }
    verdict
}

struct Judge<'a> {
    subject: &'a Subject,
    question: Question,
    verdict: &'a mut Verdict,
    log: Log,
}

impl Judge<'_> {
    /// Whether what is read can be held against the pool.
    fn strict(&self) -> bool {
        !self.question.forged || self.verdict.findings.is_empty()
    }

    fn met(&mut self, error: &Error) {
        self.verdict.met(error, self.question.forged);
    }

    /// Everything up to the end of the process. True if the pool is to be opened again.
    async fn first_life(&mut self, sim: &SimDisk) -> bool {
        match check_offline(&sim.disk(), &|_, _| ()).await {
            Ok(report) => {
                self.verdict.findings.extend(report.findings.into_iter().map(|f| f.code));
            }
            Err(error) => self.met(&error),
        }
        if self.question.forged {
            drop(dump_offline(&sim.disk(), DumpForm::Text, &mut std::io::sink()).await);
        }
        let pool = match self.subject.config.open(sim).await {
            Ok(pool) => pool,
            Err(error) => {
                self.met(&error);
                self.verdict.refused = Some(error.to_string());
                return false;
            }
        };
        let least = self.question.least;
        let Some(state) = self.compare(&pool, least, "after opening").await else {
            return false;
        };
        self.log.go_on_from(state);
        match pool.check(&|_, _| ()).await {
            Ok(report) => {
                self.verdict.findings.extend(report.findings.into_iter().map(|f| f.code));
            }
            Err(error) => self.met(&error),
        }
        if !self.question.change {
            return false;
        }
        self.change(&pool).await;
        let least = self.log.acknowledged;
        if self.compare(&pool, least, "after changes").await.is_none() {
            return false;
        }
        // Killed or closed.
        if Rng::new(self.question.seed).chance(8)
            && let Err(error) = pool.close().await
        {
            self.met(&error);
        }
        true
    }

    async fn second_life(&mut self, sim: &SimDisk) {
        match self.subject.config.open(sim).await {
            Ok(pool) => {
                let least = self.log.acknowledged;
                self.compare(&pool, least, "after opening again").await;
            }
            Err(error) => self.met(&error),
        }
    }

    /// Changes the pool until something fails.
    async fn change(&mut self, pool: &Pool) {
        let bounds = Bounds { volumes: 8, volume_blocks: 40, write_blocks: 8 };
        let mut generator = Generator::new(self.question.seed, bounds);
        for number in 0..OPS {
            let op =
                if number == OPS - 2 { Op::Checkpoint } else { generator.next_op(self.log.last()) };
            if op == Op::Reopen {
                continue;
            }
            let stamp = self.log.stamp;
            self.log.stamp += 1;
            let mut model = self.log.last().clone();
            for step in op.steps(&model, stamp) {
                model.apply(&step);
                self.log.states.push(model.clone());
            }
            let done = perform(pool, &op, stamp).await;
            if let Err(error) = done {
                self.met(&error);
                return;
            }
            self.log.acknowledged = self.log.states.len() - 1;
            end_of_turn().await;
        }
    }

    /// Which state the pool is in, if what can be read of it is one.
    async fn compare(&mut self, pool: &Pool, least: usize, when: &str) -> Option<usize> {
        let seen = match self.read(pool).await {
            Ok(seen) => seen,
            Err(what) => {
                if self.strict() {
                    self.verdict.wrong(format!("{when}: {what}"));
                    return None;
                }
                return Some(least);
            }
        };
        let newest = self.log.states.len() - 1;
        let found = (least..=newest).rev().find(|n| seen.is(&self.log.states[*n]));
        if found.is_none() && self.strict() {
            let model = &self.log.states[newest];
            self.verdict.wrong(format!("{when}: wrong data, {}", seen.difference(model)));
        }
        found.or_else(|| (!self.strict()).then_some(least))
    }

    async fn read(&mut self, pool: &Pool) -> Result<Seen, String> {
        let mut seen = Seen::default();
        for info in pool.list(None, usize::MAX).0 {
            let mut volume = SeenVolume { size_bytes: info.size_bytes, ..SeenVolume::default() };
            volume.snapshot = info.snapshot;
            self.read_volume(pool, info.id, &mut volume)
                .await
                .map_err(|e| format!("{}: {e}", info.name))?;
            seen.volumes.insert(info.name, volume);
        }
        Ok(seen)
    }

    async fn read_volume(
        &mut self,
        pool: &Pool,
        id: VolumeId,
        volume: &mut SeenVolume,
    ) -> Result<(), String> {
        let device = match pool.device(id) {
            Ok(device) => device,
            Err(error) => {
                self.met(&error);
                return Err(error.to_string());
            }
        };
        // A forged size is not read to its end.
        let end = volume.size_bytes.min(1 << 20);
        for step in [1 << 16, BLOCK_BYTES] {
            let mut at = 0;
            let mut failed = false;
            volume.blocks.clear();
            while at < end {
                let len = (end - at).min(step);
                match device.read(at, to_u32(len)).await {
                    Ok(read) => {
                        let first = at / BLOCK_BYTES * BLOCK_SECTORS;
                        stamps_of(read.bytes(), first, &mut volume.blocks)?;
                    }
                    Err(error) => {
                        self.met(&error);
                        volume.bad.insert(at / BLOCK_BYTES);
                        failed = true;
                    }
                }
                at += step;
            }
            if !failed {
                return Ok(());
            }
            if step > BLOCK_BYTES {
                volume.bad.clear(); // Now block by block.
            }
        }
        Ok(())
    }
}

/// What was read of a volume.
#[derive(Default)]
struct SeenVolume {
    size_bytes: u64,
    snapshot: bool,
    blocks: BTreeMap<u64, Stamps>,
    /// Blocks that gave an error.
    bad: BTreeSet<u64>,
}

/// What was read of a pool.
#[derive(Default)]
struct Seen {
    volumes: BTreeMap<String, SeenVolume>,
}

impl Seen {
    /// Whether all that could be read is this state's.
    fn is(&self, model: &Model) -> bool {
        self.volumes.len() == model.volumes.len() && self.first_other(model).is_none()
    }

    fn first_other(&self, model: &Model) -> Option<String> {
        self.volumes.iter().find_map(|(name, seen)| {
            let Some(known) = model.volumes.get(name).map(Rc::as_ref) else {
                return Some(format!("{name} does not exist"));
            };
            if (seen.size_bytes, seen.snapshot) != (known.size_bytes, known.snapshot) {
                return Some(format!(
                    "{name}: {} bytes, not {}",
                    seen.size_bytes, known.size_bytes
                ));
            }
            let blocks = seen.blocks.keys().chain(known.blocks.keys());
            let mut read = blocks.filter(|block| !seen.bad.contains(block));
            let other = read.find(|block| seen.blocks.get(block) != known.blocks.get(block))?;
            let (found, wanted) = (seen.blocks.get(other), known.blocks.get(other));
            Some(format!("{name}, block {other}: {found:?}, not {wanted:?}"))
        })
    }

    fn difference(&self, model: &Model) -> String {
        let count = || format!("{} volumes, not {}", self.volumes.len(), model.volumes.len());
        self.first_other(model).unwrap_or_else(count)
    }
}
