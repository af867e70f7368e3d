//! The order of syncs, and what a failed one means to everybody who is under way: the order of I/O
//! is chosen by a gate, so that each of these meets the moment that it is about.

use std::future::Future;
use std::rc::Rc;

use futures_util::FutureExt;
use pando_engine::device::BlockDevice;
use pando_engine::disk::sim::gate::{Gate, pass_time};
use pando_engine::disk::sim::{CutPlan, Effect, Fault, FaultOp, SimDisk, SimImage, SimOptions};
use pando_engine::error::{ErrorKind, Result};
use pando_engine::pool::{OpenOptions, Pool};
use pando_engine::runtime::Buf;
use pando_engine::runtime::executor::{end_of_turn, spawn_local};
use pando_sim::model::Birth;
use pando_sim::run::perform;
use pando_sim::{Config, Op};
use tokio::sync::oneshot;

const EIO: i32 = 5;

/// A pool whose disk can be held, with a volume of some blocks; the test makes the checkpoints.
struct World {
    sim: SimDisk,
    gate: Gate,
    pool: Pool,
    device: Rc<dyn BlockDevice>,
}

impl World {
    async fn new(sim: SimDisk) -> Self {
        let gate = Gate::default();
        let disk = gate.before(sim.disk());
        let opened = Pool::open(disk, |len| sim.map_ring(len), OpenOptions::default()).await;
        let pool = opened.expect("nothing fails yet");
        let size_bytes = Some(64 * 4096);
        let birth = Birth { name: "v".into(), size_bytes, source: None, snapshot: false };
        perform(&pool, &Op::Create(vec![birth]), 0).await.expect("nothing fails yet");
        let device = device(&pool);
        Self { sim, gate, pool, device }
    }

    /// Writes a block beside the test.
    fn write(&self, block: u64, byte: u8) -> oneshot::Receiver<Result<()>> {
        let device = Rc::clone(&self.device);
        start(async move { device.write(block * 4096, 4096, full_of(byte), false).await })
    }

    fn flush(&self) -> oneshot::Receiver<Result<()>> {
        let pool = self.pool.clone();
        start(async move { pool.flush().await })
    }

    fn checkpoint(&self) -> oneshot::Receiver<Result<()>> {
        let pool = self.pool.clone();
        start(async move { pool.checkpoint().await })
    }

    async fn until_waiting(&self, count: usize) {
        self.gate.until_waiting(&self.sim.disk(), count).await;
    }

    /// The next sync fails, and those after it do not.
    fn fail_a_sync(&self) {
        let effect = Effect::Error { errno: EIO, landed: false };
        self.sim.inject(Fault { op: FaultOp::Sync, after: 0, sticky: false, effect });
    }

    /// Lets everything go on that is not held.
    async fn settle(&self) {
        for _ in 0..200 {
            pass_time(&self.sim.disk()).await;
        }
    }
}

fn device(pool: &Pool) -> Rc<dyn BlockDevice> {
    let id = pool.find("v").expect("it was made").id;
    pool.device(id).expect("it exists")
}

fn full_of(byte: u8) -> Buf {
    let mut buf = Buf::new(1);
    buf.as_mut_bytes().fill(byte);
    buf
}

/// Does something beside the test.
fn start<T: 'static>(work: impl Future<Output = T> + 'static) -> oneshot::Receiver<T> {
    let (done, answer) = oneshot::channel();
    spawn_local(async move { drop(done.send(work.await)) });
    answer
}

fn on_a_pool<T>(seed: u64, test: impl AsyncFnOnce(World) -> T) -> T {
    let sim = SimDisk::from_image(Config::default().formatted(), seed, SimOptions::default());
    let done = sim.run(async { test(World::new(sim.clone()).await).await });
    done.expect("the power stays on")
}

/// Opens the pool after a power failure: what each of some blocks is full of.
fn read_after(image: SimImage, blocks: &[u64]) -> Vec<u8> {
    let sim = SimDisk::from_image(image, 1, SimOptions::default());
    let read = sim.run(async {
        let pool = Config::default().open(&sim).await.expect("the pool opens");
        let device = device(&pool);
        let mut bytes = Vec::new();
        for block in blocks {
            let data = device.read(block * 4096, 4096).await.expect("the block can be read");
            let first = data.bytes()[0];
            assert!(data.bytes().iter().all(|byte| *byte == first));
            bytes.push(first);
        }
        bytes
    });
    read.expect("the power stays on")
}

async fn done<T>(answer: oneshot::Receiver<Result<T>>) -> Result<T> {
    answer.await.expect("every request is answered")
}

#[test]
fn who_comes_during_a_sync_waits_for_the_next_one() {
    let image = on_a_pool(1, async |world| {
        done(world.write(0, 1)).await.expect("a write");
        world.gate.hold(FaultOp::Sync, None, 1);
        let first = world.flush();
        world.until_waiting(1).await;
        done(world.write(1, 2)).await.expect("a write");
        let second = world.flush();
        world.gate.open();
        done(first).await.expect("a flush");
        done(second).await.expect("a flush");
        world.sim.image_after_cut(CutPlan::KeepNone)
    });
    assert_eq!(read_after(image, &[0, 1]), [1, 2]);
}

#[test]
fn nobody_is_told_that_something_is_durable_before_the_sync_is_done() {
    on_a_pool(1, async |world| {
        done(world.write(0, 1)).await.expect("a write");
        world.gate.hold(FaultOp::Sync, None, 1);
        let syncs = world.pool.counters().syncs;
        let first = world.flush();
        world.until_waiting(1).await;
        // The sync under way covers all that it asks for.
        let mut second = world.flush();
        world.settle().await;
        assert!(second.try_recv().is_err(), "the device has not said so yet");
        world.gate.open();
        done(first).await.expect("a flush");
        done(second).await.expect("a flush");
        assert_eq!(world.pool.counters().syncs, syncs + 1, "no other one was needed");
    });
}

#[test]
fn who_waits_for_a_sync_that_fails_fails_too() {
    on_a_pool(1, async |world| {
        done(world.write(0, 1)).await.expect("a write");
        world.gate.hold(FaultOp::Sync, None, 1);
        let first = world.flush();
        world.until_waiting(1).await;
        done(world.write(1, 2)).await.expect("a write");
        let second = world.flush();
        world.settle().await;
        world.fail_a_sync();
        world.gate.open();
        assert_eq!(done(first).await.expect_err("the sync fails").errno(), EIO);
        let error = done(second).await.expect_err("what it was to cover may be lost");
        assert_eq!(error.kind(), ErrorKind::Poisoned);
    });
}

#[test]
fn a_write_that_is_under_way_when_a_sync_fails_fails_too() {
    on_a_pool(1, async |world| {
        done(world.write(0, 1)).await.expect("a write");
        world.gate.hold(FaultOp::Write, None, 1);
        let write = world.write(1, 2);
        world.until_waiting(1).await;
        world.fail_a_sync();
        assert_eq!(done(world.flush()).await.expect_err("the sync fails").errno(), EIO);
        world.gate.open();
        let error = done(write).await.expect_err("nothing is acknowledged any more");
        assert_eq!(error.kind(), ErrorKind::Poisoned);
    });
}

#[test]
fn a_checkpoint_that_is_under_way_when_a_sync_fails_fails_too() {
    on_a_pool(1, async |world| {
        done(world.write(0, 1)).await.expect("a write");
        let before = world.pool.status().generation;
        // Its nodes are on their way.
        world.gate.hold(FaultOp::Write, None, 1);
        let checkpoint = world.checkpoint();
        world.until_waiting(1).await;
        done(world.write(1, 2)).await.expect("a write");
        world.fail_a_sync();
        assert_eq!(done(world.flush()).await.expect_err("the sync fails").errno(), EIO);
        world.gate.open();
        let error = done(checkpoint).await.expect_err("what it builds on may be lost");
        assert_eq!(error.kind(), ErrorKind::Poisoned);
        assert_eq!(world.pool.status().generation, before);
    });
}

#[test]
fn what_is_written_during_a_checkpoint_is_durable_with_the_next_flush() {
    let mut bytes = vec![1];
    let image = on_a_pool(1, async |world| {
        done(world.write(1, 1)).await.expect("a write");
        let checkpoint = world.checkpoint();
        // One during each of its syncs; nothing of it covers the last.
        loop {
            world.gate.hold(FaultOp::Sync, None, 1);
            world.settle().await;
            if world.gate.waiting() == 0 {
                break;
            }
            let next = bytes.last().expect("there is one") + 1;
            done(world.write(next.into(), next)).await.expect("a write");
            bytes.push(next);
            world.gate.open();
        }
        world.gate.open();
        done(checkpoint).await.expect("a checkpoint");
        done(world.flush()).await.expect("a flush");
        world.sim.image_after_cut(CutPlan::KeepNone)
    });
    assert!(bytes.len() > 2, "{bytes:?}: syncs before and behind the superblock");
    let blocks: Vec<u64> = bytes.iter().map(|byte| u64::from(*byte)).collect();
    assert_eq!(read_after(image, &blocks), bytes);
}

#[test]
fn a_poisoned_pool_writes_nothing() {
    on_a_pool(1, async |world| {
        done(world.write(0, 1)).await.expect("a write");
        world.fail_a_sync();
        done(world.flush()).await.expect_err("the sync fails");
        world.settle().await;
        let events = world.sim.io_count();
        let (write, flush) = (done(world.write(1, 2)).await, done(world.flush()).await);
        for refused in [write, flush, done(world.checkpoint()).await] {
            let error = refused.expect_err("nothing is acknowledged any more");
            assert_eq!(error.kind(), ErrorKind::Poisoned);
        }
        world.settle().await;
        assert_eq!(world.sim.io_count(), events, "writes, discards and syncs");
    });
}

/// A write of the journal's block that was given up halfway and then done again by the next flush
/// would tear what that has made durable.
#[test]
fn a_flush_that_is_given_up_harms_nobody() {
    for seed in 0..80 {
        let image = on_a_pool(seed, async |world| {
            done(world.write(0, 1)).await.expect("a write");
            // Given up while the journal is being written.
            let pool = world.pool.clone();
            let mut given_up = Box::pin(async move { pool.flush().await });
            for _ in 0..2 {
                assert!((&mut given_up).now_or_never().is_none());
                end_of_turn().await;
            }
            drop(given_up);
            done(world.write(1, 2)).await.expect("a write");
            done(world.flush()).await.expect("a flush");
            world.sim.image_after_cut(CutPlan::Garbled(seed))
        });
        assert_eq!(read_after(image, &[0, 1]), [1, 2], "seed {seed}");
    }
}
