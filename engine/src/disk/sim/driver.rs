//! The life cycle of an I/O on a simulated disk.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use slab::Slab;

use super::cut::{Piece, Stage};
use super::fault::{Effect, FaultOp, Faults, Strike};
use super::image::{ALL_SECTORS, Content, Image};
use super::rng::Rng;
use super::served::Served;
use super::timer::Timers;
use super::{SimImage, SimOptions};
use crate::disk::HeapRing;
use crate::error::{Error, Result};
use crate::runtime::executor::{Driver, Parked, Unpark};
use crate::runtime::sync::{Mutex, Parker};
use crate::units::{BLOCK_BYTES, BlockNo, to_u64};

pub(super) enum Work {
    Read {
        at: u64,
        count: u64,
    },
    /// A write or a discard; the number of its pieces.
    Write(u64),
    Sync {
        asked_at: u64,
        len_blocks: u64,
    },
}

pub(super) enum Outcome {
    Done(Vec<Content>),
    Failed(i32),
}

pub(super) enum Progress {
    InFlight(Option<Waker>),
    Over(Outcome),
    /// The future was dropped.
    Abandoned,
}

pub(super) struct Op {
    op: FaultOp,
    /// The first block of the request.
    at: u64,
    blocks: u64,
    work: Work,
    effect: Option<Effect>,
    pub(super) progress: Progress,
}

/// State of the disk.
pub(super) struct State {
    pub(super) rng: Rng,
    options: SimOptions,
    pub(super) durable: Image,
    /// The content that a read returns: durable and completed writes.
    pub(super) current: Image,
    /// Writes that are not durable, in the order of the requests.
    pub(super) pieces: Vec<Piece>,
    /// The memory of the journal; empty before the first request for it.
    pub(super) ring: HeapRing,
    pub(super) ops: Slab<Op>,
    /// Operations that can complete next.
    in_flight: Vec<usize>,
    /// Slow operations, with the time at which each becomes ready to complete.
    slow: Vec<(Duration, usize)>,
    /// Number of operations that never complete.
    hung: u64,
    next_write: u64,
    /// Logical time that orders deliveries and syncs. Moment 0 is before everything in this
    /// process.
    now: u64,
    pub(super) events: u64,
    pub(super) cut_at: Option<u64>,
    pub(super) halted: bool,
    /// Whether every task waits for operations that never complete.
    pub(super) stuck: bool,
    /// Whether a sync has failed: the writes that it covered may be lost.
    pub(super) flush_failed: bool,
    /// Number of requested operations, by kind.
    pub(super) asked: BTreeMap<FaultOp, u64>,
    pub(super) faults: Faults,
    pub(super) trace: u64,
    pub(super) timers: Timers,
    pub(super) served: Served,
}

impl State {
    pub(super) fn new(image: SimImage, rng: Rng, options: SimOptions) -> Self {
        let (durable, current, pieces, ring) = image.into_parts();
        Self {
            rng,
            options,
            durable,
            current,
            next_write: pieces.iter().map(|piece| piece.write + 1).max().unwrap_or(0),
            pieces,
            ring,
            ops: Slab::new(),
            in_flight: Vec::new(),
            slow: Vec::new(),
            hung: 0,
            now: 1,
            events: 0,
            cut_at: None,
            halted: false,
            stuck: false,
            flush_failed: false,
            asked: BTreeMap::new(),
            faults: Faults::default(),
            trace: 0,
            timers: Timers::default(),
            served: Served::default(),
        }
    }

    pub(super) fn len_bytes(&self) -> u64 {
        self.current.len_blocks() * BLOCK_BYTES
    }

    pub(super) const fn new_write(&mut self) -> u64 {
        self.next_write += 1;
        self.next_write - 1
    }

    pub(super) const fn moment(&mut self) -> u64 {
        self.now += 1;
        self.now - 1
    }

    const fn note(&mut self, what: u64) {
        self.trace = (self.trace ^ what).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(17);
    }

    /// Counts an event; returns false if the power fails instead.
    fn event(&mut self) -> bool {
        if self.cut_at == Some(self.events) {
            self.halted = true;
            self.served.power_failed();
        }
        if !self.halted {
            self.events += 1;
        }
        !self.halted
    }

    pub(super) fn check_range(&self, at: BlockNo, blocks: u64) -> Result<()> {
        let size = self.current.len_blocks();
        match at.get().checked_add(blocks) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::invalid(format!(
                "{blocks} blocks at {at} are beyond the end of the simulated disk ({size} blocks)"
            ))),
        }
    }

    /// Checks that an operation does not touch blocks being discarded: writing them is a race, and
    /// reading them means that they are in use.
    fn check_apart(&self, op: FaultOp, at: u64, blocks: u64) {
        for (_, other) in &self.ops {
            let meet = at < other.at + other.blocks && other.at < at + blocks;
            assert!(
                !meet || (op != FaultOp::Discard && other.op != FaultOp::Discard),
                "{op:?} of {blocks} blocks at {at} beside {:?} of {} at {}",
                other.op,
                other.blocks,
                other.at
            );
        }
    }

    pub(super) fn submit(
        &mut self,
        op: FaultOp,
        work: Work,
        at: u64,
        blocks: u64,
    ) -> Option<usize> {
        if self.halted || (op != FaultOp::Read && !self.event()) {
            return None;
        }
        *self.asked.entry(op).or_default() += 1;
        self.check_apart(op, at, blocks);
        let effect = self.faults.next(op);
        if effect.is_some() {
            let to = BlockNo::new(self.place(effect, at, blocks));
            self.faults.strikes.push(Strike { op, at: BlockNo::new(at), to, blocks });
        }
        let key = self.ops.insert(Op {
            op,
            at,
            blocks,
            work,
            effect,
            progress: Progress::InFlight(None),
        });
        match effect {
            Some(Effect::Hung) => self.hung += 1,
            Some(Effect::Slow(time)) => self.slow.push((self.timers.now() + time, key)),
            _ => self.in_flight.push(key),
        }
        self.served.something_to_do();
        Some(key)
    }

    /// The block at which an operation on `blocks` blocks at `at` really happens, by its fault.
    fn place(&self, effect: Option<Effect>, at: u64, blocks: u64) -> u64 {
        match effect {
            Some(Effect::Misdirected { to }) => to.get(),
            Some(Effect::Shifted(by)) => {
                let last = self.current.len_blocks().saturating_sub(blocks);
                at.saturating_add_signed(by).min(last)
            }
            _ => at,
        }
    }

    /// Adds the pieces of a write that has been submitted.
    pub(super) fn add_pieces(&mut self, key: Option<usize>, at: u64, blocks: Vec<Content>) {
        let Some(key) = key else { return };
        let Op { work: Work::Write(write), effect, .. } = self.ops[key] else { return };
        let at = self.place(effect, at, to_u64(blocks.len()));
        for (block, content) in (at..).zip(blocks) {
            let sum = content.as_ref().map_or(0, |content| content.sum());
            self.note(sum ^ block);
            let stage = Stage::InFlight;
            self.pieces.push(Piece { write, block, content, mask: ALL_SECTORS, stage });
        }
    }

    /// Completes one I/O, or makes the power fail; if there is no I/O, time passes. Returns the
    /// wakers to call; `None` if no task waits for time or for an I/O that will complete.
    pub(super) fn go_on(&mut self) -> Option<Vec<Waker>> {
        let mut woken = Vec::new();
        self.end_slow();
        if self.in_flight.is_empty() {
            let io = self.slow.iter().map(|(due, _)| *due).min();
            if self.timers.leap(io, &mut woken) {
                return Some(woken);
            }
            if self.hung == 0 || self.served.is_on() {
                return None;
            }
            self.stuck = true;
            self.halted = true;
            return Some(woken);
        }
        woken.extend(self.complete_one());
        self.timers.io_completed(&mut woken);
        Some(woken)
    }

    /// Makes slow operations ready whose time is over; they complete like any other.
    fn end_slow(&mut self) {
        let now = self.timers.now();
        let Self { slow, in_flight, .. } = self;
        slow.retain(|(due, key)| {
            if *due <= now {
                in_flight.push(*key);
            }
            *due > now
        });
    }

    fn complete_one(&mut self) -> Option<Waker> {
        let chosen = if self.options.reorder {
            crate::units::to_usize(self.rng.below(to_u64(self.in_flight.len())))
        } else {
            0
        };
        let key = self.in_flight[chosen];
        if !matches!(self.ops[key].work, Work::Read { .. }) && !self.event() {
            return None;
        }
        self.in_flight.remove(chosen);
        self.note(to_u64(key));
        let outcome = self.carry_out(key);
        match std::mem::replace(&mut self.ops[key].progress, Progress::Over(outcome)) {
            Progress::InFlight(waker) => waker,
            Progress::Abandoned => {
                self.take(key);
                None
            }
            Progress::Over(_) => unreachable!("an operation completes once"),
        }
    }

    fn carry_out(&mut self, key: usize) -> Outcome {
        let Op { work, effect, .. } = &self.ops[key];
        match (work, *effect) {
            (Work::Read { .. }, Some(Effect::Error { errno, .. })) => Outcome::Failed(errno),
            (&Work::Read { at, count }, effect) => {
                let at = self.place(effect, at, count);
                let blocks = (at..at + count).map(|block| self.current.shared(block).cloned());
                Outcome::Done(blocks.collect())
            }
            (&Work::Write(write), effect) => {
                let stage = match effect {
                    Some(Effect::Lost | Effect::Error { landed: false, .. }) => None,
                    Some(Effect::Error { landed: true, .. }) => Some(Stage::Orphaned),
                    _ => Some(Stage::Completed),
                };
                self.land(write, stage);
                failure(effect)
            }
            (&Work::Sync { asked_at, len_blocks }, effect) => {
                match effect {
                    Some(Effect::Error { .. }) => self.orphan(asked_at),
                    Some(Effect::Lost) => {}
                    _ => self.harden(asked_at, len_blocks),
                }
                failure(effect)
            }
        }
    }

    /// Ends a write: its pieces are in the cache, or were never written.
    fn land(&mut self, write: u64, stage: Option<Stage>) {
        let Self { pieces, current, .. } = self;
        pieces.retain_mut(|piece| {
            if piece.write != write {
                return true;
            }
            let Some(stage) = stage else { return false };
            piece.stage = stage;
            current.set_sectors(piece.block, &piece.content, piece.mask);
            true
        });
    }

    /// Makes durable what was delivered before `asked_at`.
    fn harden(&mut self, asked_at: u64, len_blocks: u64) {
        let Self { pieces, durable, .. } = self;
        durable.extend(len_blocks);
        let covers = |piece: &Piece| matches!(piece.stage, Stage::Delivered(at) if at < asked_at);
        // A piece that the device dropped or a failed sync lost must never replace a later one.
        let mut number = 0;
        while let Some(orphan) = pieces.get(number) {
            let later = |later: &Piece| later.block == orphan.block && covers(later);
            if orphan.stage == Stage::Orphaned && pieces[number..].iter().any(later) {
                pieces.remove(number);
            } else {
                number += 1;
            }
        }
        pieces.retain(|piece| {
            let covered = covers(piece);
            if covered {
                durable.set_sectors(piece.block, &piece.content, piece.mask);
            }
            !covered
        });
    }

    fn orphan(&mut self, asked_at: u64) {
        self.flush_failed = true;
        for piece in &mut self.pieces {
            if matches!(piece.stage, Stage::Delivered(at) if at < asked_at) {
                piece.stage = Stage::Orphaned;
            }
        }
    }

    /// Delivers the outcome: a sync requested from now on covers the write.
    pub(super) fn take(&mut self, key: usize) -> Option<Outcome> {
        let op = self.ops.remove(key);
        if let Work::Write(write) = op.work {
            let delivered = Stage::Delivered(self.moment());
            // The newest writes are at the end.
            for piece in self.pieces.iter_mut().rev() {
                if piece.write == write && piece.stage == Stage::Completed {
                    piece.stage = delivered;
                }
            }
        }
        match op.progress {
            Progress::Over(outcome) => Some(outcome),
            Progress::InFlight(_) | Progress::Abandoned => None,
        }
    }
}

fn failure(effect: Option<Effect>) -> Outcome {
    match effect {
        Some(Effect::Error { errno, .. }) => Outcome::Failed(errno),
        _ => Outcome::Done(Vec::new()),
    }
}

/// Delivers one completion, or lets time pass, whenever no task is ready. It only sleeps while a
/// thread of its own does the I/O (`served.rs`).
pub struct SimDriver {
    state: Arc<Mutex<State>>,
    parker: Parker,
}

impl SimDriver {
    pub(super) fn new(state: Arc<Mutex<State>>) -> Self {
        let parker = Parker::new();
        state.lock().served.add_shard(parker.unparker());
        Self { state, parker }
    }
}

impl Driver for SimDriver {
    fn poll(&mut self) {}

    fn park(&mut self) -> Parked {
        let woken = {
            let mut state = self.state.lock();
            if state.halted {
                return Parked::Halted;
            }
            if state.served.is_on() { None } else { Some(state.go_on()) }
        };
        let Some(woken) = woken else {
            self.parker.park();
            return if self.halted() { Parked::Halted } else { Parked::Awake };
        };
        for waker in woken.expect("deadlock: every task waits, but not for I/O or time") {
            waker.wake();
        }
        Parked::Awake
    }

    fn halted(&self) -> bool {
        self.state.lock().halted
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        Arc::new(self.parker.unparker())
    }
}
