//! Full pools: growth is refused, for that request alone; everything else goes on, and everything
//! that is deleted comes back.

#[path = "full_pool/copies_gone.rs"]
mod copies_gone;
#[path = "full_pool/promises.rs"]
mod promises;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use futures_util::future::join_all;
use pando_engine::disk::sim::{Rng, SimDisk, SimOptions};
use pando_engine::error::ErrorKind;
use pando_engine::map::Fanout;
use pando_engine::pool::{CreateVolume, FormatOptions, IoLimits, ModifyVolume, Pool, Source};
use pando_engine::units::{VolumeId, to_u64, to_usize};
use pando_sim::model::{BLOCK_SECTORS, Birth};
use pando_sim::run::{Blocks, Life, SharedLog, check_sound, drain, observe, settle, stamped, step};
use pando_sim::{Config, Log, Model, Op, Told};

const JOURNAL: u64 = 8;

/// The reserve for overwrites is a 64th of the pool and some blocks. A map of scattered single
/// blocks must fit into that, so only the smallest pools can have small nodes.
fn config(pool_blocks: u64) -> Config {
    let small = Fanout { leaf_max: 8, inner_max: 8 };
    Config {
        pool_blocks,
        journal_blocks: JOURNAL,
        fanout: if pool_blocks < 200 { small } else { Fanout::FULL },
        cache_bytes: 0,
        discard: pool_blocks.is_multiple_of(3),
        ..Config::default()
    }
}

/// Blocks of the smallest pool.
fn smallest() -> u64 {
    let fits = |blocks: &u64| {
        let sim = SimDisk::new(0, *blocks, SimOptions::default());
        let options = FormatOptions {
            size_bytes: blocks * 4096,
            journal_bytes: Some(JOURNAL * 4096),
            force: false,
            uuid: [1; 16],
        };
        sim.run(async { Pool::format(&sim.disk(), &options).await.is_ok() }) == Some(true)
    };
    (8..500).find(fits).expect("a pool of 500 blocks can be made")
}

fn birth(name: &str, source: Option<&str>, blocks: u64) -> Op {
    let size_bytes = source.is_none().then_some(blocks * 4096);
    let source = source.map(Into::into);
    Op::Create(vec![Birth { name: name.into(), size_bytes, source, snapshot: false }])
}

fn write(volume: &str, block: u64, blocks: u64) -> Op {
    let (first, count) = (block * BLOCK_SECTORS, blocks * BLOCK_SECTORS);
    Op::Write { volume: volume.into(), first, count, fua: false }
}

/// One pool under test, with its model.
struct World<'a> {
    sim: &'a SimDisk,
    config: &'a Config,
    log: SharedLog,
    pool: Pool,
}

impl<'a> World<'a> {
    async fn new(sim: &'a SimDisk, config: &'a Config) -> Self {
        let log: SharedLog = Rc::new(RefCell::new(Log::new(Model::default())));
        let pool = Life { sim, config, log: &log }.begin().await.expect("a new pool opens");
        Self { sim, config, log, pool }
    }

    /// Does `op`; false when it was refused for lack of space.
    async fn does(&self, op: &Op) -> bool {
        let before = self.log.borrow().refused;
        step(&self.pool, &self.log, op).await.unwrap_or_else(|e| panic!("{e}"));
        self.log.borrow().refused == before
    }

    /// Does `op`, or is refused.
    async fn may(&self, op: Op) {
        self.does(&op).await;
    }

    /// Does `op`, which must not be refused however full the pool is.
    async fn must(&self, op: Op) {
        assert!(self.does(&op).await, "{op:?} was refused: {:?}", self.pool.status());
    }

    /// Writes block after block until one is refused. Returns how many were written.
    async fn fill(&self, volume: &str, blocks: u64) -> u64 {
        for block in 0..blocks {
            if !self.does(&write(volume, block, 1)).await {
                return block;
            }
        }
        blocks
    }

    /// The next operations find nothing in the cache.
    async fn reopen(&mut self) {
        self.pool.close().await.expect("a full pool can be closed");
        self.pool = self.config.open(self.sim).await.expect("a full pool can be opened");
    }

    async fn check(&self) {
        let seen = observe(&self.pool).await.unwrap_or_else(|e| panic!("{e}"));
        assert!(seen == *self.log.borrow().last(), "{}", seen.difference(self.log.borrow().last()));
        check_sound(&self.pool).await;
    }
}

/// What must go on in a full pool whose volume `a` has `filled` blocks of its own.
async fn goes_on_when_full(world: &mut World<'_>, filled: u64) {
    for block in 0..filled {
        world.must(write("a", block, 1)).await;
    }
    world.must(Op::Flush).await;
    if filled > 0 {
        let part = Op::Write { volume: "a".into(), first: 3, count: 2, fua: true };
        world.must(part).await;
    }
    world.check().await;
    world.reopen().await;
    for block in (0..filled).rev() {
        world.must(write("a", block, 1)).await;
    }
    let half = filled / 2 * BLOCK_SECTORS;
    world.must(Op::Discard { volume: "a".into(), first: 0, count: half }).await;
    settle(&world.pool).await.expect("a full pool makes checkpoints");
    // What was discarded can be written again, but for what nodes have taken meanwhile.
    let again = world.fill("a", filled / 2).await;
    assert!(again + 32 >= filled / 2, "{again} of {filled} blocks, {:?}", Blocks::of(&world.pool));
}

#[test]
fn a_full_pool_of_every_size_goes_on() {
    let least = smallest();
    let mut filled = Vec::new();
    for blocks in (least..=least + 64).chain([300, 700, 1500]) {
        let _told = Told(|| format!("a pool of {blocks} blocks, the smallest has {least}"));
        let config = config(blocks);
        let sim = SimDisk::from_image(config.formatted(), blocks, SimOptions::default());
        sim.run(async {
            let mut world = World::new(&sim, &config).await;
            world.must(birth("a", None, blocks)).await;
            let written = world.fill("a", blocks).await;
            filled.push(written);
            goes_on_when_full(&mut world, written).await;
            world.must(Op::Delete("a".into())).await;
            drain(&world.pool).await.unwrap();
            world.check().await;
            // All of it can be had again.
            world.must(birth("a", None, blocks)).await;
            let aside = Blocks::of(&world.pool).aside;
            let again = world.fill("a", blocks).await;
            assert!(again + aside >= written, "{again} blocks after {written}, {aside} aside");
        })
        .unwrap();
    }
    println!("blocks written before a pool was full: {filled:?}");
    assert!(filled[64] > 16 && filled[67] > 1200, "{filled:?}");
}

/// Random orders of filling, cloning, overwriting, discarding and deleting.
fn random_order(blocks: u64, seed: u64) -> u64 {
    let _told = Told(|| format!("a pool of {blocks} blocks, seed {seed}"));
    let config = config(blocks);
    let mut rng = Rng::new(seed);
    let sim = SimDisk::from_image(config.formatted(), seed, SimOptions::default());
    let log = sim.run(async {
        let mut world = World::new(&sim, &config).await;
        let mut born = 0;
        for _ in 0..80 {
            let names: Vec<String> = world.log.borrow().last().volumes.keys().cloned().collect();
            let pick = rng.below(to_u64(names.len()).max(1));
            let name = names.get(to_usize(pick)).cloned().unwrap_or_default();
            let size = world.log.borrow().last().volumes.get(&name).map_or(0, |v| v.size_bytes);
            let size = size / 4096;
            match rng.below(12) {
                _ if names.is_empty() => world.may(birth("v0", None, blocks)).await,
                0..3 => {
                    world.fill(&name, size).await;
                }
                3 | 4 if names.len() < 5 => {
                    born += 1;
                    world.may(birth(&format!("v{born}"), Some(&name), 0)).await;
                }
                5 | 6 => {
                    let at = rng.below(size);
                    let count = (1 + rng.below(12)).min(size - at);
                    world.may(write(&name, at, count)).await;
                }
                7 => {
                    let at = rng.below(size) * BLOCK_SECTORS;
                    let count = (rng.below(size) * BLOCK_SECTORS).min(size * BLOCK_SECTORS - at);
                    world.must(Op::Discard { volume: name, first: at, count }).await;
                }
                8 => world.must(Op::Delete(name)).await,
                9 => world.must(Op::Flush).await,
                10 => world.reopen().await,
                _ => world.must(Op::Checkpoint).await,
            }
        }
        world.check().await;
        drain(&world.pool).await.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(world.pool.status().poisoned, None);
        assert_eq!(Blocks::of(&world.pool).used(), 0);
        world.log
    });
    log.expect("the power stays on").borrow().refused
}

#[test]
fn everything_comes_back_whatever_the_order() {
    let least = smallest();
    let mut refused = 0;
    for blocks in (least..=least + 64).step_by(2).chain([200, 400]) {
        for seed in 0..3 {
            refused += random_order(blocks, seed * 1000 + blocks);
        }
    }
    println!("{refused} requests were refused");
    assert!(refused > 500);
}

fn promised(name: &str, reservation: u64, growth_limit: u64) -> CreateVolume {
    CreateVolume {
        name: name.into(),
        size_bytes: Some(4096 * 4096),
        source: Source::Empty,
        snapshot: false,
        read_only: false,
        reservation_bytes: reservation * 4096,
        growth_limit_bytes: growth_limit * 4096,
        io_limits: IoLimits::default(),
        labels: BTreeMap::new(),
        created_at: 0,
    }
}

/// Writes block after block; returns how many were written before one was refused.
async fn fill(pool: &Pool, id: VolumeId, blocks: u64) -> u64 {
    let device = pool.device(id).unwrap_or_else(|e| panic!("{e}"));
    for block in 0..blocks {
        let (buf, len) = stamped(block * BLOCK_SECTORS, BLOCK_SECTORS, 7);
        if let Err(error) = device.write(block * 4096, len, buf, false).await {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
            return block;
        }
    }
    blocks
}

async fn write_at(pool: &Pool, id: VolumeId, from: u64, blocks: u64) -> bool {
    let device = pool.device(id).unwrap_or_else(|e| panic!("{e}"));
    let (buf, len) = stamped(from * BLOCK_SECTORS, blocks * BLOCK_SECTORS, from + 1);
    match device.write(from * 4096, len, buf, false).await {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
            false
        }
    }
}

fn taken_of(name: &str, source: VolumeId, snapshot: bool) -> CreateVolume {
    let source = Source::Volume(source);
    CreateVolume { size_bytes: None, source, snapshot, ..promised(name, 0, 0) }
}

/// Many writers at once, as a device has them: while a checkpoint is under way, all of them wait.
#[test]
fn overwrites_find_the_space_that_a_checkpoint_is_about_to_free() {
    let config = config(1500);
    for seed in 0..20 {
        let sim = SimDisk::from_image(config.formatted(), seed, SimOptions::default());
        sim.run(async {
            let pool = config.open(&sim).await.unwrap();
            let db = pool.create(promised("db", 0, 0)).await.unwrap().id;
            let writer = |number: u64| {
                let pool = &pool;
                async move {
                    for round in 0..60 {
                        let from = (number * 8 + round * 24) % 128;
                        assert!(write_at(pool, db, from, 8).await, "seed {seed}, round {round}");
                    }
                }
            };
            join_all((0..16).map(writer)).await;
        })
        .unwrap();
    }
}

#[test]
fn a_growth_limit_counts_what_snapshots_keep_while_they_live() {
    let config = Config { fanout: Fanout { leaf_max: 4, inner_max: 4 }, ..config(2000) };
    let sim = SimDisk::from_image(config.formatted(), 5, SimOptions::default());
    sim.run(async {
        let mut pool = config.open(&sim).await.unwrap();
        let db = pool.create(promised("db", 0, 40)).await.unwrap().id;
        assert!(write_at(&pool, db, 0, 20).await);
        let first = pool.create(taken_of("first", db, true)).await.unwrap().id;
        let clone = pool.create(taken_of("clone", db, false)).await.unwrap().id;
        assert!(write_at(&pool, db, 0, 20).await, "20 blocks are frozen, 20 are its own");
        let last = pool.create(taken_of("last", db, true)).await.unwrap().id;
        assert!(!write_at(&pool, db, 0, 1).await, "40 blocks are frozen");
        // The clone still keeps what the first snapshot kept.
        pool.delete(first).await.unwrap();
        assert!(!write_at(&pool, db, 0, 1).await);
        pool.delete(clone).await.unwrap();
        // Only the last snapshot is left: 20 blocks. The counts survive a restart.
        pool.close().await.unwrap();
        pool = config.open(&sim).await.unwrap();
        assert!(write_at(&pool, db, 0, 20).await);
        assert!(!write_at(&pool, db, 20, 1).await);
        // Without it, its blocks are gone: they were all overwritten.
        pool.delete(last).await.unwrap();
        assert!(write_at(&pool, db, 20, 20).await);
        assert!(!write_at(&pool, db, 40, 1).await);
        // What was frozen and not overwritten counts on, and not twice when it is.
        let again = pool.create(taken_of("again", db, true)).await.unwrap().id;
        assert!(!write_at(&pool, db, 0, 1).await);
        pool.delete(again).await.unwrap();
        assert!(!write_at(&pool, db, 40, 1).await);
        pool.device(db).unwrap().discard(0, 20 * 4096, false).await.unwrap();
        assert!(write_at(&pool, db, 20, 10).await, "what was discarded is given back");
        assert!(write_at(&pool, db, 40, 20).await, "a block for a block");
        assert!(!write_at(&pool, db, 60, 1).await);
        drain(&pool).await.unwrap();
    })
    .unwrap();
}

#[test]
fn a_growth_limit_bears_a_schedule_of_snapshots() {
    let config = config(4000);
    let sim = SimDisk::from_image(config.formatted(), 6, SimOptions::default());
    sim.run(async {
        let pool = config.open(&sim).await.unwrap();
        // 60 blocks, and three snapshots that each keep the 10 blocks of one day.
        let db = pool.create(promised("db", 0, 60 + 3 * 10 + 10)).await.unwrap().id;
        assert!(write_at(&pool, db, 0, 60).await);
        let mut kept = std::collections::VecDeque::new();
        for day in 0..100 {
            let name = format!("day-{day}");
            kept.push_back(pool.create(taken_of(&name, db, true)).await.unwrap().id);
            if kept.len() > 3 {
                pool.delete(kept.pop_front().unwrap()).await.unwrap();
            }
            assert!(write_at(&pool, db, day * 10 % 60, 10).await, "day {day}");
        }
        drain(&pool).await.unwrap();
    })
    .unwrap();
}

/// Overwrites a full pool of one long extent block by block, in the order of `place`: of the how
/// many-th, and of how many.
fn overwritten_in_pieces(place: impl Fn(u64, u64) -> u64) {
    let config = config(12_000);
    let sim = SimDisk::from_image(config.formatted(), 9, SimOptions::default());
    sim.run(async {
        let pool = config.open(&sim).await.expect("a sound disk");
        let size = CreateVolume { size_bytes: Some(12_000 * 4096), ..promised("db", 0, 0) };
        let db = pool.create(size).await.expect("there is room").id;
        let mut blocks = 0;
        while write_at(&pool, db, blocks, 64).await {
            blocks += 64;
        }
        for at in 0..blocks {
            assert!(write_at(&pool, db, place(at, blocks), 1).await, "{at} of {blocks}");
        }
    })
    .expect("the power stays on");
}

/// A pool that is full of long extents can be overwritten block by block: their maps fit.
#[test]
fn the_reserve_holds_a_map_of_single_blocks() {
    overwritten_in_pieces(|at, blocks| at * 5413 % blocks);
    // Backwards, behind a node that is full.
    overwritten_in_pieces(|at, blocks| if at < 400 { 2 * at } else { blocks + 399 - at });
    // The same share of a pool that is too large for this.
    let large = config(12 << 20);
    let sim = SimDisk::from_image(large.formatted(), 9, SimOptions::default());
    sim.run(async {
        let status = large.open(&sim).await.unwrap().status();
        assert!(status.reserve_bytes >= status.usable_bytes / 64, "{status:?}");
    })
    .unwrap();
}
