//! Power cuts: a workload is cut at every event, every cut leaves many images, every image is
//! opened and compared with the history; and cut again while it is being opened.
//!
//! The oracle is one number: the whole pool, the existence of its volumes included, is the model
//! after *n* steps, for one *n* between the last durable step and the last issued one.

use std::cell::RefCell;
use std::rc::Rc;

use super::gen_ops::{Bounds, Generator, Op};
use super::model::Model;
use super::run::{Config, Life, Log, SharedLog, Told, drain, observe};
use crate::disk::sim::{CutPlan, Grain, Rng, SimDisk, SimImage, SimOptions};
use crate::pool::check_offline;
use crate::units::{to_u64, to_usize};

/// How far the exploration of crash states goes.
#[derive(Clone, Copy, Debug)]
pub struct Reach {
    /// Images made of one cut, by depth: of the workload, of its recovery, of the recovery of that.
    pub plans: [usize; 3],
    /// Of how many images the recovery is cut again, by depth: one in so many.
    pub nested_one_in: [u64; 2],
    /// Events of a recovery at which it is cut, at most.
    pub nested_cuts: u64,
    /// One image in so many is used further after its recovery.
    pub go_on_one_in: u64,
}

/// What was explored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CrashCounts {
    /// Crash states that were opened and compared, by depth.
    pub states: [u64; 3],
    /// Events at which a workload was cut.
    pub cuts: u64,
    /// Pools that were used further after their recovery.
    pub went_on: u64,
}

impl CrashCounts {
    /// Crash states of any depth.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.states.iter().sum()
    }
}

/// Explores the crash states of workloads.
pub struct Explorer {
    /// How pools are opened.
    pub config: Config,
    /// How far to go.
    pub reach: Reach,
    /// What was explored so far.
    pub counts: CrashCounts,
    rng: Rng,
}

impl Explorer {
    /// An explorer whose random choices come from `seed`.
    #[must_use]
    pub fn new(config: Config, reach: Reach, seed: u64) -> Self {
        Self { config, reach, counts: CrashCounts::default(), rng: Rng::new(seed) }
    }

    /// Runs `ops` on a fresh pool, cut at every `stride`-th event from `first` on, and explores
    /// what is left. Returns the events of the whole run.
    ///
    /// # Panics
    /// When a pool cannot be opened, or is found in a state in which it cannot be.
    pub fn cut_everywhere(&mut self, ops: &[Op], seed: u64, first: u64, stride: usize) -> u64 {
        let base = self.config.formatted();
        let (sim, _) = self.run(&base, ops, seed, None);
        let events = sim.io_count();
        for cut in (first..events).step_by(stride) {
            let _told = Told(|| format!("seed {seed}, cut at event {cut} of {events}"));
            let (sim, log) = self.run(&base, ops, seed, Some(cut));
            self.counts.cuts += 1;
            self.explore(&sim, &log, 0);
        }
        events
    }

    /// Runs `ops`, to the end or until the power fails.
    fn run(&self, base: &SimImage, ops: &[Op], seed: u64, cut: Option<u64>) -> (SimDisk, Log) {
        let sim = SimDisk::from_image(base.clone(), seed, SimOptions::default());
        if let Some(cut) = cut {
            sim.set_cut_at(cut);
        }
        let log: SharedLog = Rc::new(RefCell::new(Log::new(Model::default())));
        let ended = sim.run(async {
            let life = Life { sim: &sim, config: &self.config, log: &log };
            let mut ops = ops.iter().cloned();
            life.drive(|_| ops.next()).await.map(drop)
        });
        assert_eq!(ended.is_none(), cut.is_some(), "the power fails when it is told to");
        if let Some(Err(error)) = ended {
            panic!("the workload failed: {error}");
        }
        let mut log = log.borrow().clone();
        log.power_failed();
        (sim, log)
    }

    /// Opens the images of a cut.
    fn explore(&mut self, sim: &SimDisk, log: &Log, depth: usize) {
        for plan in plans(sim, &mut self.rng, self.reach.plans[depth]) {
            let _told = Told(|| format!("{plan:?} at depth {depth}"));
            let image = sim.image_after_cut(plan);
            let events = self.recover(&image, log, depth);
            if depth < 2 && self.rng.below(self.reach.nested_one_in[depth]) == 0 {
                self.cut_recovery(&image, log, events, depth);
            }
        }
    }

    /// Opens a pool after a crash, compares, and goes on with it. Returns the events of opening.
    fn recover(&mut self, image: &SimImage, log: &Log, depth: usize) -> u64 {
        self.counts.states[depth] += 1;
        let seed = self.rng.bits();
        let go_on = self.rng.below(self.reach.go_on_one_in) == 0;
        let sim = SimDisk::from_image(image.clone(), seed, SimOptions::default());
        let shared: SharedLog = Rc::new(RefCell::new(log.clone()));
        let events = sim.run(async {
            if go_on {
                check_image(&sim).await;
            }
            let life = Life { sim: &sim, config: &self.config, log: &shared };
            if !go_on {
                let pool = life.begin().await;
                pool.unwrap_or_else(|error| panic!("the pool does not open: {error}"));
                return sim.io_count();
            }
            let mut generator = Generator::new(seed, Bounds::default());
            let mut left = 6;
            let pool = life.drive(|model| {
                left -= 1;
                (left >= 0).then(|| generator.next_op(model))
            });
            let pool = pool.await.unwrap_or_else(|e| panic!("cannot go on after recovery: {e}"));
            drain(&pool).await.unwrap_or_else(|e| panic!("cannot delete all: {e}"));
            assert!(observe(&pool).await.is_ok_and(|model| model.volumes.is_empty()));
            0
        });
        self.counts.went_on += u64::from(go_on);
        events.expect("no power failure was asked for")
    }

    /// Cuts the power while a pool is being opened.
    fn cut_recovery(&mut self, image: &SimImage, log: &Log, events: u64, depth: usize) {
        let all = events <= self.reach.nested_cuts;
        for index in 0..events.min(self.reach.nested_cuts) {
            let cut = if all { index } else { self.rng.below(events) };
            let seed = self.rng.bits();
            let sim = SimDisk::from_image(image.clone(), seed, SimOptions::default());
            sim.set_cut_at(cut);
            let _told = Told(|| format!("recovery cut at event {cut} of {events}, seed {seed}"));
            let opened = sim.run(async { self.config.open(&sim).await.map(drop) });
            // Another order of completions may need fewer events: then the open has succeeded.
            assert!(opened.is_none_or(|result| result.is_ok()), "the pool does not open");
            self.explore(&sim, log, depth + 1);
        }
    }
}

/// What the power has left is sound before any recovery. Only of the superblock's two copies the
/// second may be missing, even of one that says that the pool was closed.
async fn check_image(sim: &SimDisk) {
    let report = check_offline(&sim.disk(), &|_, _| ()).await;
    let mut findings = report.unwrap_or_else(|e| panic!("check of the image: {e}")).findings;
    findings.retain(|finding| finding.code != "K11");
    assert!(findings.is_empty(), "check of the image: {findings:?}");
}

/// What may have landed of what no sync has covered: nothing, all, each prefix, each alone, all
/// but each, random subsets, torn and garbled ones; at most `most` of them, the first two always.
pub fn plans(sim: &SimDisk, rng: &mut Rng, most: usize) -> Vec<CutPlan> {
    let pending = sim.pending(Grain::Block);
    if pending == 0 {
        return vec![CutPlan::KeepNone];
    }
    let mut others = Vec::new();
    for index in 0..pending {
        others.push(CutPlan::Prefix(Grain::Block, index));
        others.push(CutPlan::OnlyOne(Grain::Block, index));
        others.push(CutPlan::AllBut(Grain::Block, index));
    }
    let sectors = to_u64(sim.pending(Grain::Sector));
    others.push(CutPlan::Prefix(Grain::Sector, to_usize(rng.below(sectors))));
    for _ in 0..most.div_ceil(8) {
        others.push(CutPlan::Subset(rng.bits()));
        others.push(CutPlan::Torn(rng.bits()));
        others.push(CutPlan::Garbled(rng.bits()));
    }
    let mut plans = vec![CutPlan::KeepNone, CutPlan::KeepAll];
    while plans.len() < most && !others.is_empty() {
        let pick = to_usize(rng.below(to_u64(others.len())));
        plans.push(others.swap_remove(pick));
    }
    plans
}
