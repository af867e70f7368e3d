//! Lives on devices that fail: a kind of fault strikes a random operation of a random life, what is
//! asked of the pool is looked at, and then the process is killed or the power fails, at the end and
//! in the middle of the trouble.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use super::hung::{self, Scene};
use super::tally::{Failure, caught};
use crate::case::{CaseLife, End};
use crate::crash::{Explorer, Reach};
use crate::gen_ops::{Bounds, Generator, Op};
use crate::model::Model;
use crate::run::{Config, Log};
use crate::stage::{Act, Keep, Stage};
use crate::trouble::{Response, Trouble};
use pando_engine::disk::sim::{CutPlan, Effect, Fault, FaultOp, Rng};
use pando_engine::map::Fanout;
use pando_engine::units::{to_u64, to_usize};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const REACH: Reach =
    Reach { plans: [6, 3, 3], nested_one_in: [12, 8], nested_cuts: 3, go_on_one_in: 10 };
const BOUNDS: Bounds = Bounds { volumes: 4, volume_blocks: 24, write_blocks: 10 };
/// Moments in the middle of the trouble that are looked at, about.
const MOMENTS: u64 = 3;

/// A kind of fault.
enum Kind {
    /// Something happens to the nth operation of a sort, or from that one on; it may damage what
    /// was acknowledged.
    Op(FaultOp, bool, fn(&mut Rng) -> Effect, bool),
    /// Operations of all sorts take long.
    Slow,
    /// Bits are inverted at rest.
    Rot,
    /// An I/O never completes, and others go on.
    Hung(Scene),
}

impl Kind {
    /// Whether something that was acknowledged may not be there.
    const fn damages(&self) -> bool {
        match self {
            Self::Rot => true,
            Self::Op(.., damages) => *damages,
            Self::Slow | Self::Hung(_) => false,
        }
    }
}

const fn error(errno: i32, landed: bool) -> Effect {
    Effect::Error { errno, landed }
}

/// All kinds, by their names in reports.
const KINDS: [(&str, Kind); 22] = [
    ("read error", Kind::Op(FaultOp::Read, false, |_| error(EIO, false), false)),
    ("read errors from then on", Kind::Op(FaultOp::Read, true, |_| error(EIO, false), false)),
    ("write error, nothing landed", Kind::Op(FaultOp::Write, false, |_| error(EIO, false), false)),
    (
        "write error, landed all the same",
        Kind::Op(FaultOp::Write, false, |_| error(EIO, true), false),
    ),
    (
        "write errors from then on",
        Kind::Op(FaultOp::Write, true, |rng| error(EIO, rng.chance(8)), false),
    ),
    ("host file system full", Kind::Op(FaultOp::Write, true, |_| error(ENOSPC, false), false)),
    ("flush error", Kind::Op(FaultOp::Sync, false, |_| error(EIO, false), false)),
    ("flush errors from then on", Kind::Op(FaultOp::Sync, true, |_| error(EIO, false), false)),
    ("discard error", Kind::Op(FaultOp::Discard, false, |rng| error(EIO, rng.chance(8)), false)),
    ("discard errors from then on", Kind::Op(FaultOp::Discard, true, |_| error(EIO, false), false)),
    ("write lost", Kind::Op(FaultOp::Write, false, |_| Effect::Lost, true)),
    ("write to another place", Kind::Op(FaultOp::Write, false, shifted, true)),
    ("read from another place", Kind::Op(FaultOp::Read, false, shifted, true)),
    ("bit rot", Kind::Rot),
    ("slow I/O", Kind::Slow),
    ("read that never ends", Kind::Op(FaultOp::Read, false, |_| Effect::Hung, false)),
    ("write that never ends", Kind::Op(FaultOp::Write, false, |_| Effect::Hung, false)),
    ("flush that never ends", Kind::Op(FaultOp::Sync, false, |_| Effect::Hung, false)),
    ("a volume's read never ends, others go on", Kind::Hung(Scene::Read)),
    ("a volume's write never ends, others go on", Kind::Hung(Scene::Write)),
    ("a journal write never ends, others read", Kind::Hung(Scene::Journal)),
    ("a flush never ends, others read", Kind::Hung(Scene::Sync)),
];

/// Names of all kinds of fault.
pub fn names() -> impl Iterator<Item = &'static str> {
    KINDS.iter().map(|(name, _)| *name)
}

fn shifted(rng: &mut Rng) -> Effect {
    let by = 1 + to_i64(if rng.chance(8) { rng.below(4) } else { rng.below(200) });
    Effect::Shifted(if rng.chance(8) { by } else { -by })
}

fn to_i64(number: u64) -> i64 {
    i64::try_from(number).expect("a small number")
}

/// Explores seeds.
pub struct Faults {
    /// What looks at crash states, and counts.
    pub explorer: Explorer,
    /// Seeds explored.
    pub seeds: u64,
    /// Faults that have struck, by kind.
    pub struck: BTreeMap<&'static str, u64>,
}

impl Default for Faults {
    fn default() -> Self {
        let explorer = Explorer::new(Config::default(), REACH, 0);
        Self { explorer, seeds: 0, struck: BTreeMap::new() }
    }
}

impl Faults {
    /// Explores one seed; it chooses the kind of fault too.
    ///
    /// # Errors
    /// What was found wrong.
    pub fn explore(&mut self, seed: u64) -> Result<(), Failure> {
        self.seeds += 1;
        let (name, kind) = &KINDS[to_usize(seed % to_u64(KINDS.len()))];
        let mut rng = Rng::new(seed ^ 0xFA17);
        let config = config(&mut rng, kind);
        let explorer = &mut self.explorer;
        explorer.begin(config, seed);
        let done = caught(|| match kind {
            Kind::Hung(scene) => hung::play(explorer, *scene, &mut rng),
            _ => trouble(explorer, kind, &mut rng),
        });
        let failed = |why| {
            let repeat = format!("pando-sim faults --seed {seed}");
            Failure { repeat, why: format!("{name}: {why}"), case: Box::new(explorer.case()) }
        };
        let struck = done.map_err(failed)?;
        *self.struck.entry(name).or_default() += u64::from(struck);
        Ok(())
    }
}

fn config(rng: &mut Rng, kind: &Kind) -> Config {
    Config {
        pool_blocks: 480 + rng.below(200),
        journal_blocks: 8 + rng.below(6),
        fanout: Fanout { leaf_max: 4, inner_max: 4 },
        cache_bytes: if rng.chance(8) { 0 } else { 1 << 20 },
        discard: matches!(kind, Kind::Op(FaultOp::Discard, ..)) || !rng.chance(3),
        cascade_nodes: 4,
    }
}

/// A life without trouble, then one with trouble, then what that leaves. Whether the fault struck.
fn trouble(explorer: &mut Explorer, kind: &Kind, rng: &mut Rng) -> bool {
    let config = explorer.config;
    let (mut image, mut log) = (config.formatted(), Log::new(Model::default()));
    let generator = RefCell::new(Generator::new(rng.bits(), BOUNDS));
    let count = 4 + rng.below(16);
    let last = Keep::OneIn(u64::MAX, 0);
    let next = |most: u64| {
        let generator = &generator;
        move |life: &CaseLife, model: &Model| {
            let more = to_u64(life.acts.len()) < most;
            more.then(|| {
                loop {
                    let op = generator.borrow_mut().next_op(model);
                    if op != Op::Reopen {
                        break Act::One(op);
                    }
                }
            })
        }
    };
    // The end of a log that is damaged may be lost unnoticed: that is for others to look at.
    let killed = End::Kill { at: None, seed: rng.bits(), memory: true };
    let end = if kind.damages() { End::Close } else { killed };
    let before = CaseLife { end, ..CaseLife::new(rng.bits()) };
    let (before, seen) = explorer.watch_acts(image, &log, before, last, next(count));
    (image, log) = seen.last().expect("the end").leave(end);
    explorer.trail.push(before);
    // What it will do, and what that takes on a device that does not fail.
    let seed = rng.bits();
    let count = 4 + rng.below(24);
    let (mut life, _) =
        explorer.watch_acts(image.clone(), &log, CaseLife::new(seed), Keep::Nothing, next(count));
    let calm = Stage::new(&config, image.clone(), seed, log.clone(), &explorer.rares);
    calm.run(Keep::Nothing, calm.suffer(&life, Response::Nothing));
    life.troubles = match kind {
        Kind::Op(op, sticky, effect, _) => {
            let after = rng.below(calm.sim.asked(*op).max(1));
            vec![Trouble::Fault(Fault { op: *op, after, sticky: *sticky, effect: effect(rng) })]
        }
        Kind::Slow => slow(rng),
        Kind::Rot => vec![Trouble::Rot { seed: rng.bits(), bits: 1 + rot_bits(rng) }],
        Kind::Hung(_) => unreachable!("played elsewhere"),
    };
    let keep = Keep::OneIn(1 + calm.sim.io_count() / MOMENTS, rng.bits());
    let watched = explorer.watch(image, &log, &life, keep);
    // Unless everybody waits for what never ends.
    assert!(watched.ended || watched.sim.is_stuck(), "the life has an end");
    let suffered = watched.suffered.unwrap_or_default();
    for seen in &watched.seen {
        if life.response() == Some(Response::Noticed) {
            let at = Some(seen.moment.events());
            let [subset, torn, killed] = [rng.bits(), rng.bits(), rng.bits()];
            for plan in
                [CutPlan::KeepNone, CutPlan::KeepAll, CutPlan::Subset(subset), CutPlan::Torn(torn)]
            {
                explorer.judge(seen, &life, End::Power { at, plan }, &suffered);
            }
            let end = End::Kill { at, seed: killed, memory: true };
            explorer.judge(seen, &life, end, &suffered);
        } else {
            explorer.cut(seen, &life);
            explorer.kill(seen, &life, true);
        }
    }
    watched.sim.faults_struck() > 0 || matches!(kind, Kind::Rot)
}

fn rot_bits(rng: &mut Rng) -> u32 {
    if rng.chance(10) { 0 } else { u32::from(rng.bits().to_le_bytes()[0] % 32) }
}

/// Some operations of every sort take long, up to seconds.
fn slow(rng: &mut Rng) -> Vec<Trouble> {
    let one = |rng: &mut Rng| {
        let op = [FaultOp::Read, FaultOp::Write, FaultOp::Sync, FaultOp::Discard]
            [to_usize(rng.below(4))];
        let time = Duration::from_micros(1 << rng.below(22));
        let fault = Fault { op, after: rng.below(40), sticky: false, effect: Effect::Slow(time) };
        Trouble::Fault(fault)
    };
    (0..4 + rng.below(30)).map(|_| one(rng)).collect()
}
