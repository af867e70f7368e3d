//! Which free blocks are discarded, and which operations must not wait for a discard.

use std::time::Duration;

use tokio::sync::oneshot;

use crate::disk::sim::{Effect, Fault, FaultOp, SimDisk};
use crate::limits::DISCARD_PAUSE_MIN;
use crate::pool::OpenOptions;
use crate::pool::data::gate_tests::{World, options, run, start};
use crate::space::{Run, TakeError};
use crate::units::{BLOCK_BYTES, BlockNo, to_u64};

/// Blocks per discard unit in these tests.
const UNIT: u64 = 16;
const EIO: i32 = 5;

/// A pool with discards enabled and a volume of `blocks` blocks. The receiver resolves when the
/// discard task ends.
async fn world(sim: &SimDisk, blocks: u64) -> (World, oneshot::Receiver<()>) {
    let options = OpenOptions { discard: true, discard_unit: UNIT, ..options() };
    let world = World::opened(sim, blocks, options).await;
    let pool = world.pool.clone();
    let task = start(async move { pool.run_discards().await });
    world.rest().await;
    (world, task)
}

impl World {
    /// Waits long enough for all pending discards.
    async fn rest(&self) {
        self.pool.disk().sleep(Duration::from_secs(10)).await;
    }

    fn discarded_blocks(&self) -> u64 {
        self.pool.counters().discarded_bytes / BLOCK_BYTES
    }

    fn discarding(&self) -> Option<Run> {
        self.pool.core.lock().state.reuse.discarding()
    }

    /// Allocates all free blocks except `left`.
    async fn take_all_but(&self, left: u64) -> Vec<Run> {
        let mut taken = Vec::new();
        loop {
            let group = {
                let space = &mut self.pool.core.lock().state.space;
                let Some(more @ 1..) = space.free().checked_sub(left) else { return taken };
                match space.take(more) {
                    Ok(run) => {
                        taken.push(run);
                        continue;
                    }
                    Err(TakeError::Load(group)) => group,
                    Err(TakeError::Full) => panic!("{more} blocks more are free"),
                }
            };
            self.pool.load_group(group).await.unwrap();
        }
    }
}

/// Number of whole units within `blocks`, which must be sorted.
fn whole_units(blocks: &[BlockNo]) -> u64 {
    let runs = blocks.chunk_by(|a, b| a.plus(1) == *b);
    let units = runs.map(|run| {
        let (start, end) = (run[0].get(), run[0].get() + to_u64(run.len()));
        (end / UNIT).saturating_sub(start.div_ceil(UNIT))
    });
    units.sum()
}

/// Runs shorter than a unit are not discarded until later checkpoints free their neighbours.
#[test]
fn whole_units_are_discarded_and_no_others() {
    run(|sim| async move {
        let (world, _task) = world(&sim, 200).await;
        let old = world.blocks().await;
        let units = whole_units(&old);
        assert!(units > 8, "the volume lies in long runs");
        let before = world.discarded_blocks();
        for block in (0..200).step_by(2) {
            world.write(block, 1, 2).await;
        }
        world.pool.checkpoint().await.unwrap();
        world.rest().await;
        assert!(world.is_free(old[0]) && world.is_free(old[198]));
        assert_eq!(world.discarded_blocks(), before, "single blocks");
        for block in (1..200).step_by(2) {
            world.write(block, 1, 2).await;
        }
        world.pool.checkpoint().await.unwrap();
        world.rest().await;
        assert_eq!(world.discarded_blocks(), before + units * UNIT);
        assert!(old.iter().all(|block| world.is_free(*block)));
        // Each only once.
        let asked = sim.asked(FaultOp::Discard);
        world.pool.checkpoint().await.unwrap();
        world.rest().await;
        assert_eq!(sim.asked(FaultOp::Discard), asked);
    });
}

/// Neither writes nor checkpoints wait for a discard, and its blocks are not allocated meanwhile.
#[test]
fn nothing_is_used_during_its_discard_and_nothing_waits_for_it() {
    run(|sim| async move {
        let (world, _task) = world(&sim, 200).await;
        let old = world.blocks().await;
        world.gate.hold(FaultOp::Discard, None, usize::MAX);
        world.write(0, 200, 2).await;
        world.pool.checkpoint().await.unwrap();
        world.until_waiting().await;
        let held = world.discarding().expect("the discard that is held up");
        assert!(held.len >= UNIT && old.contains(&held.block), "{held:?} of the old blocks");
        for byte in 3..30 {
            world.write(0, 200, byte).await;
            world.pool.checkpoint().await.unwrap();
            let now = world.blocks().await;
            for block in (0..held.len).map(|offset| held.block.plus(offset)) {
                assert!(!world.is_free(block), "{block} is being discarded");
                assert!(!now.contains(&block), "{block} is in use and being discarded");
            }
        }
        assert_eq!(world.gate.waiting(), 1, "one at a time");
        assert!(world.pool.status().pending_bytes >= held.len * BLOCK_BYTES);
        assert_eq!(world.pool.check(&|_, _| ()).await.unwrap().findings, []);
        world.gate.open();
        world.rest().await;
        assert_eq!(world.discarding(), None);
        assert_eq!(world.pool.check(&|_, _| ()).await.unwrap().findings, []);
    });
}

/// A rest between two discards bounds their rate.
#[test]
fn discards_are_spread_over_time() {
    run(|sim| async move {
        let (world, _task) = world(&sim, 200).await;
        // Every second unit stays in use.
        let old = world.blocks().await;
        let second = |n: &usize| old[*n].get() / UNIT % 2 == 1;
        let asked = sim.asked(FaultOp::Discard);
        for block in (0..200).filter(second) {
            world.write(to_u64(block), 1, 2).await;
        }
        world.pool.checkpoint().await.unwrap();
        let start = world.pool.disk().now();
        let mut seen = Vec::new();
        while seen.len() < 4 {
            let now = sim.asked(FaultOp::Discard) - asked;
            if now > to_u64(seen.len()) {
                seen.push(world.pool.disk().now() - start);
            }
            world.pool.disk().sleep(Duration::from_micros(100)).await;
        }
        let rests: Vec<_> = seen.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let least = DISCARD_PAUSE_MIN - Duration::from_micros(200);
        assert!(rests.iter().all(|rest| *rest >= least), "{rests:?}");
    });
}

/// A pool that is short of space keeps its free blocks for writers.
#[test]
fn a_pool_that_is_short_of_space_discards_nothing() {
    run(|sim| async move {
        let (world, _task) = world(&sim, 64).await;
        let before = world.discarded_blocks();
        world.write(0, 64, 2).await;
        // Together with the old blocks this is exactly the growth reserve.
        let left = world.pool.core.lock().growth_reserve() - 64;
        let taken = world.take_all_but(left).await;
        world.pool.checkpoint().await.unwrap();
        world.rest().await;
        assert_eq!(world.discarded_blocks(), before);
        {
            let mut inner = world.pool.core.lock();
            taken.into_iter().for_each(|run| inner.state.space.untake(run));
        }
        world.pool.checkpoint().await.unwrap();
        world.rest().await;
        assert!(world.discarded_blocks() > before, "there is room again");
    });
}

/// If no other block is free, the next catalogue waits for blocks that are being discarded.
#[test]
fn a_checkpoint_waits_for_a_discard_when_nothing_else_is_free() {
    run(|sim| async move {
        let (world, _task) = world(&sim, 200).await;
        world.gate.hold(FaultOp::Discard, None, usize::MAX);
        world.write(0, 200, 2).await;
        world.pool.checkpoint().await.unwrap();
        world.until_waiting().await;
        world.take_all_but(0).await;
        let pool = world.pool.clone();
        let mut checkpoint = start(async move { pool.checkpoint().await });
        world.settle().await;
        assert!(checkpoint.try_recv().is_err(), "there is no block for the catalogue");
        world.gate.open();
        checkpoint.await.unwrap().expect("what was discarded is free");
    });
}

/// The caller may hand a closed pool to another process.
#[test]
fn a_pool_is_not_closed_before_its_discard_is_over() {
    run(|sim| async move {
        let (world, task) = world(&sim, 200).await;
        world.gate.hold(FaultOp::Discard, None, usize::MAX);
        world.write(0, 200, 2).await;
        world.pool.checkpoint().await.unwrap();
        world.until_waiting().await;
        let pool = world.pool.clone();
        let mut closed = start(async move { pool.close().await });
        world.settle().await;
        assert!(closed.try_recv().is_err(), "a discard is under way");
        world.gate.open();
        closed.await.unwrap().unwrap();
        let asked = sim.asked(FaultOp::Discard);
        task.await.unwrap();
        world.rest().await;
        assert_eq!(sim.asked(FaultOp::Discard), asked, "the rest was given up");
    });
}

/// A device without discard gets one request; the free blocks stay allocatable.
#[test]
fn after_an_error_nothing_is_discarded() {
    run(|sim| async move {
        let (world, task) = world(&sim, 200).await;
        let old = world.blocks().await;
        let (before, asked) = (world.discarded_blocks(), sim.asked(FaultOp::Discard));
        let effect = Effect::Error { errno: EIO, landed: false };
        sim.inject(Fault { op: FaultOp::Discard, after: 0, sticky: true, effect });
        world.write(0, 200, 2).await;
        world.pool.checkpoint().await.unwrap();
        task.await.expect("the task ends");
        assert_eq!(sim.asked(FaultOp::Discard), asked + 1);
        assert_eq!(world.discarded_blocks(), before);
        assert!(old.iter().all(|block| world.is_free(*block)), "they are free all the same");
        assert_eq!(world.pool.status().poisoned, None);
    });
}

/// A group that is not in memory is loaded before its units are discarded.
#[test]
fn groups_are_loaded_for_their_discards() {
    run(|sim| async move {
        let options = OpenOptions { discard: true, discard_unit: UNIT, ..options() };
        let world = World::opened(&sim, 1500, options.clone()).await;
        world.pool.close().await.unwrap();
        let pool =
            crate::pool::Pool::open(sim.disk(), |len| sim.map_ring(len), options).await.unwrap();
        let task = pool.clone();
        let _task = start(async move { task.run_discards().await });
        let id = pool.find("v").unwrap().id;
        pool.delete(id).await.unwrap();
        for _ in 0..4 {
            pool.checkpoint().await.unwrap();
        }
        assert_eq!(pool.status().deletions_pending, 0);
        pool.disk().sleep(Duration::from_secs(60)).await;
        let discarded = pool.counters().discarded_bytes / BLOCK_BYTES;
        assert!(discarded >= 1400, "{discarded} blocks of 1500 in some pieces");
    });
}
