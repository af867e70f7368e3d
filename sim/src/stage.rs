//! One life of a pool on a simulated disk: opened, used, and watched at every event, so that all the
//! power failures and kills of one run can be looked at after a single run.
//!
//! ```text
//!  open, find out the state ---- act ---- act ---- act ----> compare
//!     |      |      |      |      |   |    |   |    |   |      a moment before every completion
//! ```
//! Between two completions operations are only asked for, and what is asked for is under way at the
//! next moment: whatever a cut between the two can leave, a cut at that moment can leave too.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::join;

use super::case::{CaseLife, End};
use super::gen_ops::Op;
use super::model::Model;
use super::rare::{Rare, Rares};
use super::run::{Config, Life, Log, SharedLog, check_sound, observe, perform, resolve, step};
use super::trouble::Suffered;
use pando_engine::disk::sim::{FaultOp, Moment, Rng, SimDisk, SimDriver, SimImage, SimOptions};
use pando_engine::error::ErrorKind;
use pando_engine::pool::Pool;
use pando_engine::runtime::executor::{Driver, Executor, Parked, Unpark};

/// What is done at one time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    /// One operation.
    One(Op),
    /// Two at once, of one step each, which do not touch the same sectors: any order will do.
    Race(Op, Op),
}

impl Act {
    /// Whether it can be done to a pool that holds `model`.
    #[must_use]
    pub fn fits(&self, model: &Model) -> bool {
        match self {
            Self::One(op) => op.fits(model),
            Self::Race(one, other) => one.fits(model) && other.fits(model),
        }
    }
}

/// A moment at which the power may have failed, and what was promised by then.
pub struct Seen {
    /// The disk.
    pub moment: Moment,
    /// The history.
    pub log: Rc<Log>,
    /// Acts begun.
    pub begun: usize,
}

impl Seen {
    /// What was done until then in a life, ending so.
    #[must_use]
    pub(super) fn life(&self, life: &CaseLife, end: End) -> CaseLife {
        let (seed, troubles) = (life.seed, life.troubles.clone());
        CaseLife { seed, troubles, acts: life.acts[..self.begun].to_vec(), end }
    }

    /// What the next life finds after an end at this moment.
    #[must_use]
    pub(super) fn leave(&self, end: End) -> (SimImage, Log) {
        let mut log = Log::clone(&self.log);
        let image = end.leave(&self.moment, &mut log);
        (image, log)
    }
}

/// Which moments are kept. The last one is kept in any case, but of openings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// None.
    Nothing,
    /// All, from the first act of this number on (0: from the opening on).
    From(usize),
    /// One in so many, by a seed.
    OneIn(u64, u64),
    /// All of the opening, none after that.
    Opening,
}

/// A pool, what it must be found to hold, and who watches it.
pub struct Stage<'a> {
    /// How the pool is opened.
    pub config: &'a Config,
    /// The disk.
    pub sim: SimDisk,
    /// The history.
    pub log: SharedLog,
    /// Rare states that were met.
    pub rares: &'a Rares,
    pool: RefCell<Option<Pool>>,
    pub(super) begun: Cell<usize>,
    /// How it goes, if something goes wrong.
    pub(super) suffered: RefCell<Option<Suffered>>,
}

impl<'a> Stage<'a> {
    /// A life that begins with `image`.
    #[must_use]
    pub fn new(config: &'a Config, image: SimImage, seed: u64, log: Log, rares: &'a Rares) -> Self {
        let sim = SimDisk::from_image(image, seed, SimOptions::default());
        let log = Rc::new(RefCell::new(log));
        let (pool, suffered) = (RefCell::new(None), RefCell::new(None));
        Self { config, sim, log, rares, pool, begun: Cell::new(0), suffered }
    }

    /// Runs `future`, to its end or until the power fails, and keeps the moments on the way.
    pub fn run<F: Future>(&self, keep: Keep, future: F) -> (Option<F::Output>, Vec<Seen>) {
        if keep == Keep::Nothing {
            return (self.sim.run(future), Vec::new());
        }
        let seed = if let Keep::OneIn(_, seed) = keep { seed } else { 0 };
        let watch = Watch {
            driver: self.sim.driver(),
            stage: self,
            keep,
            rng: Rng::new(seed),
            decided: None,
            last: None,
            seen: Vec::new(),
        };
        let mut executor = Executor::new(watch);
        let output = executor.run(future);
        let watch = executor.driver();
        if keep != Keep::Opening {
            watch.keep();
        }
        let seen = std::mem::take(&mut watch.seen);
        (output, seen)
    }

    /// Opens the pool and finds out in which state it is.
    ///
    /// # Panics
    /// When it cannot be opened, or is in a state in which it cannot be.
    pub async fn begin(&self) -> Pool {
        let life = Life { sim: &self.sim, config: self.config, log: &self.log };
        let pool = life.begin().await;
        let pool = pool.unwrap_or_else(|error| panic!("the pool does not open: {error}"));
        self.pool.replace(Some(pool.clone()));
        pool
    }

    /// Opens the pool, does what `next` wants until it wants nothing, compares. What cannot be done
    /// is left out.
    ///
    /// # Panics
    /// When the pool does anything wrong.
    pub async fn live(&self, next: impl FnMut(&Model) -> Option<Act>) -> Pool {
        let pool = self.begin().await;
        self.go_on(pool, next).await
    }

    /// As [`Self::live`], with a pool that is open.
    ///
    /// # Panics
    /// When the pool does anything wrong.
    pub async fn go_on(&self, mut pool: Pool, mut next: impl FnMut(&Model) -> Option<Act>) -> Pool {
        loop {
            let act = next(self.log.borrow().last());
            let Some(act) = act else { break };
            self.begun.set(self.begun.get() + 1);
            if !act.fits(self.log.borrow().last()) {
                continue;
            }
            pool = self.act(pool, &act).await;
        }
        check_sound(&pool).await;
        let seen = observe(&pool).await.unwrap_or_else(|e| panic!("at the end: {e}"));
        let log = self.log.borrow();
        assert!(seen == *log.last(), "at the end: {}", seen.difference(log.last()));
        pool
    }

    /// Does one act; the pool is another one if it was opened again.
    async fn act(&self, mut pool: Pool, act: &Act) -> Pool {
        match act {
            Act::One(op) => {
                if *op == Op::Reopen {
                    self.pool.replace(None);
                    pool.close().await.unwrap_or_else(|e| panic!("closing fails: {e}"));
                    let opened = self.config.open(&self.sim).await;
                    pool = opened.unwrap_or_else(|e| panic!("it does not open again: {e}"));
                    self.pool.replace(Some(pool.clone()));
                }
                self.rares.before(&pool, op);
                let refused = self.log.borrow().refused;
                let done = step(&pool, &self.log, op).await;
                done.unwrap_or_else(|e| panic!("the workload failed: {e}"));
                let refused = self.log.borrow().refused > refused;
                self.rares.after(&pool, op, refused);
            }
            Act::Race(one, other) => self.race(&pool, one, other).await,
        }
        pool
    }

    async fn race(&self, pool: &Pool, one: &Op, other: &Op) {
        let before = self.log.borrow().states.len() - 1;
        let reads = self.data_reads(pool);
        let (first, second) = self.log.borrow_mut().issue_race(one, other);
        let results = join(perform(pool, one, first), perform(pool, other, second)).await;
        let mut refused = false;
        for (op, result) in [(one, results.0), (other, results.1)] {
            match result {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NoSpace => refused = true,
                Err(error) => panic!("the workload failed: {op:?}: {error}"),
            }
        }
        if self.data_reads(pool) > reads + 2 {
            self.rares.met(Rare::MergeOvertaken);
        }
        if refused {
            self.log.borrow_mut().refused += 1;
            resolve(pool, &self.log, before).await;
        } else {
            self.log.borrow_mut().acknowledge_all();
        }
    }

    /// Reads of data so far: each merge of a partly covered block is one.
    fn data_reads(&self, pool: &Pool) -> u64 {
        self.sim.asked(FaultOp::Read).saturating_sub(pool.counters().metadata_reads)
    }
}

/// Sleeps like the disk's driver, and looks at the disk before anything completes.
struct Watch<'s, 'a> {
    driver: SimDriver,
    stage: &'s Stage<'a>,
    keep: Keep,
    rng: Rng,
    /// Whether the moment after so many events is kept.
    decided: Option<(u64, bool)>,
    /// The last history that was kept.
    last: Option<([u64; 4], Rc<Log>)>,
    seen: Vec<Seen>,
}

impl Watch<'_, '_> {
    fn wants(&mut self, events: u64) -> bool {
        let begun = self.stage.begun.get();
        let opened = self.stage.pool.borrow().is_some() || begun > 0;
        match self.keep {
            Keep::Nothing => false,
            Keep::From(first) => begun >= first,
            Keep::Opening => !opened,
            Keep::OneIn(one_in, _) => match self.decided {
                Some((at, wanted)) if at == events => wanted,
                _ => {
                    let wanted = self.rng.below(one_in) == 0;
                    self.decided = Some((events, wanted));
                    wanted
                }
            },
        }
    }

    fn keep(&mut self) {
        let moment = self.stage.sim.moment();
        // What a read has told since changes nothing on the disk; the last word counts.
        if self.seen.last().is_some_and(|seen| seen.moment.events() == moment.events()) {
            self.seen.pop();
        }
        if let Some(pool) = &*self.stage.pool.borrow() {
            self.stage.rares.at_moment(pool);
        }
        let log = self.log();
        self.seen.push(Seen { moment, log, begun: self.stage.begun.get() });
    }

    /// The history, copied only when it has changed.
    fn log(&mut self) -> Rc<Log> {
        let log = self.stage.log.borrow();
        let [states, durable, acknowledged] =
            [log.states.len(), log.durable, log.acknowledged].map(pando_engine::units::to_u64);
        let key = [states, durable, acknowledged, log.stamp];
        match &self.last {
            Some((last, log)) if *last == key => Rc::clone(log),
            _ => {
                // Whoever is damaged may be found in an older state too.
                let whole = self.stage.suffered.borrow().is_some();
                let copy = Rc::new(if whole { log.clone() } else { log.since_durable() });
                self.last = Some((key, Rc::clone(&copy)));
                copy
            }
        }
    }
}

impl Driver for Watch<'_, '_> {
    fn poll(&mut self) {
        self.driver.poll();
    }

    fn park(&mut self) -> Parked {
        if self.wants(self.stage.sim.io_count()) {
            self.keep();
        }
        self.driver.park()
    }

    fn halted(&self) -> bool {
        self.driver.halted()
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        self.driver.unparker()
    }
}
