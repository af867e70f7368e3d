//! Several writers at once, also to parts of the same blocks, while snapshots are taken; and the
//! power fails. Who waits for nobody has no order, so the oracle is that of time: what was
//! acknowledged before something else was asked for comes before it. Of two such writes the
//! second is never found without the first, in the whole pool and in every snapshot.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use futures_util::future::{join, join_all};
use pando_engine::disk::sim::{Rng, SimDisk, SimOptions};
use pando_engine::error::ErrorKind;
use pando_engine::pool::Pool;
use pando_engine::runtime::executor::end_of_turn;
use pando_engine::units::to_usize;
use pando_sim::crash::plans;
use pando_sim::model::{BLOCK_SECTORS, Birth, ModelVolume};
use pando_sim::run::{check_sound, drain, observe, perform};
use pando_sim::{Config, Model, Op, Told};

/// Writers; each has two sectors of every block of the first half of a volume, and a quarter of
/// the blocks of the second.
const WRITERS: u64 = 4;
const OPS: u64 = 18;
/// Blocks of a volume.
const BLOCKS: u64 = 16;

/// One write to a sector.
struct Version {
    stamp: u64,
    asked_at: u64,
    acknowledged_at: Option<u64>,
}

/// A snapshot, in time.
struct Taken {
    source: String,
    asked_at: u64,
    acknowledged_at: Option<u64>,
}

/// What was done when.
#[derive(Default)]
struct History {
    now: u64,
    stamps: u64,
    /// By volume and sector, in their order: a sector has one writer.
    versions: BTreeMap<(String, u64), Vec<Version>>,
    snapshots: BTreeMap<String, Taken>,
    /// What was acknowledged before this moment is durable.
    durable_before: u64,
}

impl History {
    fn moment(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    fn ask(&mut self, volume: &str, first: u64, count: u64) -> u64 {
        let asked_at = self.moment();
        self.stamps += 1;
        let stamp = self.stamps;
        for sector in first..first + count {
            let versions = self.versions.entry((volume.into(), sector)).or_default();
            versions.push(Version { stamp, asked_at, acknowledged_at: None });
        }
        stamp
    }

    fn acknowledge(&mut self, volume: &str, first: u64, count: u64) {
        let moment = self.moment();
        for sector in first..first + count {
            let versions = self.versions.get_mut(&(volume.into(), sector)).expect("asked for");
            versions.last_mut().expect("asked for").acknowledged_at = Some(moment);
        }
    }

    /// Checks a volume, or a snapshot of it: no sector lacks what was acknowledged before `least`,
    /// none holds what was asked for after `most`. Returns when the latest write seen was asked
    /// for.
    fn check(&self, of: &str, seen: &ModelVolume, least: u64, most: u64) -> u64 {
        let mut latest = 0;
        for ((_, sector), versions) in self.versions.iter().filter(|((name, _), _)| name == of) {
            let number = Self::number(versions, seen, *sector);
            if number > 0 {
                let asked_at = versions[number - 1].asked_at;
                assert!(asked_at <= most, "{of}: sector {sector} is from the future");
                latest = latest.max(asked_at);
            }
        }
        self.check_not_older(of, seen, latest.max(least));
        latest
    }

    /// No sector lacks what was acknowledged before `moment`.
    fn check_not_older(&self, of: &str, seen: &ModelVolume, moment: u64) {
        for ((_, sector), versions) in self.versions.iter().filter(|((name, _), _)| name == of) {
            let number = Self::number(versions, seen, *sector);
            let before = |v: &&Version| v.acknowledged_at.is_some_and(|at| at < moment);
            let must = versions.iter().take_while(before).count();
            assert!(number >= must, "{of}: sector {sector} has version {number}, not {must}");
        }
    }

    /// Which version of a sector is seen; 0 is none yet.
    fn number(versions: &[Version], seen: &ModelVolume, sector: u64) -> usize {
        let stamps = seen.blocks.get(&(sector / BLOCK_SECTORS));
        let stamp = stamps.map_or(0, |stamps| stamps[to_usize(sector % BLOCK_SECTORS)]);
        let found = versions.iter().position(|version| version.stamp == stamp);
        found.map_or_else(
            || {
                assert_eq!(stamp, 0, "sector {sector} was never written so");
                0
            },
            |at| at + 1,
        )
    }

    /// Checks the whole pool, which holds at least what was acknowledged before `least`.
    fn check_pool(&self, seen: &Model, least: u64) {
        let mut latest = least;
        for name in ["a", "b"] {
            let Some(volume) = seen.volumes.get(name) else {
                assert!(least <= 1, "volume {name} is lost");
                continue;
            };
            latest = latest.max(self.check(name, volume, least, u64::MAX));
        }
        for (name, taken) in &self.snapshots {
            let Some(volume) = seen.volumes.get(name) else {
                assert!(taken.acknowledged_at.is_none(), "snapshot {name} is lost");
                continue;
            };
            let most = taken.acknowledged_at.unwrap_or(u64::MAX);
            self.check(&taken.source, volume, taken.asked_at, most);
            latest = latest.max(taken.asked_at);
        }
        for name in ["a", "b"] {
            if let Some(volume) = seen.volumes.get(name) {
                self.check_not_older(name, volume, latest);
            }
        }
    }
}

type Shared = Rc<RefCell<History>>;

fn birth(name: &str, source: Option<&str>) -> Op {
    let size_bytes = source.is_none().then_some(BLOCKS * 4096);
    let (source, snapshot) = (source.map(Into::into), source.is_some());
    Op::Create(vec![Birth { name: name.into(), size_bytes, source, snapshot }])
}

/// One writer: a write, then the next.
async fn writer(pool: &Pool, history: &Shared, number: u64, mut rng: Rng) {
    for _ in 0..OPS {
        let volume = if rng.chance(10) { "a" } else { "b" };
        let half = BLOCKS / 2;
        let (first, count) = if rng.chance(9) {
            (rng.below(half) * BLOCK_SECTORS + 2 * number, 1 + rng.below(2))
        } else {
            let blocks = half / WRITERS;
            ((half + number * blocks) * BLOCK_SECTORS, blocks * BLOCK_SECTORS)
        };
        let stamp = history.borrow_mut().ask(volume, first, count);
        let fua = rng.chance(2);
        let op = Op::Write { volume: volume.into(), first, count, fua };
        perform(pool, &op, stamp).await.expect("a write");
        history.borrow_mut().acknowledge(volume, first, count);
        if rng.chance(3) {
            let asked_at = history.borrow_mut().moment();
            pool.flush().await.expect("a flush");
            let mut history = history.borrow_mut();
            history.durable_before = history.durable_before.max(asked_at);
        }
    }
}

/// Takes snapshots of one volume after the other meanwhile.
async fn photographer(pool: &Pool, history: &Shared) {
    for number in 0..5 {
        let source = ["a", "b"][number % 2];
        let name = format!("s{number}");
        let asked_at = history.borrow_mut().moment();
        let taken = Taken { source: source.into(), asked_at, acknowledged_at: None };
        history.borrow_mut().snapshots.insert(name.clone(), taken);
        perform(pool, &birth(&name, Some(source)), 0).await.expect("a snapshot");
        {
            let mut history = history.borrow_mut();
            let moment = history.moment();
            history.durable_before = history.durable_before.max(asked_at);
            let taken = history.snapshots.get_mut(&name).expect("just inserted");
            taken.acknowledged_at = Some(moment);
        }
        pool.checkpoint().await.expect("a checkpoint");
    }
}

fn config() -> Config {
    Config { pool_blocks: 500, journal_blocks: 8, ..Config::default() }
}

/// Runs everybody, to the end or until the power fails. Also returns the events of a whole run.
fn run(seed: u64, cut: Option<u64>) -> (SimDisk, Shared, u64) {
    let config = config();
    let sim = SimDisk::from_image(config.formatted(), seed, SimOptions::default());
    if let Some(cut) = cut {
        sim.set_cut_at(cut);
    }
    let history: Shared = Rc::default();
    let ended = sim.run(async {
        let pool = config.open(&sim).await.expect("the pool opens");
        for name in ["a", "b"] {
            perform(&pool, &birth(name, None), 0).await.expect("a volume");
        }
        // From here on both volumes must be there.
        history.borrow_mut().now = 1;
        history.borrow_mut().durable_before = 2;
        let writers = (0..WRITERS).map(|n| writer(&pool, &history, n, Rng::new(seed * 9 + n)));
        join(join_all(writers), photographer(&pool, &history)).await;
        let seen = observe(&pool).await.expect("the pool can be read");
        history.borrow().check_pool(&seen, u64::MAX);
        check_sound(&pool).await;
        let events = sim.io_count();
        drain(&pool).await.expect("all is deleted");
        events
    });
    assert_eq!(ended.is_none(), cut.is_some());
    (sim, history, ended.unwrap_or_default())
}

fn open_and_check(image: pando_engine::disk::sim::SimImage, history: &History, least: u64) {
    let sim = SimDisk::from_image(image, 1, SimOptions::default());
    sim.run(async {
        let pool = config().open(&sim).await.unwrap_or_else(|e| panic!("{e}"));
        check_sound(&pool).await;
        let seen = observe(&pool).await.unwrap_or_else(|e| panic!("{e}"));
        history.check_pool(&seen, least);
    });
}

#[test]
fn writers_and_snapshots_race_and_the_power_fails() {
    let mut states = 0;
    for seed in 0..6 {
        let (_, _, events) = run(seed, None);
        let mut rng = Rng::new(seed);
        for cut in (rng.below(8)..events).step_by(8) {
            let _told = Told(|| format!("seed {seed}, cut at event {cut} of {events}"));
            let (sim, history, _) = run(seed, Some(cut));
            for plan in plans(&sim, &mut rng, 6) {
                let _told = Told(|| format!("{plan:?}"));
                let least = history.borrow().durable_before;
                open_and_check(sim.image_after_cut(plan), &history.borrow(), least);
                states += 1;
            }
            let killed = sim.image_after_kill(cut);
            let least = if history.borrow().durable_before > 0 { u64::MAX } else { 0 };
            open_and_check(killed, &history.borrow(), least);
        }
    }
    println!("{states} crash states of concurrent writers");
    assert!(states > 500);
}

/// A volume is deleted under its writers' hands: that is nobody else's business.
#[test]
fn a_deleted_volume_fails_its_own_writes_only() {
    for seed in 0..60 {
        let _told = Told(|| format!("seed {seed}"));
        let config = config();
        let sim = SimDisk::from_image(config.formatted(), seed, SimOptions::default());
        sim.run(async {
            let pool = config.open(&sim).await.unwrap();
            for name in ["a", "b"] {
                perform(&pool, &birth(name, None), 0).await.unwrap();
            }
            let write = |volume: &str, block: u64| {
                let first = block * BLOCK_SECTORS;
                Op::Write { volume: volume.into(), first, count: BLOCK_SECTORS, fua: false }
            };
            let ops: Vec<Op> = (0..8).map(|n| write(["a", "b"][to_usize(n % 2)], n)).collect();
            let writes = join_all(ops.iter().map(|op| perform(&pool, op, 7)));
            let delete = Op::Delete("b".into());
            // Before the writes have blocks, or while their data is on its way.
            let later = async {
                for _ in 0..seed % 6 {
                    end_of_turn().await;
                }
                perform(&pool, &delete, 0).await
            };
            let (results, deleted) = join(writes, later).await;
            deleted.unwrap();
            for (op, result) in ops.iter().zip(results) {
                let Op::Write { volume, .. } = op else { unreachable!() };
                match result {
                    Ok(()) => {}
                    Err(error) => {
                        assert_eq!((volume.as_str(), error.kind()), ("b", ErrorKind::NotFound));
                    }
                }
            }
            check_sound(&pool).await;
            drain(&pool).await.unwrap();
        })
        .unwrap();
    }
}
