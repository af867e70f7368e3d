//! Behaviour that depends on the order of I/O, which a gate controls. Freed blocks are not
//! allocated again while a reader pins them, nor before the checkpoint that frees them is durable,
//! however the free blocks of their group are loaded. A merge sees every write before it.

use std::future::Future;
use std::rc::Rc;

use tokio::sync::oneshot;

use crate::device::BlockDevice;
use crate::disk::sim::gate::{Gate, pass_time};
use crate::disk::sim::{FaultOp, SimDisk, SimOptions};
use crate::error::{ErrorKind, Result};
use crate::format::geometry::{PageId, SUPER_SLOTS, Table};
use crate::map::{Fanout, NodeCache, RefChange, RefDelta};
use crate::pool::data::fetch::Hope;
use crate::pool::testing::format;
use crate::pool::{CreateVolume, IoLimits, OpenOptions, Pool, Source};
use crate::runtime::Buf;
use crate::runtime::executor::spawn_local;
use crate::units::{BLOCK_BYTES, BlockNo, Lba, Seqno, VolumeId, to_u32, to_usize};

/// A pool of four groups. Only the test makes checkpoints.
pub(in crate::pool) struct World {
    pub(in crate::pool) sim: SimDisk,
    pub(in crate::pool) gate: Gate,
    pub(in crate::pool) pool: Pool,
    id: VolumeId,
}

impl World {
    /// A pool with a volume of `blocks` blocks, filled with 1, all in the last checkpoint.
    async fn new(sim: &SimDisk, blocks: u64) -> Self {
        Self::opened(sim, blocks, options()).await
    }

    /// The same, opened with `options`.
    pub(in crate::pool) async fn opened(sim: &SimDisk, blocks: u64, options: OpenOptions) -> Self {
        format(sim).await;
        let (sim, gate) = (sim.clone(), Gate::default());
        let pool = open(&sim, &gate, options).await;
        let request = CreateVolume {
            name: "v".into(),
            size_bytes: Some(blocks * BLOCK_BYTES),
            source: Source::Empty,
            snapshot: false,
            read_only: false,
            reservation_bytes: 0,
            growth_limit_bytes: 0,
            io_limits: IoLimits::default(),
            labels: std::collections::BTreeMap::new(),
            created_at: 0,
        };
        let id = pool.create(request).await.unwrap().id;
        let world = Self { sim, gate, pool, id };
        for first in (0..blocks).step_by(200) {
            world.write(first, (blocks - first).min(200), 1).await;
        }
        world.pool.checkpoint().await.unwrap();
        world
    }

    fn device(&self) -> Rc<dyn BlockDevice> {
        self.pool.device(self.id).unwrap()
    }

    pub(in crate::pool) async fn write(&self, first: u64, blocks: u64, byte: u8) {
        let mut buf = Buf::new(to_usize(blocks));
        buf.as_mut_bytes().fill(byte);
        let len = to_u32(blocks * BLOCK_BYTES);
        self.device().write(first * BLOCK_BYTES, len, buf, false).await.unwrap();
    }

    /// Starts a read of one block in a task.
    fn reader(&self, lba: u64) -> oneshot::Receiver<Result<Vec<u8>>> {
        let device = self.device();
        start(async move {
            let read = device.read(lba * BLOCK_BYTES, 4096).await;
            read.map(|data| data.bytes().to_vec())
        })
    }

    pub(in crate::pool) async fn until_waiting(&self) {
        self.gate.until_waiting(&self.sim.disk(), 1).await;
    }

    /// Runs everything that the gate does not hold.
    pub(in crate::pool) async fn settle(&self) {
        for _ in 0..200 {
            pass_time(&self.sim.disk()).await;
        }
    }

    /// The blocks that the volume is mapped to.
    pub(in crate::pool) async fn blocks(&self) -> Vec<BlockNo> {
        let end = Lba::new(self.device().size_bytes() / BLOCK_BYTES);
        let (mut blocks, mut from) = (Vec::new(), Lba::new(0));
        while from < end {
            let (extents, next) = self.pool.extents(self.id, from, end).await.unwrap();
            blocks.extend(extents.iter().flat_map(|e| (0..e.len).map(|i| e.block.plus(i))));
            from = next;
        }
        blocks
    }

    fn root(&self) -> BlockNo {
        let inner = self.pool.core.lock();
        inner.state.volume(self.id).unwrap().entry.root.unwrap().ptr.block
    }

    fn place_of_the_next_superblock(&self) -> BlockNo {
        let inner = self.pool.core.lock();
        let next = u64::from(inner.generation.next().get());
        inner.state.geometry.super_places(next % SUPER_SLOTS)[0]
    }

    pub(in crate::pool) fn is_free(&self, block: BlockNo) -> bool {
        self.pool.core.lock().state.space.is_free(block)
    }

    /// Reopens the pool, so that nothing of it is cached.
    async fn reopen(&mut self) {
        self.pool.close().await.unwrap();
        self.pool = open(&self.sim, &self.gate, options()).await;
    }

    /// A block of the volume in a group whose free blocks are not loaded, and that group.
    async fn block_of_a_group_not_loaded(&self) -> (BlockNo, u32) {
        let blocks = self.blocks().await;
        let inner = self.pool.core.lock();
        let group = |block| to_u32(inner.state.geometry.locate(block).unwrap().0);
        let found = blocks.iter().find(|block| !inner.state.space.is_loaded(group(**block)));
        let block = *found.expect("the volume has blocks in several groups");
        (block, group(block))
    }
}

pub(in crate::pool) fn options() -> OpenOptions {
    OpenOptions { cache_bytes: 4 << 20, ..OpenOptions::default() }
}

async fn open(sim: &SimDisk, gate: &Gate, options: OpenOptions) -> Pool {
    let disk = gate.before(sim.disk());
    Pool::open(disk, |len| sim.map_ring(len), options).await.unwrap()
}

/// Runs a future in a task; the receiver gets its result.
pub(in crate::pool) fn start<T: 'static>(
    work: impl Future<Output = T> + 'static,
) -> oneshot::Receiver<T> {
    let (done, answer) = oneshot::channel();
    spawn_local(async move { drop(done.send(work.await)) });
    answer
}

pub(in crate::pool) fn run<Fut: Future<Output = ()>>(test: impl FnOnce(SimDisk) -> Fut) {
    let sim = SimDisk::new(1, 4096, SimOptions::default());
    sim.run(test(sim.clone())).expect("the power stays on");
}

#[test]
fn what_a_reader_has_found_is_kept_for_it() {
    run(|sim| async move {
        let world = World::new(&sim, 8).await;
        let old = world.blocks().await[0];
        world.gate.hold(FaultOp::Read, Some(old), 1);
        let reader = world.reader(0);
        world.until_waiting().await;
        world.write(0, 8, 2).await;
        world.pool.checkpoint().await.unwrap();
        assert!(!world.is_free(old), "somebody is about to read {old}");
        world.gate.open();
        assert_eq!(reader.await.unwrap().unwrap(), [1; 4096]);
        assert!(world.is_free(old), "nobody reads {old} any more");
    });
}

/// A task that needs a missing node looks it up first and reads it later.
#[test]
fn nodes_are_kept_for_whoever_has_looked_them_up() {
    type Need = fn(&World) -> oneshot::Receiver<Result<()>>;
    let needs: [(&str, Need); 6] = [
        ("read", |world| {
            let reader = world.reader(0);
            start(async move { reader.await.unwrap().map(drop) })
        }),
        ("discard", |world| {
            let device = world.device();
            start(async move { device.discard(0, 4096, false).await })
        }),
        ("write", |world| {
            let device = world.device();
            start(async move { device.write(0, 4096, Buf::zeroed(1), false).await })
        }),
        ("runs", |world| {
            let device = world.device();
            start(async move { device.mapped_runs(0, 4096, 9).await.map(drop) })
        }),
        ("changes", |world| {
            let (pool, id) = (world.pool.clone(), world.id);
            start(async move { pool.changed(None, id, 0, 9).await.map(drop) })
        }),
        ("scrub", |world| {
            let (pool, root) = (world.pool.clone(), world.root());
            start(async move { pool.scrub(root.get(), 1).await.map(drop) })
        }),
    ];
    for (name, need) in needs {
        run(|sim| async move {
            let mut world = World::new(&sim, 8).await;
            world.reopen().await;
            let root = world.root();
            world.gate.hold(FaultOp::Read, Some(root), 1);
            let needed = need(&world);
            world.until_waiting().await;
            world.pool.delete(world.id).await.unwrap();
            world.pool.checkpoint().await.unwrap();
            assert!(!world.is_free(root), "{name}: somebody is about to read {root}");
            world.gate.open();
            match needed.await.unwrap() {
                Ok(()) => assert_eq!(name, "scrub"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{name}"),
            }
            assert!(world.is_free(root), "{name}: nobody reads {root} any more");
        });
    }
}

/// The space map of dm-thin allocated blocks in use (4feaef830de7), because it consulted only a
/// part of the structures that record their use.
#[test]
fn what_waits_is_not_loaded_as_free() {
    run(|sim| async move {
        let mut world = World::new(&sim, 1500).await;
        world.reopen().await;
        let (block, group) = world.block_of_a_group_not_loaded().await;
        let reader = world.pool.pin();
        world.pool.delete(world.id).await.unwrap();
        world.pool.checkpoint().await.unwrap();
        world.pool.load_group(group).await.unwrap();
        assert!(!world.is_free(block), "somebody may be about to read {block}");
        drop(reader);
        assert!(world.is_free(block));
    });
}

#[test]
fn a_group_is_not_loaded_from_tables_that_are_replaced_meanwhile() {
    run(|sim| async move {
        let mut world = World::new(&sim, 1500).await;
        world.reopen().await;
        let (block, group) = world.block_of_a_group_not_loaded().await;
        let geometry = world.pool.core.lock().state.geometry;
        let counts = geometry.page_place(PageId { group, table: Table::Refs, page: 0 }, 0);
        world.gate.hold(FaultOp::Read, Some(counts), 1);
        let pool = world.pool.clone();
        let loaded = start(async move { pool.load_group(group).await });
        world.until_waiting().await;
        world.pool.delete(world.id).await.unwrap();
        world.pool.checkpoint().await.unwrap();
        world.gate.open();
        loaded.await.unwrap().unwrap();
        assert!(world.is_free(block), "{block} was freed before its group was loaded");
        assert_eq!(world.pool.core.lock().state.wrong_sums(), Vec::<String>::new());
    });
}

/// Neither while the superblock is being written nor while it is only in the device's cache.
#[test]
fn nothing_is_free_before_the_checkpoint_that_frees_it_is_durable() {
    run(|sim| async move {
        let world = World::new(&sim, 8).await;
        let old = world.blocks().await[0];
        world.write(0, 8, 2).await;
        world.gate.hold(FaultOp::Write, Some(world.place_of_the_next_superblock()), 1);
        let pool = world.pool.clone();
        let checkpoint = start(async move { pool.checkpoint().await });
        world.until_waiting().await;
        world.gate.open();
        world.gate.hold(FaultOp::Sync, None, 1);
        assert!(!world.is_free(old), "a crash brings back what stands on {old}");
        world.until_waiting().await;
        assert!(!world.is_free(old), "a crash may bring back what stands on {old}");
        world.gate.open();
        checkpoint.await.unwrap().unwrap();
        assert!(world.is_free(old));
    });
}

#[test]
fn a_group_is_not_loaded_from_tables_that_are_not_durable() {
    run(|sim| async move {
        let mut world = World::new(&sim, 1500).await;
        world.reopen().await;
        let (block, group) = world.block_of_a_group_not_loaded().await;
        world.pool.delete(world.id).await.unwrap();
        world.gate.hold(FaultOp::Write, Some(world.place_of_the_next_superblock()), 1);
        let pool = world.pool.clone();
        let checkpoint = start(async move { pool.checkpoint().await });
        world.until_waiting().await;
        world.pool.load_group(group).await.unwrap();
        assert!(!world.is_free(block), "a crash brings back what stands on {block}");
        world.gate.open();
        checkpoint.await.unwrap().unwrap();
        assert!(world.is_free(block));
    });
}

/// If the map node needed to check a merge was evicted, the merge is repeated.
#[test]
fn a_merge_whose_map_was_evicted_is_done_again() {
    run(|sim| async move {
        let world = World::new(&sim, 8).await;
        world.gate.hold(FaultOp::Write, None, 1);
        let device = world.device();
        let merge = start(async move { device.write(0, 512, Buf::zeroed(1), false).await });
        world.until_waiting().await;
        world.write(0, 1, 2).await;
        world.pool.checkpoint().await.unwrap();
        {
            let mut inner = world.pool.core.lock();
            assert_eq!(inner.state.cache.dirty_len(), 0);
            inner.state.cache = NodeCache::new(64, inner.state.uuid, Fanout::FULL);
        }
        world.gate.open();
        merge.await.unwrap().unwrap();
        let read = world.reader(0).await.unwrap().unwrap();
        assert!(read[..512].iter().all(|byte| *byte == 0));
        assert!(read[512..].iter().all(|byte| *byte == 2), "it was written meanwhile");
    });
}

#[test]
fn nodes_stay_in_memory_until_they_are_written() {
    run(|sim| async move {
        let world = World::new(&sim, 8).await;
        world.write(0, 8, 2).await;
        world.gate.hold(FaultOp::Write, Some(world.root()), 1);
        let pool = world.pool.clone();
        let checkpoint = start(async move { pool.checkpoint().await });
        world.until_waiting().await;
        assert!(world.pool.core.lock().state.cache.dirty_len() > 0, "it could be evicted");
        world.gate.open();
        checkpoint.await.unwrap().unwrap();
        assert_eq!(world.pool.core.lock().state.cache.dirty_len(), 0);
    });
}

/// A reader pins all blocks freed since it started. Each checkpoint of a full pool needs blocks for
/// its catalogue; when none are left it must wait, not fail.
#[test]
fn a_checkpoint_of_a_full_pool_waits_for_readers() {
    run(|sim| async move {
        let world = World::new(&sim, 8).await;
        let groups = world.pool.core.lock().state.geometry.groups();
        for group in 0..to_u32(groups) {
            world.pool.load_group(group).await.unwrap();
        }
        let reader = world.pool.pin();
        loop {
            let mut inner = world.pool.core.lock();
            let Some(more @ 1..) = inner.state.space.free().checked_sub(2) else { break };
            inner.state.space.take(more).expect("all free blocks are in memory");
        }
        let pool = world.pool.clone();
        let mut checkpoints = start(async move {
            for _ in 0..4 {
                pool.checkpoint().await?;
            }
            Ok(())
        });
        world.settle().await;
        assert!(checkpoints.try_recv().is_err(), "two have blocks, the third waits");
        drop(reader);
        let done: Result<()> = checkpoints.await.unwrap();
        done.expect("the blocks of the earlier ones are back");
    });
}

/// A request for space waits while a checkpoint may free some, and is refused otherwise.
#[test]
fn who_needs_space_waits_as_long_as_there_is_hope() {
    type Plant = fn(&World);
    let hopes: [(&str, Plant); 4] = [
        ("changes", |world| {
            let root = world.root();
            let change = RefDelta::node(root, Seqno::new(0), RefChange::NodeUp);
            let back = RefDelta { change: RefChange::NodeMoved, ..change };
            world.pool.core.lock().state.log.extend([change, back]);
        }),
        ("deletions", |world| world.pool.core.lock().drops_pending = 1),
        ("readers", |world| {
            let mut inner = world.pool.core.lock();
            let reader = inner.state.reuse.pin();
            let run = inner.state.space.take(1).unwrap();
            inner.state.space.recorded(run);
            inner.state.reuse.freed(vec![run]);
            // Unpinned without recycling: the blocks come back at the next recycling.
            inner.state.reuse.unpin(reader);
        }),
        ("a discard", |world| {
            let mut inner = world.pool.core.lock();
            let run = inner.state.space.take(1).unwrap();
            inner.state.reuse.begin_discard(run);
        }),
    ];
    for (name, hope) in hopes {
        run(|sim| async move {
            let world = World::new(&sim, 8).await;
            world.pool.checkpoint().await.unwrap();
            let published = world.pool.core.lock().published;
            let error = world.pool.await_space(published, Hope::Changes).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoSpace, "nothing is under way");
            world
                .pool
                .await_space(published - 1, Hope::Changes)
                .await
                .expect("there was one since");
            hope(&world);
            let pool = world.pool.clone();
            let mut waits = start(async move { pool.await_space(published, Hope::Changes).await });
            world.settle().await;
            assert!(waits.try_recv().is_err(), "{name}: it waits");
            world.pool.checkpoint().await.unwrap();
            waits.await.unwrap().unwrap();
        });
    }
    run(|sim| async move {
        let world = World::new(&sim, 8).await;
        world.write(0, 8, 2).await;
        let published = world.pool.core.lock().published;
        world.gate.hold(FaultOp::Write, Some(world.root()), 1);
        let pool = world.pool.clone();
        let checkpoint = start(async move { pool.checkpoint().await });
        world.until_waiting().await;
        assert!(world.pool.core.lock().state.log.is_empty(), "the checkpoint has it");
        let pool = world.pool.clone();
        let mut waits = start(async move { pool.await_space(published, Hope::Changes).await });
        world.settle().await;
        assert!(waits.try_recv().is_err(), "it waits for the checkpoint under way");
        world.gate.open();
        checkpoint.await.unwrap().unwrap();
        waits.await.unwrap().unwrap();
    });
}

/// Blocks of writes under way will be settled by a checkpoint. Only a request that holds no blocks
/// itself waits for that; otherwise it could wait for its own.
#[test]
fn who_has_no_blocks_waits_for_the_writes_of_others() {
    run(|sim| async move {
        let world = World::new(&sim, 8).await;
        world.gate.hold(FaultOp::Write, None, 1);
        let device = world.device();
        let write = start(async move { device.write(0, 4096, Buf::zeroed(1), false).await });
        world.until_waiting().await;
        let published = world.pool.core.lock().published;
        let error = world.pool.await_space(published, Hope::Changes).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        let pool = world.pool.clone();
        let mut waits = start(async move { pool.await_space(published, Hope::Writes).await });
        world.settle().await;
        assert!(waits.try_recv().is_err(), "it waits for the write under way");
        world.gate.open();
        write.await.unwrap().unwrap();
        world.pool.checkpoint().await.unwrap();
        waits.await.unwrap().unwrap();
    });
}

/// A task that waits while a checkpoint is under way must not request another one. Otherwise a
/// request that no checkpoint helps would cause checkpoints without end.
#[test]
fn who_waits_for_a_checkpoint_under_way_asks_for_no_other() {
    run(|sim| async move {
        let world = World::new(&sim, 8).await;
        let background = world.pool.clone();
        spawn_local(async move { background.run_background().await });
        world.write(0, 8, 2).await;
        world.gate.hold(FaultOp::Write, Some(world.root()), 1);
        world.pool.core.want_checkpoint();
        world.until_waiting().await;
        let published = world.pool.core.lock().published;
        let pool = world.pool.clone();
        let waits = start(async move { pool.await_published(published).await });
        world.settle().await;
        world.gate.open();
        waits.await.unwrap().unwrap();
        world.settle().await;
        assert_eq!(world.pool.core.lock().published, published + 1);
    });
}
