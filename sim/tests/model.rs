//! Random operations on tiny pools, compared with the reference model, over several lives of the
//! process: closed cleanly, or killed.

use std::cell::RefCell;
use std::rc::Rc;

use pando_engine::disk::sim::{Rng, SimDisk, SimOptions};
use pando_engine::runtime::Buf;
use pando_engine::units::BlockNo;
use pando_sim::gen_ops::Bounds;
use pando_sim::model::Birth;
use pando_sim::run::{Life, SharedLog, drain};
use pando_sim::{Config, Generator, Log, Model, Op, Told};

/// Several lives of a pool; returns the sum of the traces of their disks.
fn lives(seed: u64, ops: u32) -> u64 {
    let config = Config::random(seed);
    let _told = Told(|| format!("seed {seed}: {config:?}"));
    let bounds = if seed.is_multiple_of(4) {
        Bounds { volumes: 3, volume_blocks: 320, write_blocks: 300 }
    } else {
        Bounds::default()
    };
    let mut generator = Generator::new(seed, bounds);
    let mut rng = Rng::new(seed);
    let mut image = config.formatted();
    let log: SharedLog = Rc::new(RefCell::new(Log::new(Model::default())));
    let mut trace = 0u64;
    for life in 0..4 {
        let sim = SimDisk::from_image(image, rng.bits(), SimOptions::default());
        let mut left = rng.below(u64::from(ops)) + 1;
        sim.run(async {
            let here = Life { sim: &sim, config: &config, log: &log };
            let pool = here.drive(|model| {
                left = left.checked_sub(1)?;
                Some(generator.next_op(model))
            });
            let pool = pool.await.unwrap_or_else(|e| panic!("life {life}: {e}"));
            if life == 3 {
                drain(&pool).await.unwrap_or_else(|e| panic!("life {life}: {e}"));
            }
        })
        .expect("no power failure was asked for");
        image = sim.image_after_kill(rng.bits());
        trace = trace.wrapping_mul(3).wrapping_add(sim.trace());
    }
    trace
}

#[test]
fn pools_hold_what_the_model_holds() {
    for seed in 0..150 {
        lives(seed, 150);
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in [3, 4, 5] {
        assert_eq!(lives(seed, 60), lives(seed, 60));
    }
}

/// Such a write takes several records, and its first block is merged with what was there: the
/// second record must not take the first for somebody else's.
#[test]
fn a_write_of_many_records_that_begins_inside_a_block_ends() {
    let config = Config { pool_blocks: 1500, ..Config::default() };
    let sim = SimDisk::from_image(config.formatted(), 1, SimOptions::default());
    let log: SharedLog = Rc::new(RefCell::new(Log::new(Model::default())));
    let (name, first) = (String::from("v"), 1);
    let birth = Birth { name, size_bytes: Some(600 * 4096), source: None, snapshot: false };
    let write = |count| Op::Write { volume: "v".into(), first, count, fua: false };
    let mut ops = [Op::Create(vec![birth]), write(300 * 8), write(520 * 8 + 1)].into_iter();
    sim.run(async {
        let here = Life { sim: &sim, config: &config, log: &log };
        here.drive(|_| ops.next()).await.map(drop).unwrap();
    })
    .unwrap();
    assert_eq!(log.borrow().refused, 0);
}

/// Whoever has closed a pool may give it to another process: no checkpoint and no discard comes
/// after that.
#[test]
fn nothing_is_written_after_closing() {
    for seed in 0..40 {
        let _told = Told(|| format!("seed {seed}"));
        let config = Config { discard: true, ..Config::default() };
        let sim = SimDisk::from_image(config.formatted(), seed, SimOptions::default());
        let log: SharedLog = Rc::new(RefCell::new(Log::new(Model::default())));
        let mut generator = Generator::new(seed, Bounds::default());
        let mut left = 30 + seed;
        sim.run(async {
            let here = Life { sim: &sim, config: &config, log: &log };
            let next = |model: &Model| {
                left -= 1;
                (left > 0).then(|| generator.next_op(model))
            };
            let pool = here.drive(next).await.unwrap();
            for info in pool.list(None, 2).0 {
                pool.delete(info.id).await.unwrap();
            }
            pool.close().await.unwrap();
            let events = sim.io_count();
            let disk = sim.disk();
            for _ in 0..200 {
                disk.read(BlockNo::new(0), Buf::new(1)).await.1.unwrap();
            }
            assert_eq!(sim.io_count(), events, "writes, discards and syncs after closing");
        })
        .unwrap();
    }
}
