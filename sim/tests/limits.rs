//! The bounds of what a pool takes at once: bursts larger than the ring of the journal or its memory
//! wait, a record that never fits is refused, catalogues and deletions larger than usual go their way,
//! and what lies over the border of a table page is counted like anything else.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use futures_util::future::join_all;
use pando_engine::disk::sim::{SimDisk, SimOptions};
use pando_engine::error::ErrorKind;
use pando_engine::map::Fanout;
use pando_engine::pool::{CreateVolume, IoLimits, ModifyVolume, OpenOptions, Pool, Source};
use pando_engine::runtime::executor::spawn_local;
use pando_sim::model::{BLOCK_SECTORS, Birth};
use pando_sim::run::{Blocks, Life, SharedLog, check_sound, drain, observe, perform, settle, step};
use pando_sim::{Config, Log, Model, Op};

/// Events after which a pool is said to go round in circles.
const EVENTS_MAX: u64 = 60_000;

fn disk(config: &Config) -> SimDisk {
    let sim = SimDisk::from_image(config.formatted(), 1, SimOptions::default());
    sim.set_cut_at(EVENTS_MAX);
    sim
}

/// A request with labels of so many bytes, which are in its record and in the catalogue.
fn with_labels(name: &str, bytes: usize) -> CreateVolume {
    let label = |n: usize| (format!("{n:04}"), "x".repeat(bytes.min(n + 500) - n));
    CreateVolume {
        name: name.into(),
        size_bytes: Some(4096 * 4096),
        source: Source::Empty,
        snapshot: false,
        read_only: false,
        reservation_bytes: 0,
        growth_limit_bytes: 0,
        io_limits: IoLimits::default(),
        labels: (0..bytes).step_by(500).map(label).collect(),
        created_at: 0,
    }
}

fn birth(name: &str, source: Option<&str>, blocks: u64) -> Op {
    let size_bytes = source.is_none().then_some(blocks * 4096);
    let source = source.map(Into::into);
    Op::Create(vec![Birth { name: name.into(), size_bytes, source, snapshot: false }])
}

fn write(block: u64, blocks: u64) -> Op {
    let (first, count) = (block * BLOCK_SECTORS, blocks * BLOCK_SECTORS);
    Op::Write { volume: "v".into(), first, count, fua: false }
}

fn new_log() -> SharedLog {
    Rc::new(RefCell::new(Log::new(Model::default())))
}

/// Opens the pool with a memory of so many blocks for its journal.
async fn open_with(sim: &SimDisk, memory_blocks: usize) -> Pool {
    let memory = |_| sim.map_ring(memory_blocks * 4096);
    let pool = Pool::open(sim.disk(), memory, OpenOptions::default()).await.expect("it opens");
    let background = pool.clone();
    spawn_local(async move { background.run_background().await });
    pool
}

/// Many large records at once: what does not fit waits for a checkpoint, or for a flush.
fn burst(journal_blocks: u64, memory_blocks: usize) {
    let config = Config { journal_blocks, ..Config::default() };
    let sim = disk(&config);
    let names: Vec<String> = (0..12).map(|n| format!("v{n}")).collect();
    sim.run(async {
        let pool = open_with(&sim, memory_blocks).await;
        let requests = names.iter().map(|name| pool.create(with_labels(name, 9000)));
        for made in join_all(requests).await {
            made.expect("it waits until there is room");
        }
        pool.close().await.expect("nothing fails");
        let pool = open_with(&sim, memory_blocks).await;
        assert_eq!(pool.list(None, 100).0.len(), 12);
        check_sound(&pool).await;
    })
    .expect("it ends");
}

#[test]
fn a_burst_that_is_larger_than_the_ring_waits_for_checkpoints() {
    burst(8, 8);
}

#[test]
fn a_burst_that_is_larger_than_the_memory_waits_for_flushes() {
    burst(64, 8);
}

#[test]
fn a_record_that_never_fits_is_refused() {
    let config = Config { journal_blocks: 8, ..Config::default() };
    let sim = disk(&config);
    sim.run(async {
        let pool = config.open(&sim).await.expect("it opens");
        let error = pool.create(with_labels("v", 15_000)).await.expect_err("it never fits");
        assert_eq!(error.kind(), ErrorKind::Limit);
        pool.create(with_labels("v", 4000)).await.expect("the pool goes on");
    })
    .expect("it is refused at once");
}

/// A checkpoint makes more nodes clean than the cache may hold of those. None of them goes between the
/// edits of a record that needs it.
#[test]
fn a_record_of_many_writes_keeps_the_nodes_that_it_needs() {
    let config = Config { pool_blocks: 4000, cache_bytes: 0, ..Config::default() };
    let sim = disk(&config);
    sim.run(async {
        let pool = config.open(&sim).await.expect("it opens");
        let id = pool.create(with_labels("v", 0)).await.expect("there is room").id;
        let device = pool.device(id).expect("it exists");
        for round in 0..60 {
            let writes = (0..16).map(|n| {
                let block = (n * 251 + round * 37) % 1500;
                device.write(block * 4096, 4096, pando_engine::runtime::Buf::zeroed(1), false)
            });
            for done in join_all(writes).await {
                done.expect("there is room");
            }
            if round % 3 == 2 {
                pool.checkpoint().await.expect("there is room");
            }
        }
        check_sound(&pool).await;
    })
    .expect("it ends");
}

/// In a pool that is full to the last block there is room for the next catalogue, even if that is
/// large, and however often it is written.
#[test]
fn a_full_pool_has_room_for_its_catalogues() {
    let config = Config { pool_blocks: 500, journal_blocks: 16, ..Config::default() };
    let sim = disk(&config);
    sim.run(async {
        let pool = config.open(&sim).await.expect("it opens");
        // A catalogue of some 60 blocks.
        let mut ids = Vec::new();
        for n in 0..20 {
            let made = pool.create(with_labels(&format!("v{n}"), 12_000)).await;
            ids.push(made.expect("there is room").id);
            pool.checkpoint().await.expect("there is room");
        }
        let catalogue = Blocks::of(&pool).catalogue;
        assert!(catalogue > 55, "{catalogue} blocks");
        let device = pool.device(ids[0]).expect("it exists");
        let mut filled = 0;
        let write = async |block: u64| {
            let buf = pando_engine::runtime::Buf::zeroed(1);
            device.write(block * 4096, 4096, buf, false).await
        };
        while write(filled).await.is_ok() {
            filled += 1;
        }
        assert!(filled > 20, "{filled} blocks");
        // Overwrites go on into the reserve, and no further.
        for round in 0..3 {
            for block in 0..filled {
                let done = write(block).await;
                done.unwrap_or_else(|e| panic!("round {round}, block {block}: {e}"));
            }
            let change = ModifyVolume {
                labels: BTreeMap::from([("round".into(), round.to_string())]),
                ..ModifyVolume::default()
            };
            pool.modify(ids[1], change).await.expect("it can be made known");
            pool.checkpoint().await.expect("the catalogue has its blocks");
        }
        drain(&pool).await.expect("all can be deleted");
        assert_eq!(pool.status().poisoned, None);
    })
    .expect("it ends");
}

/// A map of more nodes than one checkpoint gives up is deleted, and the process ends in between.
#[test]
fn a_long_deletion_goes_on_after_a_restart() {
    let fanout = Fanout { leaf_max: 4, inner_max: 4 };
    let config = Config { pool_blocks: 16_000, journal_blocks: 64, fanout, ..Config::default() };
    let sim = SimDisk::from_image(config.formatted(), 1, SimOptions::default());
    sim.run(async {
        let options = OpenOptions { fanout, ..OpenOptions::default() };
        // The test makes the checkpoints.
        let opened = Pool::open(sim.disk(), |len| sim.map_ring(len), options).await;
        let pool = opened.expect("it opens");
        perform(&pool, &birth("v", None, 8000), 0).await.expect("there is room");
        // Every other block, so that each is an extent.
        for some in (0..3600).collect::<Vec<_>>().chunks(200) {
            let writes = some.iter().map(|n| write(n * 2, 1)).collect::<Vec<_>>();
            for done in join_all(writes.iter().map(|op| perform(&pool, op, 1))).await {
                done.expect("there is room");
            }
            pool.checkpoint().await.expect("nothing fails");
        }
        perform(&pool, &Op::Delete("v".into()), 0).await.expect("nothing fails");
        pool.close().await.expect("nothing fails");
        assert!(pool.status().deletions_pending > 0, "the deletion was over at once");
        let pool = config.open(&sim).await.expect("it opens");
        drain(&pool).await.expect("all comes back");
    })
    .expect("the power stays on");
}

/// Groups of several table pages: what lies over the border between two is counted on both.
#[test]
fn extents_over_the_border_of_a_table_page_are_counted() {
    let config = Config {
        pool_blocks: 40_000,
        journal_blocks: 64,
        fanout: Fanout::FULL,
        discard: true,
        ..Config::default()
    };
    let sim = SimDisk::from_image(config.formatted(), 1, SimOptions::default());
    let log = new_log();
    sim.run(async {
        let life = Life { sim: &sim, config: &config, log: &log };
        let pool = life.begin().await.expect("it opens");
        step(&pool, &log, &birth("v", None, 2400)).await.expect("there is room");
        for block in (0..2400).step_by(200) {
            step(&pool, &log, &write(block, 200)).await.expect("there is room");
        }
        step(&pool, &log, &birth("w", Some("v"), 0)).await.expect("there is room");
        for block in (0..2400).step_by(600) {
            step(&pool, &log, &write(block, 100)).await.expect("there is room");
        }
        settle(&pool).await.expect("nothing fails");
        check_sound(&pool).await;
        let pool = {
            pool.close().await.expect("nothing fails");
            life.begin().await.expect("it opens")
        };
        assert!(observe(&pool).await.as_ref() == Ok(log.borrow().last()));
        drain(&pool).await.expect("all comes back");
    })
    .expect("the power stays on");
}

#[test]
fn a_growth_limit_counts_what_is_under_way() {
    let config = Config::default();
    let sim = disk(&config);
    sim.run(async {
        let pool = config.open(&sim).await.expect("it opens");
        let request = CreateVolume { growth_limit_bytes: 20 * 4096, ..with_labels("v", 0) };
        let device = pool.device(pool.create(request).await.expect("there is room").id);
        let device = device.expect("it exists");
        let writes = (0..40)
            .map(|n| device.write(n * 8192, 4096, pando_engine::runtime::Buf::zeroed(1), false));
        let done = join_all(writes).await;
        assert_eq!(done.iter().filter(|result| result.is_ok()).count(), 20);
    })
    .expect("it ends");
}

#[test]
fn writes_of_one_turn_go_into_as_many_records_as_they_need() {
    let config = Config { pool_blocks: 1500, ..Config::default() };
    let sim = disk(&config);
    sim.run(async {
        let pool = config.open(&sim).await.expect("it opens");
        perform(&pool, &birth("v", None, 1200), 0).await.expect("there is room");
        let long = (0..4).map(|n| write(n * 200, 150));
        let short = (0..100).map(|n| write(800 + n * 3, 1));
        let ops: Vec<Op> = long.chain(short).collect();
        for done in join_all(ops.iter().map(|op| perform(&pool, op, 1))).await {
            done.expect("there is room");
        }
        let mapped = pool.find("v").expect("it was made").mapped_bytes;
        assert_eq!(mapped, (600 + 100) * 4096);
        check_sound(&pool).await;
    })
    .expect("it ends");
}

/// A write that gets only a part of its blocks at once, because the free blocks of the next group are
/// not in memory, gives them back until it gets all.
#[test]
fn a_write_over_two_groups_waits_for_the_second() {
    let config = Config { pool_blocks: 3200, fanout: Fanout::FULL, ..Config::default() };
    let sim = disk(&config);
    sim.run(async {
        let mut pool = config.open(&sim).await.expect("it opens");
        perform(&pool, &birth("v", None, 2400), 0).await.expect("there is room");
        for block in (0..2250).step_by(150) {
            perform(&pool, &write(block, 150), 1).await.expect("there is room");
            settle(&pool).await.expect("nothing fails");
            let used = Blocks::of(&pool).used();
            pool.close().await.expect("nothing fails");
            pool = config.open(&sim).await.expect("it opens");
            assert_eq!(Blocks::of(&pool).used(), used, "whatever is in use is in the pool");
        }
        drain(&pool).await.expect("all comes back");
    })
    .expect("it ends");
}

/// Fills a volume of single blocks until there is no room for growth; how many there are.
async fn fill(pool: &Pool, blocks: u64) -> u64 {
    perform(pool, &birth("v", None, blocks), 0).await.expect("there is room");
    for block in 0..blocks {
        if perform(pool, &write(block, 1), 1).await.is_err() {
            return block;
        }
    }
    panic!("the pool is not full");
}

/// Each of them alone finds the blocks for its nodes; all in one record would not.
#[test]
fn overwrites_of_one_turn_go_on_in_a_full_pool() {
    let config = Config { pool_blocks: 500, fanout: Fanout::FULL, ..Config::default() };
    let sim = disk(&config);
    sim.run(async {
        let pool = config.open(&sim).await.expect("it opens");
        let filled = fill(&pool, 600).await;
        for round in 0..4 {
            let ops: Vec<Op> = (0..filled).step_by(5).map(|block| write(block, 1)).collect();
            for done in join_all(ops.iter().map(|op| perform(&pool, op, 2 + round))).await {
                done.expect("it replaces its own block");
            }
        }
        drain(&pool).await.expect("all comes back");
    })
    .expect("it ends");
}

/// What is free lies in single blocks, and there are few blocks for nodes: a long write stands on as
/// many runs, and goes block by block.
#[test]
fn a_scattered_write_goes_on_in_a_full_pool() {
    let config = Config { pool_blocks: 500, fanout: Fanout::FULL, ..Config::default() };
    let sim = disk(&config);
    sim.run(async {
        let pool = config.open(&sim).await.expect("it opens");
        let filled = fill(&pool, 600).await;
        for n in 0..300 {
            perform(&pool, &write(n * 37 % filled, 1), 2).await.expect("it replaces its own block");
        }
        for n in 0..20 {
            let long = write(n * 53 % (filled - 14), 14);
            perform(&pool, &long, 3).await.expect("it replaces its own blocks");
        }
        drain(&pool).await.expect("all comes back");
    })
    .expect("it ends");
}

/// Copies of shared nodes take blocks too, without any data: not the last ones.
#[test]
fn a_full_pool_has_room_for_its_catalogues_whatever_nodes_it_needs() {
    let config = Config { pool_blocks: 700, journal_blocks: 32, ..Config::default() };
    let sim = disk(&config);
    sim.run(async {
        let pool = config.open(&sim).await.expect("it opens");
        for n in 0..20 {
            let made = pool.create(with_labels(&format!("l{n}"), 12_000)).await;
            made.expect("there is room");
        }
        let filled = fill(&pool, 700).await;
        for n in 0..40 {
            perform(&pool, &birth(&format!("c{n}"), Some("v"), 0), 0).await.expect("there is room");
        }
        // A block of each leaf of each clone, until there is no room for another copy.
        let blocks = (0..40).flat_map(|n| (0..filled).step_by(4).map(move |block| (n, block)));
        let mut refused = 0;
        for (n, block) in blocks {
            let (first, count) = (block * BLOCK_SECTORS, BLOCK_SECTORS);
            let discard = Op::Discard { volume: format!("c{n}"), first, count };
            refused += u32::from(perform(&pool, &discard, 0).await.is_err());
            if refused == 3 {
                break;
            }
        }
        assert_eq!(refused, 3, "there was room for all copies");
        pool.checkpoint().await.expect("the catalogue has its blocks");
        drain(&pool).await.expect("all comes back");
        assert_eq!(pool.status().poisoned, None);
    })
    .expect("it ends");
}

/// Volumes with long labels make the catalogue long; how long is known before they are made.
#[test]
fn volumes_made_in_a_full_pool_leave_room_for_their_catalogue() {
    let config = Config { pool_blocks: 900, journal_blocks: 300, ..Config::default() };
    let sim = disk(&config);
    sim.run(async {
        let pool = config.open(&sim).await.expect("it opens");
        fill(&pool, 900).await;
        let mut made = 0;
        let refused = loop {
            match pool.create(with_labels(&format!("l{made}"), 15_000)).await {
                Ok(_) => made += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(refused.kind(), ErrorKind::NoSpace, "after {made} volumes");
        pool.checkpoint().await.expect("the catalogue has its blocks");
        drain(&pool).await.expect("all comes back");
        assert!(made > 2);
    })
    .expect("it ends");
}

#[test]
fn labels_added_in_a_full_pool_leave_room_for_the_catalogue() {
    let config = Config { pool_blocks: 900, journal_blocks: 300, ..Config::default() };
    let sim = disk(&config);
    sim.run(async {
        let pool = config.open(&sim).await.expect("it opens");
        let group: Vec<_> = (0..60).map(|n| with_labels(&format!("l{n}"), 0)).collect();
        let ids = pool.create_group(group).await.expect("there is room");
        fill(&pool, 900).await;
        let mut changed = 0;
        let mut refused = 0;
        for info in ids {
            let labels = with_labels("l", 15_000).labels;
            let change = ModifyVolume { labels, ..ModifyVolume::default() };
            match pool.modify(info.id, change).await {
                Ok(_) => changed += 1,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NoSpace, "after {changed}");
                    refused += 1;
                }
            }
        }
        pool.checkpoint().await.expect("the catalogue has its blocks");
        drain(&pool).await.expect("all comes back");
        assert!(changed > 2 && refused > 2, "{changed} changed, {refused} refused");
    })
    .expect("it ends");
}
