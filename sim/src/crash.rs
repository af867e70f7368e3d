//! Power cuts: a workload is cut at every event, every cut leaves many images, every image is
//! opened and compared with the history; and cut again while it is being opened.
//!
//! The oracle is one number: the whole pool, the existence of its volumes included, is the model
//! after *n* steps, for one *n* between the last durable step and the last issued one.
//!
//! A workload runs once and is watched ([`super::stage`]); an image that was opened before is not
//! opened again, but what was found in it must do for the new history too.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use super::case::{Case, CaseLife, End, play};
use super::distinct::Distinct;
use super::gen_ops::{Bounds, Generator, Op};
use super::model::Model;
use super::rare::{Facts, Rare, Rares};
use super::run::{Config, Log, drain, observe};
use super::stage::{Act, Keep, Seen, Stage};
use super::trouble::{Suffered, judge_damaged};
use pando_engine::disk::sim::{CutPlan, Grain, Moment, Rng, SimDisk, SimImage, SimOptions};
use pando_engine::pool::check_offline;
use pando_engine::units::{to_u64, to_usize};

/// Operations on a pool that is used further after its recovery.
const OPS_ON: usize = 6;
/// Of how many recoveries it is found out which rare states they met: one in so many.
const FACTS_ONE_IN: u64 = 8;

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
    /// Moments at which a workload was cut.
    pub cuts: u64,
    /// Pools that were used further after their recovery.
    pub went_on: u64,
    /// Of the states those that a kill left.
    pub kills: u64,
    /// States that no process of this campaign had seen before.
    pub distinct: u64,
    /// Images that were the same as one opened shortly before, and not opened again: not counted
    /// as states.
    pub repeated: u64,
}

impl CrashCounts {
    /// Crash states of any depth.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.states.iter().sum()
    }
}

/// A life that was watched.
pub(super) struct Watched {
    pub(super) sim: SimDisk,
    pub(super) seen: Vec<Seen>,
    /// Whether it came to its end.
    pub(super) ended: bool,
    /// How it went, if something went wrong.
    pub(super) suffered: Option<Suffered>,
}

/// Explores the crash states of workloads.
pub struct Explorer {
    /// How pools are opened.
    pub config: Config,
    /// How far to go.
    pub reach: Reach,
    /// What was explored so far.
    pub counts: CrashCounts,
    /// Of so many pieces that are not durable or fewer, every subset is tried as what has landed,
    /// whatever `reach` says of images of the first depth.
    pub subsets_of: usize,
    /// Rare states met so far.
    pub rares: Rares,
    /// The lives that led to what is being looked at.
    pub(super) trail: Vec<CaseLife>,
    /// Images opened in this workload, and what they held.
    known: HashMap<u64, Rc<Model>>,
    distinct: Distinct,
    rng: Rng,
}

impl Explorer {
    /// An explorer whose random choices come from `seed`.
    #[must_use]
    pub fn new(config: Config, reach: Reach, seed: u64) -> Self {
        Self {
            config,
            reach,
            counts: CrashCounts::default(),
            subsets_of: 0,
            rares: Rares::default(),
            trail: Vec::new(),
            known: HashMap::new(),
            distinct: Distinct::default(),
            rng: Rng::new(seed),
        }
    }

    /// Runs `ops` on a fresh pool, cut at every `stride`-th moment from event `first` on, and
    /// explores what is left. Returns the events of the whole run.
    ///
    /// # Panics
    /// When a pool cannot be opened, or is found in a state in which it cannot be.
    pub fn cut_everywhere(&mut self, ops: &[Op], seed: u64, first: u64, stride: usize) -> u64 {
        let acts = ops.iter().cloned().map(Act::One).collect();
        let life = CaseLife { acts, ..CaseLife::new(seed) };
        self.begin(self.config, seed);
        let all = catch_unwind(AssertUnwindSafe(|| {
            let log = Log::new(Model::default());
            let watched = self.watch(self.config.formatted(), &log, &life, Keep::From(0));
            let late = watched.seen.iter().filter(|seen| seen.moment.events() >= first);
            for seen in late.step_by(stride) {
                self.cut(seen, &life);
            }
            watched.sim.io_count()
        }));
        all.unwrap_or_else(|panic| {
            eprintln!("while trying {}", self.case());
            resume_unwind(panic)
        })
    }

    /// Begins another workload, which has nothing to do with those before.
    pub(super) fn begin(&mut self, config: Config, seed: u64) {
        self.config = config;
        self.known.clear();
        self.trail.clear();
        self.rng = Rng::new(seed);
    }

    /// What is being looked at just now.
    #[must_use]
    pub fn case(&self) -> Case {
        Case { config: self.config, lives: self.trail.clone() }
    }

    /// Lives through a life to its end.
    pub(super) fn watch(
        &mut self,
        image: SimImage,
        log: &Log,
        life: &CaseLife,
        keep: Keep,
    ) -> Watched {
        self.trail.push(life.clone());
        let image = life.rotten(image);
        let stage = Stage::new(&self.config, image, life.seed, log.clone(), &self.rares);
        let (seen, ended) = play(&stage, life, keep);
        self.trail.pop();
        Watched { seen, ended, suffered: stage.suffered.take(), sim: stage.sim }
    }

    /// Lives through a life of so many acts, which it is given as it needs them. Returns it with
    /// them, and the moments to keep.
    pub(super) fn watch_acts(
        &mut self,
        image: SimImage,
        log: &Log,
        life: CaseLife,
        keep: Keep,
        mut acts: impl FnMut(&CaseLife, &Model) -> Option<Act>,
    ) -> (CaseLife, Vec<Seen>) {
        self.trail.push(life);
        let life = self.trail.last_mut().expect("just pushed");
        let stage = Stage::new(&self.config, image, life.seed, log.clone(), &self.rares);
        let closes = life.end == End::Close;
        let next = |model: &Model| {
            let act = acts(life, model)?;
            life.acts.push(act.clone());
            Some(act)
        };

        let (_, seen) = stage.run(keep, async {
            let pool = stage.live(next).await;
            if closes {
                pool.close().await.unwrap_or_else(|e| panic!("closing fails: {e}"));
            }
        });
        let life = self.trail.pop().expect("just pushed");
        (life, seen)
    }

    /// Lets the power fail at a moment of a life, and opens what that leaves.
    pub(super) fn cut(&mut self, seen: &Seen, life: &CaseLife) {
        self.counts.cuts += 1;
        self.explore(seen, life, 0);
    }

    /// Kills the process at a moment of a life, and opens what that leaves.
    pub(super) fn kill(&mut self, seen: &Seen, life: &CaseLife, memory: bool) {
        let end = End::Kill { at: Some(seen.moment.events()), seed: self.rng.bits(), memory };
        self.trail.push(seen.life(life, end));
        let (image, log) = seen.leave(end);
        self.state(&image, &log, 0);
        self.trail.pop();
    }

    /// Judges what an end at a moment of a life leaves in which something was damaged.
    pub(super) fn judge(&mut self, seen: &Seen, life: &CaseLife, end: End, suffered: &Suffered) {
        self.trail.push(seen.life(life, end));
        let (image, log) = seen.leave(end);
        let sum = image.sum();
        self.counts.states[0] += 1;
        self.counts.distinct += u64::from(self.distinct.insert(sum));
        self.trail.push(CaseLife::new(0));
        judge_damaged(&self.config, &image, &log, suffered);
        self.trail.pop();
        self.trail.pop();
    }

    /// Opens the images of a cut.
    fn explore(&mut self, seen: &Seen, life: &CaseLife, depth: usize) {
        let mut log = Log::clone(&seen.log);
        log.power_failed();
        let most = self.reach.plans[depth];
        let plans = if depth == 0 && self.subsets_of > 0 {
            all_plans(&seen.moment, &mut self.rng, most, self.subsets_of)
        } else {
            plans_at(&seen.moment, &mut self.rng, most)
        };
        let at = Some(seen.moment.events());
        self.trail.push(seen.life(life, End::Power { at, plan: CutPlan::KeepNone }));
        for plan in plans {
            let here = self.trail.last_mut().expect("just pushed");
            here.end = End::Power { at, plan };
            self.state(&seen.moment.after_cut(plan), &log, depth);
        }
        self.trail.pop();
    }

    /// Opens what a crash has left, unless it was opened before, and compares.
    fn state(&mut self, image: &SimImage, log: &Log, depth: usize) {
        let sum = image.sum();
        if let Some(model) = self.known.get(&sum) {
            self.counts.repeated += 1;
            let found = log.find(model, log.acknowledged);
            found.unwrap_or_else(|e| panic!("as was seen before: {e}"));
            return;
        }
        self.counts.states[depth] += 1;
        self.counts.distinct += u64::from(self.distinct.insert(sum));
        let killed = self.trail.last().is_some_and(|l| matches!(l.end, End::Kill { .. }));
        self.counts.kills += u64::from(killed);
        let seed = self.rng.bits();
        let go_on = self.rng.below(self.reach.go_on_one_in) == 0;
        let nested = depth < 2 && self.rng.below(self.reach.nested_one_in[depth]) == 0;
        let facts = (self.rng.below(FACTS_ONE_IN) == 0).then(|| Facts::of(image));
        if depth == 2 {
            self.rares.met(Rare::ThirdCut);
        }
        let end = if go_on { End::Drain } else { End::REST };
        self.trail.push(CaseLife { end, ..CaseLife::new(seed) });
        let keep = if nested { Keep::Opening } else { Keep::Nothing };
        let (found, moments) = self.recover(image, log, facts, keep);
        self.trail.pop();
        self.known.insert(sum, Rc::new(found));
        if nested {
            if killed {
                self.rares.met(Rare::RecoveryFromKillCut);
            }
            self.cut_recovery(moments, seed, depth);
        }
    }

    /// Opens a pool after a crash, compares, and goes on with it if the life at the end of the
    /// trail is to end so.
    fn recover(
        &mut self,
        image: &SimImage,
        log: &Log,
        facts: Option<Facts>,
        keep: Keep,
    ) -> (Model, Vec<Seen>) {
        let life = self.trail.last_mut().expect("the life that opens it");
        let go_on = life.end == End::Drain;
        if go_on {
            self.counts.went_on += 1;
            check_image(image);
        }
        let stage = Stage::new(&self.config, image.clone(), life.seed, log.clone(), &self.rares);
        let mut generator = Generator::new(life.seed, Bounds::default());
        let (found, moments) = stage.run(keep, async {
            let pool = stage.begin().await;
            if let Some(facts) = facts {
                facts.compare(&pool, &self.rares);
            }
            let found = stage.log.borrow().last().clone();
            if go_on {
                let next = |model: &Model| {
                    let more = life.acts.len() < OPS_ON;
                    more.then(|| {
                        let act = Act::One(generator.next_op(model));
                        life.acts.push(act.clone());
                        act
                    })
                };
                let pool = stage.go_on(pool, next).await;
                drain(&pool).await.unwrap_or_else(|e| panic!("cannot delete all: {e}"));
                assert!(observe(&pool).await.is_ok_and(|model| model.volumes.is_empty()));
            }
            found
        });
        (found.expect("no power failure was asked for"), moments)
    }

    /// Cuts the power while a pool is being opened.
    fn cut_recovery(&mut self, mut moments: Vec<Seen>, seed: u64, depth: usize) {
        let most = to_usize(self.reach.nested_cuts);
        while moments.len() > most {
            let pick = self.rng.below(to_u64(moments.len()));
            moments.swap_remove(to_usize(pick));
        }
        let life = CaseLife::new(seed);
        for seen in &moments {
            self.explore(seen, &life, depth + 1);
        }
    }
}

/// What the power has left is sound before any recovery. Only of the superblock's two copies the
/// second may be missing, even of one that says that the pool was closed.
///
/// # Panics
/// When the checker finds anything else.
pub(super) fn check_image(image: &SimImage) {
    let sim = SimDisk::from_image(image.clone(), 0, SimOptions::default());
    let report = sim.run(async { check_offline(&sim.disk(), &|_, _| ()).await });
    let report = report.expect("no power failure was asked for");
    let mut findings = report.unwrap_or_else(|e| panic!("check of the image: {e}")).findings;
    findings.retain(|finding| finding.code != "K11");
    assert!(findings.is_empty(), "check of the image: {findings:?}");
}

/// What may have landed of what no sync has covered: nothing, all, each prefix, each alone, all
/// but each, random subsets, torn and garbled ones; at most `most` of them, the first two always.
pub fn plans(sim: &SimDisk, rng: &mut Rng, most: usize) -> Vec<CutPlan> {
    plans_at(&sim.moment(), rng, most)
}

/// As [`plans`], of a moment.
pub fn plans_at(moment: &Moment, rng: &mut Rng, most: usize) -> Vec<CutPlan> {
    let pending = moment.pending(Grain::Block);
    if pending == 0 {
        return vec![CutPlan::KeepNone];
    }
    let mut others = single_plans(pending);
    // None if all that is pending are writes of a killed process of which nothing landed.
    let sectors = to_u64(moment.pending(Grain::Sector));
    if sectors > 0 {
        others.push(CutPlan::Prefix(Grain::Sector, to_usize(rng.below(sectors))));
    }
    others.extend(random_plans(rng, most.div_ceil(8)));
    let mut plans = vec![CutPlan::KeepNone, CutPlan::KeepAll];
    while plans.len() < most && !others.is_empty() {
        let pick = to_usize(rng.below(to_u64(others.len())));
        plans.push(others.swap_remove(pick));
    }
    plans
}

/// Every subset of at most `subsets_of` pieces; of more of them nothing, all, each prefix, each
/// alone, all but each, all pairs, and `more` random ones of each sort. Torn and garbled ones in
/// any case.
fn all_plans(moment: &Moment, rng: &mut Rng, more: usize, subsets_of: usize) -> Vec<CutPlan> {
    let pending = moment.pending(Grain::Block);
    if pending == 0 {
        return vec![CutPlan::KeepNone];
    }
    let mut plans = vec![CutPlan::KeepNone, CutPlan::KeepAll];
    if pending <= subsets_of {
        let all = (1u64 << pending) - 1;
        plans.extend((1..all).map(|bits| CutPlan::Mask(Grain::Block, bits)));
    } else {
        plans.extend(single_plans(pending));
        let pairs = (0..pending.min(64)).flat_map(|one| (0..one).map(move |other| (one, other)));
        let pair = |(one, other)| CutPlan::Mask(Grain::Block, 1u64 << one | 1u64 << other);
        plans.extend(pairs.map(pair));
        plans.extend(random_plans(rng, more));
    }
    plans.extend(random_plans(rng, 2).filter(|plan| !matches!(plan, CutPlan::Subset(_))));
    plans
}

fn single_plans(pending: usize) -> Vec<CutPlan> {
    let each = |index| {
        let (prefix, one) =
            (CutPlan::Prefix(Grain::Block, index), CutPlan::OnlyOne(Grain::Block, index));
        [prefix, one, CutPlan::AllBut(Grain::Block, index)]
    };
    (0..pending).flat_map(each).collect()
}

fn random_plans(rng: &mut Rng, each: usize) -> impl Iterator<Item = CutPlan> {
    let mut plans = Vec::with_capacity(3 * each);
    for _ in 0..each {
        plans.push(CutPlan::Subset(rng.bits()));
        plans.push(CutPlan::Torn(rng.bits()));
        plans.push(CutPlan::Garbled(rng.bits()));
    }
    plans.into_iter()
}
