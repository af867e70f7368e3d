//! f03: operations on a device of which up to three operations fail, once or from then on, and what
//! they were to write has landed or not. After a failed write or sync nothing succeeds any more, until
//! the pool is opened again; then the oracle of a crash holds. A failed read is told to its reader.
//!
//! ```text
//! seed, configuration (6), how many faults, 4 bytes each: of what, after how many (2), how;
//! plan (1), number (4); then 6 bytes an operation
//! ```

use std::cell::RefCell;
use std::rc::Rc;

use super::input::empty_pool;
use super::ops::{Maker, acknowledge, issue};
use super::{Input, Reached};
use crate::gen_ops::Op;
use crate::model::{BLOCK_SECTORS, Birth, Model};
use crate::run::{Config, Life, Log, SharedLog, drain, observe, perform};
use pando_engine::disk::sim::{CutPlan, Effect, Fault, FaultOp, SimDisk, SimImage, SimOptions};
use pando_engine::error::{Error, ErrorKind};
use pando_engine::pool::{ModifyVolume, Pool};

/// What the corpus must come to.
pub(super) const REACHES: &[&str] =
    &["failed reads", "failures while opening", "operations", "poisoned"];
const FAULTS_MAX: u64 = 3;
/// Operations of one input.
const OPS_MAX: usize = 60;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn fault(input: &mut Input<'_>) -> Fault {
    let op = input.choose(&[FaultOp::Write, FaultOp::Sync, FaultOp::Read, FaultOp::Discard]);
    let after = u64::from(input.short()) % 512;
    let how = input.byte();
    let errno = if how & 2 == 0 { EIO } else { ENOSPC };
    // A discard that is said to have failed does not happen later, behind what was written meanwhile.
    let landed = how & 4 == 4 && op != FaultOp::Discard;
    let effect = Effect::Error { errno, landed };
    Fault { op, after, sticky: how & 1 == 1, effect }
}

pub(super) fn body(bytes: &[u8], reached: &mut Reached) {
    let mut input = Input::new(bytes);
    let seed = u64::from(input.byte());
    let config = input.config();
    let faults: Vec<Fault> = (0..input.below(FAULTS_MAX + 1)).map(|_| fault(&mut input)).collect();
    let (plan, number) = (input.byte(), u64::from(input.word()));
    let sim = SimDisk::from_image(empty_pool(&config), seed, SimOptions::default());
    let log: SharedLog = Rc::new(RefCell::new(Log::new(Model::default())));
    let poisons = faults.iter().all(|fault| matches!(fault.op, FaultOp::Write | FaultOp::Sync));
    faults.into_iter().for_each(|fault| sim.inject(fault));
    let run = Run { sim: &sim, config, log: Rc::clone(&log), poisons, reached };
    sim.run(run.all(input)).expect("the power stays on");
    let mut log = log.borrow().clone();
    // A sync that fails may have dropped what it was for: then a kill loses what a power cut would.
    if plan % 6 > 0 || sim.moment().flush_failed() {
        log.power_failed();
    }
    let image = match plan % 6 {
        0 => sim.image_after_kill(number),
        1 => sim.image_after_cut(CutPlan::KeepNone),
        2 => sim.image_after_cut(CutPlan::KeepAll),
        3 => sim.image_after_cut(CutPlan::Subset(number)),
        4 => sim.image_after_cut(CutPlan::Torn(number)),
        _ => sim.image_after_cut(CutPlan::Garbled(number)),
    };
    reopen(&config, image, log);
}

/// Opens what is left on a device that works again.
fn reopen(config: &Config, image: SimImage, log: Log) {
    let sim = SimDisk::from_image(image, 1, SimOptions::default());
    let log: SharedLog = Rc::new(RefCell::new(log));
    let done = sim.run(async {
        let life = Life { sim: &sim, config, log: &log };
        let pool = life.begin().await?;
        drain(&pool).await
    });
    done.expect("the power stays on").expect("the device works again");
}

struct Run<'a> {
    sim: &'a SimDisk,
    config: Config,
    log: SharedLog,
    /// Whether each fault poisons the pool.
    poisons: bool,
    reached: &'a mut Reached,
}

impl Run<'_> {
    async fn all(mut self, mut input: Input<'_>) {
        let Some(mut pool) = self.open().await else { return };
        let mut maker = Maker::default();
        for _ in 0..OPS_MAX {
            let op = maker.next(&mut input, self.log.borrow().last());
            let Some(op) = op else { break };
            self.reached.note("operations");
            if op == Op::Reopen {
                if let Err(error) = pool.close().await {
                    return self.failed(&pool, &error).await;
                }
                acknowledge(&mut self.log.borrow_mut(), true);
                let Some(again) = self.open().await else { return };
                pool = again;
                continue;
            }
            if !self.step(&pool, &op).await {
                return;
            }
        }
        // What is under way in the background comes to its end before this one.
        let last = pool.checkpoint().await;
        let (poisoned, struck) = (pool.status().poisoned.is_some(), self.sim.faults_struck() > 0);
        assert!(last.is_ok() || struck, "the last checkpoint: {last:?}");
        assert!(poisoned || !struck || !self.poisons, "a write or sync has failed in silence");
    }

    async fn open(&mut self) -> Option<Pool> {
        let opened = self.config.open(self.sim).await;
        if let Err(error) = &opened {
            assert!(self.sim.faults_struck() > 0, "the pool does not open: {error}");
            self.reached.note("failures while opening");
        }
        opened.ok()
    }

    /// Does one operation; false when that was the last that can be done.
    async fn step(&mut self, pool: &Pool, op: &Op) -> bool {
        let was_poisoned = pool.status().poisoned.is_some();
        let before = self.log.borrow().states.len() - 1;
        let stamp = issue(&mut self.log.borrow_mut(), op);
        let result = perform(pool, op, stamp).await;
        assert!(!was_poisoned || result.is_err(), "{op:?} succeeds on a poisoned pool");
        let Err(error) = result else {
            acknowledge(&mut self.log.borrow_mut(), op.is_durable());
            return true;
        };
        if pool.status().poisoned.is_some() {
            self.failed(pool, &error).await;
            return false;
        }
        let full = error.kind() == ErrorKind::NoSpace;
        assert!(full || self.sim.faults_struck() > 0, "{op:?}: {error}");
        if !full {
            assert_eq!(error.kind(), ErrorKind::Io, "a failed read is told as such: {error}");
            self.reached.note("failed reads");
        }
        self.resolve(pool, before).await
    }

    /// After a refusal: how much of the operation has happened? False when it cannot be seen.
    async fn resolve(&self, pool: &Pool, before: usize) -> bool {
        // A fault that comes once does not come twice.
        for _ in 0..=FAULTS_MAX {
            match observe(pool).await {
                Ok(seen) => {
                    let mut log = self.log.borrow_mut();
                    let now = log.find(&seen, before).unwrap_or_else(|e| panic!("{e}"));
                    log.states.truncate(now + 1);
                    log.acknowledged = now;
                    return true;
                }
                Err(error) => assert!(self.sim.faults_struck() > 0, "{error}"),
            }
        }
        false
    }

    /// P6: no success is reported any more.
    async fn failed(&mut self, pool: &Pool, error: &Error) {
        assert!(self.sim.faults_struck() > 0, "{error}");
        assert!(pool.status().poisoned.is_some(), "not poisoned by {error}");
        self.reached.note("poisoned");
        let size_bytes = Some(64 << 10);
        let birth = Birth { name: "last".into(), size_bytes, source: None, snapshot: false };
        let mut ops = vec![Op::Flush, Op::Checkpoint, Op::Create(vec![birth])];
        let volume = pool.list(None, usize::MAX).0.into_iter().find(|info| !info.snapshot);
        if let Some(info) = volume {
            let volume = info.name;
            let count = BLOCK_SECTORS;
            ops.push(Op::Write { volume: volume.clone(), first: 0, count, fua: false });
            ops.push(Op::Write { volume: volume.clone(), first: 1, count: 2, fua: true });
            ops.push(Op::Discard { volume: volume.clone(), first: 0, count });
            ops.push(Op::Zero { volume: volume.clone(), first: 0, count, no_hole: false });
            ops.push(Op::Grow(volume.clone(), info.size_bytes + (64 << 10)));
            ops.push(Op::Delete(volume));
            assert!(pool.modify(info.id, ModifyVolume::default()).await.is_err());
        }
        for op in ops {
            let error = perform(pool, &op, 999).await.expect_err("nothing succeeds any more");
            // Part of a block is written behind a read, which can fail before.
            let read = !self.poisons && error.kind() == ErrorKind::Io;
            assert!(read || error.kind() == ErrorKind::Poisoned, "{op:?}: {error}");
        }
        assert!(pool.close().await.is_err(), "a poisoned pool is not closed");
    }
}
