//! What is acknowledged by operations on a pool as a whole is durable: that it was closed, that it has
//! grown, that it was made anew. And what takes no change takes none.

use std::rc::Rc;

use pando_engine::device::{BlockDevice, ZeroFlags};
use pando_engine::disk::sim::{CutPlan, Rng, SimDisk, SimImage, SimOptions};
use pando_engine::error::ErrorKind;
use pando_engine::pool::{FormatOptions, ModifyVolume, Pool};
use pando_engine::runtime::Buf;
use pando_sim::crash::plans;
use pando_sim::model::Birth;
use pando_sim::run::{check_sound, observe, perform};
use pando_sim::{Config, Model, Op, Told};

fn birth(name: &str, source: Option<&str>) -> Op {
    let size_bytes = source.is_none().then_some(40 * 4096);
    let (source, snapshot) = (source.map(Into::into), source.is_some());
    Op::Create(vec![Birth { name: name.into(), size_bytes, source, snapshot }])
}

fn write(volume: &str, first: u64) -> Op {
    Op::Write { volume: volume.into(), first, count: 8, fua: false }
}

fn disk(image: SimImage, seed: u64) -> SimDisk {
    SimDisk::from_image(image, seed, SimOptions::default())
}

fn device(pool: &Pool, name: &str) -> Rc<dyn BlockDevice> {
    let id = pool.find(name).expect("it was made").id;
    pool.device(id).expect("it exists")
}

/// What is found when the pool is opened after the power has failed.
fn found_after(image: SimImage) -> (Model, u64) {
    let sim = disk(image, 1);
    let found = sim.run(async {
        let pool = Config::default().open(&sim).await.unwrap_or_else(|e| panic!("{e}"));
        check_sound(&pool).await;
        let seen = observe(&pool).await.unwrap_or_else(|e| panic!("{e}"));
        (seen, pool.status().size_bytes)
    });
    found.expect("the power stays on")
}

#[test]
fn a_pool_that_was_closed_is_whole_and_takes_nothing_more() {
    for seed in 0..6 {
        let sim = disk(Config::default().formatted(), seed);
        let (image, model) = sim
            .run(async {
                let pool = Config::default().open(&sim).await.expect("it opens");
                perform(&pool, &birth("v", None), 0).await.expect("there is room");
                for n in 0..10 {
                    perform(&pool, &write("v", n * 16), 1 + n).await.expect("there is room");
                }
                let model = observe(&pool).await.expect("it can be read");
                pool.close().await.expect("nothing fails");
                let image = sim.image_after_cut(CutPlan::KeepNone);
                for op in [write("v", 0), birth("w", None), Op::Delete("v".into())] {
                    let error = perform(&pool, &op, 99).await.expect_err("it is closed");
                    assert_eq!(error.kind(), ErrorKind::Shutdown, "{op:?}");
                }
                let discarded = device(&pool, "v").discard(0, 4096, false).await;
                assert_eq!(discarded.expect_err("it is closed").kind(), ErrorKind::Shutdown);
                assert!(pool.checkpoint().await.is_err());
                (image, model)
            })
            .expect("the power stays on");
        assert!(found_after(image).0 == model, "seed {seed}");
    }
}

#[test]
fn a_pool_that_has_grown_stays_grown() {
    for seed in 0..6 {
        let config = Config::default();
        let sim = disk(config.formatted(), seed);
        let grown = config.pool_blocks + 1500;
        let image = sim
            .run(async {
                let pool = config.open(&sim).await.expect("it opens");
                perform(&pool, &birth("v", None), 0).await.expect("there is room");
                perform(&pool, &write("v", 0), 1).await.expect("there is room");
                let error = pool.grow((config.pool_blocks - 1) * 4096).await;
                assert_eq!(error.expect_err("it cannot shrink").kind(), ErrorKind::Invalid);
                let usable = pool.status().usable_bytes;
                pool.grow(grown * 4096).await.expect("there is room");
                assert!(pool.status().free_bytes > usable, "what is new is free");
                check_sound(&pool).await;
                sim.image_after_cut(CutPlan::KeepNone)
            })
            .expect("the power stays on");
        assert_eq!(found_after(image).1, grown * 4096, "seed {seed}");
    }
}

/// The power fails at every event of it: the length of the pool is the old or the new one.
#[test]
fn growth_is_whole_or_not_at_all() {
    let config = Config::default();
    let grown = (config.pool_blocks + 1500) * 4096;
    let mut rng = Rng::new(1);
    for cut in 0.. {
        let _told = Told(|| format!("cut at event {cut}"));
        let sim = disk(config.formatted(), cut);
        sim.set_cut_at(cut);
        let ended = sim.run(async {
            let pool = config.open(&sim).await.expect("it opens");
            perform(&pool, &birth("v", None), 0).await.expect("there is room");
            perform(&pool, &write("v", 0), 1).await.expect("there is room");
            pool.grow(grown).await.expect("there is room");
        });
        if ended.is_some() {
            return;
        }
        for plan in plans(&sim, &mut rng, 8) {
            let _told = Told(|| format!("{plan:?}"));
            let (_, size) = found_after(sim.image_after_cut(plan));
            assert!(size == grown || size == config.pool_blocks * 4096, "{size}");
        }
    }
}

#[test]
fn what_is_read_only_is_not_written() {
    let sim = disk(Config::default().formatted(), 1);
    sim.run(async {
        let pool = Config::default().open(&sim).await.expect("it opens");
        perform(&pool, &birth("v", None), 0).await.expect("there is room");
        perform(&pool, &write("v", 0), 1).await.expect("there is room");
        perform(&pool, &birth("s", Some("v")), 0).await.expect("there is room");
        let id = pool.find("v").expect("it was made").id;
        let frozen = ModifyVolume { read_only: Some(true), ..ModifyVolume::default() };
        pool.modify(id, frozen).await.expect("it may be frozen");
        for name in ["v", "s"] {
            let device = device(&pool, name);
            assert!(device.read_only());
            let flags = ZeroFlags { fua: false, no_hole: true };
            for refused in [
                device.write(0, 4096, Buf::zeroed(1), false).await,
                device.write(512, 512, Buf::zeroed(1), false).await,
                device.discard(0, 4096, false).await,
                device.write_zeroes(0, 4096, ZeroFlags::default()).await,
                device.write_zeroes(0, 4096, flags).await,
            ] {
                assert_eq!(refused.expect_err("it is read-only").kind(), ErrorKind::ReadOnly);
            }
        }
        let thawed = ModifyVolume { read_only: Some(false), ..ModifyVolume::default() };
        pool.modify(id, thawed.clone()).await.expect("it may be written again");
        device(&pool, "v").discard(0, 4096, false).await.expect("it may be written again");
        let snapshot = pool.find("s").expect("it was made").id;
        let error = pool.modify(snapshot, thawed).await.expect_err("a snapshot is never written");
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
    })
    .expect("the power stays on");
}

/// A pool that is made over an old one: whenever the power fails, there is the old one as it was, the
/// new one, or none.
#[test]
fn a_pool_made_over_another_is_that_or_the_old_one_or_none() {
    let old = Config { pool_blocks: 800, ..Config::default() };
    let base = disk(old.formatted(), 1);
    let (base, model) = base
        .run(async {
            let pool = old.open(&base).await.expect("it opens");
            perform(&pool, &birth("v", None), 0).await.expect("there is room");
            for n in 0..9 {
                perform(&pool, &write("v", n * 16), 1 + n).await.expect("there is room");
                pool.checkpoint().await.expect("nothing fails");
            }
            // Flushed, and in the journal alone.
            perform(&pool, &write("v", 200), 20).await.expect("there is room");
            pool.flush().await.expect("nothing fails");
            let model = observe(&pool).await.expect("it can be read");
            (base.image_after_cut(CutPlan::KeepNone), model)
        })
        .expect("the power stays on");
    let mut rng = Rng::new(1);
    for cut in 0.. {
        let _told = Told(|| format!("cut at event {cut}"));
        let sim = disk(base.clone(), cut);
        sim.set_cut_at(cut);
        let ended = sim.run(async {
            let disk = sim.disk();
            let options = FormatOptions {
                size_bytes: 600 * 4096,
                journal_bytes: Some(16 * 4096),
                force: false,
                uuid: [8; 16],
            };
            let refused = Pool::format(&disk, &options).await.expect_err("there is a pool");
            assert_eq!(refused.kind(), ErrorKind::Exists);
            let options = FormatOptions { force: true, ..options };
            Pool::format(&disk, &options).await.expect("it is told to");
        });
        if ended.is_some() {
            let (seen, size) = found_after(sim.image_after_cut(CutPlan::KeepNone));
            assert!(seen.volumes.is_empty() && size == 600 * 4096);
            return;
        }
        for plan in plans(&sim, &mut rng, 12) {
            let _told = Told(|| format!("{plan:?}"));
            let sim = disk(sim.image_after_cut(plan), 1);
            sim.run(async {
                match old.open(&sim).await {
                    Ok(pool) => {
                        let seen = observe(&pool).await.unwrap_or_else(|e| panic!("{e}"));
                        let uuid = pool.status().uuid;
                        assert!(seen == model || (seen.volumes.is_empty() && uuid == [8; 16]));
                    }
                    Err(error) => assert!(
                        matches!(error.kind(), ErrorKind::NotAPool | ErrorKind::Corrupt),
                        "{error}"
                    ),
                }
            });
        }
    }
}
