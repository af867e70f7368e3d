//! f01: operations on a pool and on the model, some of them at the same time. What is read is what the
//! model holds, the checker finds nothing, differences and mapped runs leave nothing out, and in the
//! end every block comes back.
//!
//! ```text
//! seed, configuration (6), then 6 bytes an operation: kind, volume, place, part, length, more
//! kind: the top bit lets the next operation begin at the same time, the rest says which
//! ```

use std::cell::RefCell;
use std::rc::Rc;

use futures_util::future::join_all;

use super::input::empty_pool;
use super::ops::{Maker, Raw, acknowledge, commute, issue, modulo, pick, touched};
use super::{Input, Reached};
use crate::gen_ops::Op;
use crate::model::{BLOCK_SECTORS, Model, ModelVolume};
use crate::run::{Config, Log, SharedLog, check_sound, drain, observe, perform};
use pando_engine::disk::sim::{SimDisk, SimOptions};
use pando_engine::error::ErrorKind;
use pando_engine::pool::{ModifyVolume, Pool};
use pando_engine::units::{BLOCK_BYTES, to_u64, to_usize};

/// What the corpus must come to.
pub(super) const REACHES: &[&str] = &[
    "clones",
    "deletions",
    "differences",
    "no space",
    "operations",
    "reopenings",
    "reservations",
    "together",
];
/// Operations of one input.
const OPS_MAX: usize = 120;
/// Operations at the same time.
const TOGETHER_MAX: usize = 4;
/// The bit of an operation's kind that lets the next one begin at the same time.
const TOGETHER: u8 = 0x80;
/// Kinds of question, behind those of operations.
const QUESTIONS: u8 = 0x70;

pub(super) fn body(bytes: &[u8], reached: &mut Reached) {
    let mut input = Input::new(bytes);
    let seed = u64::from(input.byte());
    let config = input.config();
    let sim = SimDisk::from_image(empty_pool(&config), seed, SimOptions::default());
    let log: SharedLog = Rc::new(RefCell::new(Log::new(Model::default())));
    let run = Run { sim: &sim, config, log, reached };
    sim.run(run.all(input)).expect("the power stays on");
}

struct Run<'a> {
    sim: &'a SimDisk,
    config: Config,
    log: SharedLog,
    reached: &'a mut Reached,
}

impl Run<'_> {
    async fn all(mut self, mut input: Input<'_>) {
        let mut pool = self.open().await;
        let mut maker = Maker::default();
        let mut together: Vec<Op> = Vec::new();
        for _ in 0..OPS_MAX {
            if input.is_empty() {
                break;
            }
            let raw = Raw::of(&mut input);
            if raw.kind & !TOGETHER >= QUESTIONS {
                self.finish(&pool, &mut together).await;
                self.ask(&pool, raw).await;
                continue;
            }
            // What is under way changes neither which volumes there are nor their sizes.
            let op =
                maker.make(Raw { kind: raw.kind & !TOGETHER, ..raw }, self.log.borrow().last());
            if together.len() == TOGETHER_MAX || together.iter().any(|other| !commute(&op, other)) {
                self.finish(&pool, &mut together).await;
            }
            let reopen = op == Op::Reopen;
            together.push(op);
            if raw.kind & TOGETHER == 0 || !commute(&together[0], &Op::Flush) {
                self.finish(&pool, &mut together).await;
            }
            if reopen {
                pool.close().await.expect("a sound disk");
                pool = self.open().await;
                self.reached.note("reopenings");
            }
        }
        self.finish(&pool, &mut together).await;
        self.compare(&pool).await;
        check_sound(&pool).await;
        drain(&pool).await.expect("a sound disk");
    }

    async fn open(&self) -> Pool {
        self.config.open(self.sim).await.expect("a sound disk")
    }

    /// Does what is to be done at the same time.
    async fn finish(&mut self, pool: &Pool, together: &mut Vec<Op>) {
        let ops = std::mem::take(together);
        if ops.len() > 1 {
            self.reached.note("together");
        }
        self.reached.add("operations", to_u64(ops.len()));
        let before = self.log.borrow().last().clone();
        let stamps: Vec<u64> = ops.iter().map(|op| issue(&mut self.log.borrow_mut(), op)).collect();
        let promised: Vec<bool> =
            ops.iter().map(|op| ops.len() == 1 && promised(pool, op)).collect();
        let work = ops.iter().zip(&stamps).map(|(op, stamp)| perform(pool, op, *stamp));
        let results = join_all(work).await;
        let mut refused = Vec::new();
        for ((op, result), promised) in ops.iter().zip(results).zip(promised) {
            match result {
                Ok(()) => self.count(op),
                Err(error) if error.kind() == ErrorKind::NoSpace => {
                    assert!(!promised, "{op:?} is refused what was promised: {error}");
                    let grows = match op {
                        Op::Write { .. } | Op::Zero { .. } | Op::Create(_) => true,
                        // It must not copy the nodes that other volumes were promised.
                        Op::Discard { .. } => pool.status().reserved_bytes > 0,
                        _ => false,
                    };
                    assert!(grows, "{op:?} needs no space and is refused: {error}");
                    refused.push(op);
                }
                Err(error) => panic!("{op:?}: {error}"),
            }
        }
        if refused.is_empty() {
            return acknowledge(&mut self.log.borrow_mut(), false);
        }
        self.reached.add("no space", to_u64(refused.len()));
        self.adopt(pool, &before, &refused).await;
    }

    fn count(&mut self, op: &Op) {
        match op {
            Op::Create(births) if births[0].source.is_some() => self.reached.note("clones"),
            Op::Delete(_) => self.reached.note("deletions"),
            _ => {}
        }
    }

    /// After a refusal: a refused write has happened in part, all else wholly. What has come of it
    /// is the state from now on.
    async fn adopt(&mut self, pool: &Pool, before: &Model, refused: &[&Op]) {
        let seen = observe(pool).await.unwrap_or_else(|e| panic!("after a refusal: {e}"));
        let mut expected = self.log.borrow().last().clone();
        for op in refused {
            let Some((volume, from, to)) = touched(op) else {
                expected.volumes.clone_from(&before.volumes);
                continue;
            };
            let (old, found) = (&before.volumes[volume], &seen.volumes[volume]);
            let known = expected.volumes.get_mut(volume).map(Rc::make_mut).expect("as before");
            for sector in from..to {
                let stamp = stamp(found, sector);
                if stamp == self::stamp(old, sector) {
                    known.set(sector, 1, stamp);
                }
            }
        }
        assert!(seen == expected, "after a refusal: {}", seen.difference(&expected));
        let mut log = self.log.borrow_mut();
        let (newest, stamp) = (log.states.len() - 1, log.stamp);
        log.states[newest] = seen;
        log.go_on_from(newest);
        log.stamp = stamp;
    }

    async fn compare(&mut self, pool: &Pool) {
        let seen = observe(pool).await.unwrap_or_else(|e| panic!("{e}"));
        let log = self.log.borrow();
        assert!(seen == *log.last(), "{}", seen.difference(log.last()));
    }

    async fn ask(&mut self, pool: &Pool, raw: Raw) {
        match raw.more % 6 {
            0 => self.compare(pool).await,
            1 => check_sound(pool).await,
            2 => self.promise(pool, raw).await,
            3 => self.mapped(pool, raw).await,
            _ => self.changed(pool, raw).await,
        }
    }

    /// Promises a volume some blocks.
    async fn promise(&mut self, pool: &Pool, raw: Raw) {
        let Some(name) = pick(self.log.borrow().last(), raw.volume, true) else { return };
        let reservation_bytes = Some(u64::from(raw.kind & 0xF) * 4 * BLOCK_BYTES);
        let change = ModifyVolume { reservation_bytes, ..ModifyVolume::default() };
        let id = pool.find(&name).expect("it exists").id;
        match pool.modify(id, change).await {
            Ok(_) => self.reached.note("reservations"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}"),
        }
    }

    /// The mapped runs of a volume follow each other, and hold everything that is not zero.
    async fn mapped(&mut self, pool: &Pool, raw: Raw) {
        let model = self.log.borrow().last().clone();
        let Some(name) = pick(&model, raw.volume, false) else { return };
        let known = &model.volumes[&name];
        let device = pool.device(pool.find(&name).expect("it exists").id).expect("it exists");
        let max = 1 + usize::from(raw.kind & 7);
        let mut at = 0;
        while at < known.size_bytes {
            let runs = device.mapped_runs(at, known.size_bytes - at, max).await;
            let runs = runs.expect("a sound disk");
            assert!(!runs.is_empty() && runs.len() <= max, "{} runs of {max}", runs.len());
            for run in runs {
                assert!(run.offset == at && run.len > 0, "{run:?} does not begin at {at}");
                at += run.len;
                let blocks = run.offset / BLOCK_BYTES..at.div_ceil(BLOCK_BYTES);
                let lost = known.blocks.range(blocks).next();
                assert!(run.mapped || lost.is_none(), "{name}: {run:?} hides {lost:?}");
            }
        }
        assert_eq!(at, known.size_bytes, "runs beyond the end");
    }

    /// Where two volumes differ, it is said that they do; and what is said to read as zeros does.
    async fn changed(&mut self, pool: &Pool, raw: Raw) {
        let model = self.log.borrow().last().clone();
        let Some(new) = pick(&model, raw.volume, false) else { return };
        let old = if raw.more % 6 == 4 { None } else { pick(&model, raw.kind & 0xF, false) };
        let id = |name: &String| pool.find(name).expect("it exists").id;
        let empty = ModelVolume::default();
        let before = old.as_ref().map_or(&empty, |old| &*model.volumes[old]);
        let known = &model.volumes[&new];
        let max = 1 + modulo(u64::from(raw.kind), 5);
        let mut said = vec![None; to_usize(known.size_bytes.div_ceil(BLOCK_BYTES))];
        let (mut next, mut end) = (Some(0), 0);
        while let Some(offset) = next {
            let (runs, more) = pool
                .changed(old.as_ref().map(id), id(&new), offset, max)
                .await
                .expect("a sound disk");
            assert!(more.is_none_or(|more| more > offset), "no progress at {offset}");
            for run in runs {
                assert!(run.offset >= end && run.len > 0, "{run:?} overlaps what ended at {end}");
                end = run.offset + run.len;
                for block in run.offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
                    said[to_usize(block)] = Some(run.mapped);
                }
            }
            next = more;
        }
        for (block, said) in (0..).zip(said) {
            let (was, is) = (before.blocks.get(&block), known.blocks.get(&block));
            let (was, is) = (was.copied().unwrap_or_default(), is.copied().unwrap_or_default());
            assert!(said.is_some() || was == is, "{old:?} to {new}: block {block} is left out");
            assert!(said != Some(false) || is == [0; 8], "{new}: block {block} is not zero");
        }
        self.reached.note("differences");
    }
}

fn stamp(volume: &ModelVolume, sector: u64) -> u64 {
    let stamps = volume.blocks.get(&(sector / BLOCK_SECTORS));
    stamps.map_or(0, |stamps| stamps[to_usize(sector % BLOCK_SECTORS)])
}

/// Whether a write stays within what its volume was promised.
fn promised(pool: &Pool, op: &Op) -> bool {
    let Op::Write { volume, first, count, .. } = op else { return false };
    let Ok(info) = pool.find(volume) else { return false };
    let blocks = (first + count).div_ceil(BLOCK_SECTORS) - first / BLOCK_SECTORS;
    info.own_bytes + blocks * BLOCK_BYTES <= info.reservation_bytes
}
