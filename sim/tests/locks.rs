//! How often a request takes the lock of the state. Counted, not timed: the lock is shared by all
//! shards, so each acquisition limits how far they scale.

use std::rc::Rc;

use futures_util::future::join_all;
use pando_engine::device::BlockDevice;
use pando_engine::disk::sim::{SimDisk, SimOptions};
use pando_engine::pool::Pool;
use pando_engine::runtime::Buf;
use pando_sim::model::Birth;
use pando_sim::run::perform;
use pando_sim::{Config, Op};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 64;

fn with_a_volume<R>(test: impl AsyncFnOnce(Pool, Rc<dyn BlockDevice>) -> R) -> R {
    let config = Config::default();
    let sim = SimDisk::from_image(config.formatted(), 1, SimOptions::default());
    let result = sim.run(async {
        let pool = config.open(&sim).await.expect("a sound pool");
        let size_bytes = Some(BLOCKS * BLOCK);
        let birth = Birth { name: "v".into(), size_bytes, source: None, snapshot: false };
        perform(&pool, &Op::Create(vec![birth]), 0).await.expect("room for a volume");
        let device = pool.device(pool.find("v").expect("it was made").id).expect("it exists");
        // Loads the group and the nodes that the requests below need.
        device.write(0, 4096, Buf::zeroed(1), false).await.expect("room for a block");
        test(pool, device).await
    });
    result.expect("the power does not fail")
}

#[test]
fn a_read_takes_the_lock_twice() {
    with_a_volume(async |pool, device| {
        let before = pool.locks_taken();
        device.read(0, 4096).await.expect("it was written");
        let taken = pool.locks_taken() - before;
        assert!(taken <= 2, "{taken}: once to look up and pin, once to unpin");
    });
}

#[test]
fn a_write_takes_the_lock_three_times_alone_and_less_in_a_batch() {
    with_a_volume(async |pool, device| {
        let before = pool.locks_taken();
        device.write(BLOCK, 4096, Buf::zeroed(1), false).await.expect("room for a block");
        let taken = pool.locks_taken() - before;
        assert!(taken <= 3, "{taken}: once each to admit, to look for missing nodes, to record");

        let before = pool.locks_taken();
        let writes = (0..32).map(|at| device.write(at * BLOCK, 4096, Buf::zeroed(1), false));
        for written in join_all(writes).await {
            written.expect("room for a block");
        }
        let taken = pool.locks_taken() - before;
        assert!(taken <= 8, "{taken} for 32 writes of one turn");
    });
}

#[test]
fn size_and_read_only_take_no_lock() {
    with_a_volume(async |pool, device| {
        let before = pool.locks_taken();
        assert_eq!((device.size_bytes(), device.read_only()), (BLOCKS * BLOCK, false));
        assert_eq!(pool.locks_taken(), before);
    });
}

/// Handles see a change as soon as it was acknowledged.
#[test]
fn a_change_is_seen_by_the_handles_there_are() {
    with_a_volume(async |pool, device| {
        let id = pool.find("v").expect("it was made").id;
        let change = pando_engine::pool::ModifyVolume {
            size_bytes: Some(2 * BLOCKS * BLOCK),
            read_only: Some(true),
            ..Default::default()
        };
        pool.modify(id, change).await.expect("it can grow");
        assert_eq!((device.size_bytes(), device.read_only()), (2 * BLOCKS * BLOCK, true));
        let refused = device.write(0, 4096, Buf::zeroed(1), false).await.expect_err("read-only");
        assert_eq!(refused.kind(), pando_engine::error::ErrorKind::ReadOnly);
        device.read((2 * BLOCKS - 1) * BLOCK, 4096).await.expect("the new end");
        pool.delete(id).await.expect("it exists");
        assert_eq!((device.size_bytes(), device.read_only()), (0, true));
        let gone = device.read(0, 4096).await.map(|_| ()).expect_err("deleted");
        assert_eq!(gone.kind(), pando_engine::error::ErrorKind::NotFound);
    });
}
