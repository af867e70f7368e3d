//! A life on a device that fails, and what is asked of the pool then.
//!
//! | what fails | what is asked |
//! |---|---|
//! | a write, a sync | the pool is poisoned: nothing succeeds any more until it is opened again |
//! | a read | an error for who reads, or for who cannot go on without; the pool stays up, or is poisoned |
//! | a discard; something takes long | nothing happens |
//! | a write is lost or goes astray, a read comes from elsewhere, bits rot | errors that name a structure, or what is right |

use std::rc::Rc;

use super::case::CaseLife;
use super::damage::judge::{Question, judge, structure_in};
use super::damage::places::Places;
use super::damage::subject::{Past, Subject};
use super::gen_ops::Op;
use super::model::Birth;
use super::run::{Config, Log, check_sound, observe, perform, resolve, step};
use super::stage::{Act, Stage};
use pando_engine::disk::Disk;
use pando_engine::disk::sim::{Effect, Fault, FaultOp, Rng, SimDisk, SimImage, SimOptions};
use pando_engine::error::{Error, ErrorKind};
use pando_engine::journal::LogReader;
use pando_engine::pool::probe;
use pando_engine::pool::{ModifyVolume, Pool};
use pando_engine::units::{BlockNo, Seqno, to_u64, to_usize};

/// Acts after which everything is read.
const READ_EVERY: usize = 4;

/// What goes wrong in a life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// An operation of the device.
    Fault(Fault),
    /// So many bits of what lies on the disk are inverted before the life.
    Rot {
        /// Which bits.
        seed: u64,
        /// How many, in one block.
        bits: u32,
    },
}

/// What is asked of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// Nothing succeeds any more.
    Poison,
    /// An error for the reader alone.
    ReaderAlone,
    /// Nothing happens.
    Nothing,
    /// It is noticed, or what is read is right.
    Noticed,
}

impl Response {
    /// Of which kinds the error of a read may be.
    const fn errors_of_reads(self) -> &'static [ErrorKind] {
        match self {
            Self::Poison => &[],
            Self::ReaderAlone | Self::Nothing => &[ErrorKind::Io],
            Self::Noticed => &[ErrorKind::Corrupt, ErrorKind::Checksum],
        }
    }
}

impl Trouble {
    /// What is asked of the pool.
    #[must_use]
    pub const fn response(&self) -> Response {
        let Self::Fault(Fault { op, effect, .. }) = self else { return Response::Noticed };
        match (effect, op) {
            (Effect::Slow(_) | Effect::Hung, _) | (Effect::Error { .. }, FaultOp::Discard) => {
                Response::Nothing
            }
            (Effect::Error { .. }, FaultOp::Read) => Response::ReaderAlone,
            (Effect::Error { .. }, _) => Response::Poison,
            _ => Response::Noticed,
        }
    }

    /// Inverts bits of an image, in a block that something was written to.
    pub(super) fn rot(seed: u64, bits: u32, image: &mut SimImage) {
        let mut rng = Rng::new(seed);
        let written: Vec<BlockNo> = image.blocks().written().collect();
        let block = written[to_usize(rng.below(to_u64(written.len())))];
        for _ in 0..bits {
            let bit = to_usize(rng.below(8 * pando_engine::units::BLOCK_BYTES));
            image.blocks_mut().flip_bit(block, bit);
        }
    }
}

/// How far a life has come that something has gone wrong in.
#[derive(Clone, Debug, Default)]
pub struct Suffered {
    /// The last record in each of the states of the history that an act has led to.
    marks: Vec<(usize, Seqno)>,
}

impl Suffered {
    /// The oldest state in which the pool may be found when it was damaged: nothing says that what
    /// came after it was flushed.
    async fn proved(&self, disk: &Rc<dyn Disk>) -> usize {
        let Ok(superblock) = probe::superblock(disk).await else { return 0 };
        let mut durable = superblock.seal;
        let mut log = LogReader::behind(disk, &superblock);
        while let Ok(Some(framed)) = log.next().await {
            durable = durable.max(framed.durable);
        }
        let known = self.marks.iter().filter(|(_, seqno)| *seqno <= durable);
        known.map(|(state, _)| *state).max().unwrap_or(0)
    }
}

/// Judges what a life has left that may have damaged something: it is noticed, or right.
///
/// # Panics
/// When it is neither.
pub(super) fn judge_damaged(config: &Config, image: &SimImage, log: &Log, suffered: &Suffered) {
    let sim = SimDisk::from_image(image.clone(), 0, SimOptions::default());
    let least = sim.run(async { suffered.proved(&sim.disk()).await });
    let subject = Subject {
        past: Past::Killed,
        config: *config,
        image: image.clone(),
        log: log.clone(),
        proved: 0,
        older: Vec::new(),
        places: Places::of(config.formatted().blocks()),
    };
    let least = least.expect("no power failure was asked for").min(log.acknowledged);
    let question = Question { least, change: true, forged: false, seed: image.sum() };
    let verdict = judge(&subject, image, question);
    if let Some(wrong) = verdict.wrong {
        panic!("{wrong}; no state before {least} is right");
    }
}

impl Stage<'_> {
    /// Lives through a life in which something goes wrong, and looks at how the pool bears it.
    ///
    /// # Panics
    /// When it does not do what is asked of it.
    pub(super) async fn suffer(&self, life: &CaseLife, response: Response) {
        self.suffered.replace(Some(Suffered::default()));
        let Some(pool) = self.open_in_trouble(response).await else { return };
        for (number, act) in life.acts.iter().enumerate() {
            self.begun.set(number + 1);
            let Act::One(op) = act else { continue };
            if *op == Op::Reopen || !op.fits(self.log.borrow().last()) {
                continue;
            }
            let look = number % READ_EVERY == READ_EVERY - 1;
            if look && response != Response::Poison && !self.looks_right(&pool, response).await {
                return;
            }
            if !self.bears(&pool, op, response).await {
                return;
            }
            let mark = (self.log.borrow().states.len() - 1, Seqno::new(pool.status().seqno));
            self.suffered.borrow_mut().get_or_insert_default().marks.push(mark);
        }
        if response == Response::Poison {
            // What the background task is doing ends first.
            let forgotten = self.sim.faults_struck() > 0 && pool.checkpoint().await.is_ok();
            assert!(!forgotten, "a failed write is forgotten");
        } else {
            self.looks_right(&pool, response).await;
        }
    }

    async fn open_in_trouble(&self, response: Response) -> Option<Pool> {
        let pool = match self.config.open(&self.sim).await {
            Ok(pool) => pool,
            Err(error) => {
                self.may_fail(&error, response);
                return None;
            }
        };
        if matches!(response, Response::Poison | Response::Nothing) {
            check_sound(&pool).await;
        }
        let mut log = self.log.borrow_mut();
        // What it holds is looked at later; it is what was acknowledged, unless that was damaged.
        let newest = log.states.len() - 1;
        log.go_on_from(newest);
        Some(pool)
    }

    /// Reads everything: it is right, or gives errors as they may be. False if the life ends here.
    async fn looks_right(&self, pool: &Pool, response: Response) -> bool {
        match observe(pool).await {
            Ok(seen) => {
                let log = self.log.borrow();
                assert!(seen == *log.last(), "wrong data: {}", seen.difference(log.last()));
                true
            }
            Err(text) => {
                assert!(!text.contains("never written there"), "{text}");
                self.may_be_told(&text, response);
                // The next reads may work.
                response == Response::ReaderAlone
            }
        }
    }

    /// Does an operation. False if the life ends here.
    async fn bears(&self, pool: &Pool, op: &Op, response: Response) -> bool {
        let before = self.log.borrow().states.len() - 1;
        let was_poisoned = pool.status().poisoned.is_some();
        let result = step(pool, &self.log, op).await;
        let poisoned = pool.status().poisoned.is_some();
        let Err(error) = result else {
            assert!(!was_poisoned, "{op:?} succeeds on a poisoned pool");
            return true;
        };
        self.may_fail(&error, response);
        if poisoned {
            // A read that fails may be met before the poison is.
            refuses_everything(pool, response.errors_of_reads()).await;
            return false;
        }
        assert!(response != Response::Poison, "not poisoned after: {error}");
        if response == Response::Noticed || observe(pool).await.is_err() {
            return false;
        }
        resolve(pool, &self.log, before).await;
        true
    }

    /// Whether an error may be.
    fn may_fail(&self, error: &Error, response: Response) {
        let struck = self.sim.faults_struck() > 0 || response == Response::Noticed;
        assert!(struck, "without any fault: {error}");
        match response {
            Response::Nothing => panic!("nothing was to happen: {error}"),
            Response::Noticed => {
                let damage = matches!(
                    error.kind(),
                    ErrorKind::Corrupt
                        | ErrorKind::Checksum
                        | ErrorKind::NotAPool
                        | ErrorKind::Unsupported
                        | ErrorKind::Poisoned
                );
                assert!(damage, "an error that is none of damage: {error} ({:?})", error.kind());
                self.may_be_told(&error.to_string(), response);
            }
            Response::Poison | Response::ReaderAlone => {
                let kind = error.kind();
                let failed = matches!(kind, ErrorKind::Io | ErrorKind::Poisoned);
                assert!(failed, "an error of another kind: {error} ({kind:?})");
            }
        }
    }

    fn may_be_told(&self, error: &str, response: Response) {
        match response {
            Response::Nothing => panic!("nothing was to happen: {error}"),
            Response::Noticed => {
                assert!(structure_in(error).is_some(), "an error that names no structure: {error}");
            }
            Response::Poison | Response::ReaderAlone => {
                assert!(self.sim.faults_struck() > 0, "without any fault: {error}");
            }
        }
    }
}

/// P6: no success is reported any more. An error may be that of a read, of the kinds `of_reads`: where
/// part of a block is written a read comes first.
///
/// # Panics
/// When something succeeds.
pub async fn refuses_everything(pool: &Pool, of_reads: &[ErrorKind]) {
    let birth = |name: &str| Birth {
        name: name.into(),
        size_bytes: Some(60 * 4096),
        source: None,
        snapshot: false,
    };
    let mut ops = vec![Op::Flush, Op::Checkpoint, Op::Create(vec![birth("unborn")])];
    let infos = pool.list(None, usize::MAX).0;
    if let Some(info) = infos.iter().find(|info| !info.snapshot && info.size_bytes >= 3 * 4096) {
        let name = &info.name;
        let write = |first, count| Op::Write { volume: name.clone(), first, count, fua: false };
        ops.extend([write(16, 8), write(17, 3)]);
        ops.push(Op::Discard { volume: name.clone(), first: 0, count: info.size_bytes / 512 });
        ops.push(Op::Delete(name.clone()));
        ops.push(Op::Grow(name.clone(), info.size_bytes + 4096));
        assert!(pool.modify(info.id, ModifyVolume::default()).await.is_err());
    }
    for op in ops {
        let result = perform(pool, &op, 999).await;
        let error = result.expect_err("nothing succeeds on a poisoned pool");
        let read = of_reads.contains(&error.kind());
        assert!(read || error.kind() == ErrorKind::Poisoned, "{op:?}: {error}");
    }
    assert!(pool.close().await.is_err(), "a poisoned pool is closed");
}
