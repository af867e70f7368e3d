//! Random operations on pools so tiny that they split, lap, fill up and free all the time, in chains
//! of lives: in each some moments are cut and killed, their recoveries too, and one of the crashes
//! becomes the past of the next life.

use super::tally::{Failure, caught};
use crate::case::{CaseLife, End, live};
use crate::crash::{Explorer, Reach, plans_at};
use crate::gen_ops::{Bounds, Generator, Op};
use crate::model::{BLOCK_SECTORS, Model};
use crate::run::{Config, Log};
use crate::stage::{Act, Keep, Seen};
use pando_engine::disk::sim::{Grain, Rng};
use pando_engine::map::Fanout;
use pando_engine::units::{to_u64, to_usize};

const LIVES: u64 = 5;
/// Moments of a life that are looked at, about.
const MOMENTS: u64 = 10;
/// Events of an act, about.
const EVENTS: u64 = 8;
const REACH: Reach =
    Reach { plans: [6, 3, 3], nested_one_in: [12, 8], nested_cuts: 4, go_on_one_in: 10 };

/// What sort of pool a seed has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sort {
    /// Close to the smallest that can be made.
    Smallest,
    Small,
    /// With one large map of single blocks, whose deletion takes several checkpoints.
    Scattered,
}

const fn sort(rng: &mut Rng) -> Sort {
    match rng.below(8) {
        0 => Sort::Scattered,
        1..4 => Sort::Small,
        _ => Sort::Smallest,
    }
}

/// A pool of at most some 350 blocks.
const fn config(rng: &mut Rng, sort: Sort) -> Config {
    let journal_blocks = 8 + rng.below(3) * rng.below(6);
    let more = match sort {
        Sort::Smallest => rng.below(40),
        Sort::Small => rng.below(256),
        Sort::Scattered => 256,
    };
    Config {
        pool_blocks: 74 + journal_blocks + more,
        journal_blocks,
        fanout: Fanout {
            leaf_max: to_usize(4 + rng.below(3)),
            inner_max: to_usize(4 + rng.below(2)),
        },
        cache_bytes: if rng.chance(8) { 0 } else { 1 << 20 },
        discard: !rng.chance(5),
        cascade_nodes: to_usize(2 + rng.below(6)),
    }
}

/// Bounds of what is done to a pool.
fn bounds(rng: &mut Rng, config: &Config, sort: Sort) -> Bounds {
    if sort == Sort::Scattered {
        return Bounds { volumes: 2, volume_blocks: 100, write_blocks: 1 };
    }
    Bounds {
        volumes: to_usize(2 + rng.below(4)),
        volume_blocks: 8 + rng.below(config.pool_blocks / 5),
        write_blocks: 2 + rng.below(14),
    }
}

/// Two writes at once to different parts of one block.
fn race(rng: &mut Rng, model: &Model) -> Option<Act> {
    let mut fit = model.volumes.iter().filter(|(_, v)| !v.snapshot && v.sectors() >= BLOCK_SECTORS);
    let count = to_u64(fit.clone().count());
    let (volume, found) = fit.nth(to_usize(rng.below(count.max(1))))?;
    let block = rng.below(found.sectors() / BLOCK_SECTORS).min(rng.below(8)) * BLOCK_SECTORS;
    let border = 1 + rng.below(BLOCK_SECTORS - 2);
    let write = |first, count| Op::Write { volume: volume.clone(), first, count, fua: false };
    let (one, other) = (write(block, border), write(block + border, BLOCK_SECTORS - 1 - border));
    Some(Act::Race(one, other))
}

/// Random acts from a seed.
struct Acts {
    rng: Rng,
    generator: Generator,
    /// How often two things happen at once, in 16 cases.
    races: u64,
}

impl Acts {
    fn new(rng: &mut Rng, config: &Config, sort: Sort) -> Self {
        let bounds = bounds(rng, config, sort);
        let races = rng.below(3);
        Self { rng: Rng::new(rng.bits()), generator: Generator::new(rng.bits(), bounds), races }
    }

    fn next(&mut self, model: &Model) -> Act {
        let together = self.rng.chance(self.races).then(|| race(&mut self.rng, model)).flatten();
        together.unwrap_or_else(|| Act::One(self.generator.next_op(model)))
    }
}

/// Explores seeds.
pub struct Random {
    /// What does the work, and counts.
    pub explorer: Explorer,
    /// Seeds explored.
    pub seeds: u64,
}

impl Default for Random {
    fn default() -> Self {
        Self { explorer: Explorer::new(Config::default(), REACH, 0), seeds: 0 }
    }
}

impl Random {
    /// Explores one seed.
    ///
    /// # Errors
    /// What was found wrong.
    pub fn explore(&mut self, seed: u64) -> Result<(), Failure> {
        self.seeds += 1;
        let explorer = &mut self.explorer;
        let mut rng = Rng::new(seed ^ 0x7A4D);
        let sort = sort(&mut rng);
        explorer.begin(config(&mut rng, sort), seed);
        let done = caught(|| chain(explorer, &mut rng, sort));
        done.map_err(|why| {
            let repeat = format!("pando-sim random --seed {seed}");
            Failure { repeat, why, case: Box::new(explorer.case()) }
        })
    }
}

/// One life behind the other.
fn chain(explorer: &mut Explorer, rng: &mut Rng, sort: Sort) {
    let config = explorer.config;
    let mut acts = Acts::new(rng, &config, sort);
    let (mut image, mut log) = (config.formatted(), Log::new(Model::default()));
    for _ in 0..LIVES {
        let life = CaseLife::new(rng.bits());
        let long = if sort == Sort::Scattered { 160 } else { 60 };
        let count = if rng.chance(4) { rng.below(8) } else { rng.below(long) };
        let keep = Keep::OneIn(1 + count * EVENTS / MOMENTS, rng.bits());
        let next = |life: &CaseLife, model: &Model| {
            (to_u64(life.acts.len()) < count).then(|| acts.next(model))
        };
        let (life, seen) = explorer.watch_acts(image, &log, life, keep, next);
        for seen in &seen {
            explorer.cut(seen, &life);
            explorer.kill(seen, &life, true);
            if rng.chance(4) {
                explorer.kill(seen, &life, false);
            }
        }
        let last = &seen[to_usize(rng.below(to_u64(seen.len())))];
        let life = last.life(&life, end(last, rng));
        (image, log) = last.leave(life.end);
        explorer.trail.push(life);
    }
    let life = CaseLife { end: End::Drain, ..CaseLife::new(rng.bits()) };
    explorer.trail.push(life.clone());
    live(&config, image, log, &life, &explorer.rares);
}

/// One of the ends of a life at a moment.
fn end(seen: &Seen, rng: &mut Rng) -> End {
    let at = Some(seen.moment.events());
    if rng.chance(5) || seen.moment.pending(Grain::Block) == 0 {
        return End::Kill { at, seed: rng.bits(), memory: rng.chance(13) };
    }
    let plans = plans_at(&seen.moment, rng, 8);
    End::Power { at, plan: plans[to_usize(rng.below(to_u64(plans.len())))] }
}
