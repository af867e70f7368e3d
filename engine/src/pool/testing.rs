//! A pool on a simulated disk with a model beside it, for tests of the operations that walk a pool.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::inspect::durable::Durable;
use super::{CreateVolume, FormatOptions, IoLimits, OpenOptions, Pool, Source};
use crate::disk::Disk;
use crate::disk::sim::{Rng, SimDisk, SimImage, SimOptions};
use crate::error::Result;
use crate::map::Fanout;
use crate::pool::checkpoint::load;
use crate::runtime::Buf;
use crate::runtime::executor::spawn_local;
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, VolumeId, to_u64, to_usize};

/// LBAs of a volume in these tests.
pub(super) const LBAS: u64 = 300;

/// Content of a volume: for each LBA the number of the write that it holds.
pub(super) type Content = BTreeMap<u64, u64>;

/// A pool and its expected content.
pub(super) struct World {
    pub(super) pool: Pool,
    pub(super) volumes: BTreeMap<VolumeId, Content>,
    random: Rng,
    stamp: u64,
    born: u64,
}

pub(super) async fn format(sim: &SimDisk) {
    let disk = sim.disk();
    let options = FormatOptions {
        size_bytes: disk.len_bytes(),
        journal_bytes: Some(32 * BLOCK_BYTES),
        force: false,
        uuid: [9; 16],
    };
    Pool::format(&disk, &options).await.unwrap();
}

/// Opens the pool with small nodes, so that maps are deep.
pub(super) async fn open(sim: &SimDisk) -> Result<Pool> {
    let options = OpenOptions {
        cache_bytes: 4 << 20,
        fanout: Fanout { leaf_max: 6, inner_max: 5 },
        ..OpenOptions::default()
    };
    let pool = Pool::open(sim.disk(), |len| sim.map_ring(len), options).await?;
    let background = pool.clone();
    spawn_local(async move { background.run_background().await });
    Ok(pool)
}

/// The block that write number `stamp` puts at `lba`.
pub(super) fn block_of(stamp: u64, lba: u64) -> [u8; BLOCK_SIZE] {
    let mut block = [0; BLOCK_SIZE];
    for (at, out) in (0u64..).zip(block.chunks_exact_mut(8)) {
        out.copy_from_slice(&(stamp ^ (lba << 20) ^ (at << 40)).to_le_bytes());
    }
    block
}

impl World {
    pub(super) async fn new(sim: &SimDisk, seed: u64) -> Self {
        format(sim).await;
        let pool = open(sim).await.unwrap();
        Self { pool, volumes: BTreeMap::new(), random: Rng::new(seed), stamp: 0, born: 0 }
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    /// A random volume.
    pub(super) fn any(&mut self) -> Option<VolumeId> {
        let count = to_u64(self.volumes.len());
        let at = (count > 0).then(|| self.below(count))?;
        self.volumes.keys().nth(to_usize(at)).copied()
    }

    pub(super) async fn create(&mut self, source: Option<VolumeId>, snapshot: bool) -> VolumeId {
        self.born += 1;
        let request = CreateVolume {
            name: format!("v{}", self.born),
            size_bytes: source.is_none().then_some(LBAS * BLOCK_BYTES - 512),
            source: source.map_or(Source::Empty, Source::Volume),
            snapshot,
            read_only: false,
            reservation_bytes: 0,
            growth_limit_bytes: 0,
            io_limits: IoLimits::default(),
            labels: BTreeMap::new(),
            created_at: self.born,
        };
        let id = self.pool.create(request).await.unwrap().id;
        let content = source.map_or_else(Content::new, |source| self.volumes[&source].clone());
        self.volumes.insert(id, content);
        id
    }

    pub(super) async fn write(&mut self, id: VolumeId, lba: u64, len: u64) {
        self.stamp += 1;
        let mut buf = Buf::new(to_usize(len));
        let content = self.volumes.get_mut(&id).unwrap();
        for (lba, out) in (lba..).zip(buf.as_mut_bytes().chunks_exact_mut(BLOCK_SIZE)) {
            out.copy_from_slice(&block_of(self.stamp, lba));
            content.insert(lba, self.stamp);
        }
        let bytes = u32::try_from(len * BLOCK_BYTES).unwrap();
        let device = self.pool.device(id).unwrap();
        device.write(lba * BLOCK_BYTES, bytes, buf, false).await.unwrap();
    }

    pub(super) async fn discard(&mut self, id: VolumeId, lba: u64, len: u64) {
        let device = self.pool.device(id).unwrap();
        device.discard(lba * BLOCK_BYTES, len * BLOCK_BYTES, false).await.unwrap();
        self.volumes.get_mut(&id).unwrap().retain(|at, _| !(lba..lba + len).contains(at));
    }

    pub(super) async fn delete(&mut self, id: VolumeId) {
        self.pool.delete(id).await.unwrap();
        self.volumes.remove(&id);
    }

    /// One random operation.
    pub(super) async fn step(&mut self) {
        let Some(id) = self.any() else {
            self.create(None, false).await;
            return;
        };
        let (lba, len) = (self.below(LBAS - 20), 1 + self.below(16));
        let frozen = self.pool.get(id).unwrap().snapshot;
        match self.below(40) {
            0 if self.volumes.len() < 6 => drop(self.create(None, false).await),
            1..=3 if self.volumes.len() < 8 => {
                let snapshot = self.below(3) == 0;
                self.create(Some(id), snapshot).await;
            }
            4 => self.delete(id).await,
            5 => self.pool.checkpoint().await.unwrap(),
            6 => self.pool.flush().await.unwrap(),
            7..=10 if !frozen => self.discard(id, lba, len).await,
            _ if !frozen => self.write(id, lba, len).await,
            _ => {}
        }
    }

    pub(super) async fn steps(&mut self, count: u32) {
        for _ in 0..count {
            self.step().await;
        }
    }

    /// Makes checkpoints until deleted maps have freed all their blocks.
    pub(super) async fn settle(&self) {
        self.pool.checkpoint().await.unwrap();
        while self.pool.status().deletions_pending > 0 {
            self.pool.checkpoint().await.unwrap();
        }
    }

    /// Number of data blocks that only this volume maps.
    pub(super) fn exclusive(&self, id: VolumeId) -> u64 {
        let pairs = |content: &Content| -> BTreeSet<(u64, u64)> {
            content.iter().map(|(lba, stamp)| (*stamp, *lba)).collect()
        };
        let mut mine = pairs(&self.volumes[&id]);
        for content in self.volumes.iter().filter(|(other, _)| **other != id).map(|(_, c)| c) {
            for pair in pairs(content) {
                mine.remove(&pair);
            }
        }
        to_u64(mine.len())
    }

    /// The last checkpoint.
    pub(super) async fn durable(&self) -> Durable {
        let superblock = self.pool.core.checkpointer.lock().await.superblock.clone();
        Durable::load(self.pool.disk(), superblock).await.unwrap()
    }

    /// Number of free blocks in the last checkpoint.
    pub(super) async fn free(&self) -> u64 {
        self.durable().await.found.catalogue.groups.iter().map(|g| u64::from(g.free)).sum()
    }
}

/// The checkpoint of an image while no pool is open.
pub(super) async fn durable_of(disk: &Rc<dyn Disk>) -> Durable {
    let superblock = load::superblock(disk).await.unwrap();
    Durable::load(disk, superblock).await.unwrap()
}

/// An image of a pool after `steps` random operations, closed cleanly, and its content.
pub(super) fn image(seed: u64, blocks: u64, steps: u32) -> (SimImage, BTreeMap<VolumeId, Content>) {
    let sim = SimDisk::new(seed, blocks, SimOptions::default());
    let content = sim.run(async {
        let mut world = World::new(&sim, seed).await;
        world.steps(steps).await;
        world.pool.close().await.unwrap();
        world.volumes
    });
    (sim.image_after_kill(seed), content.unwrap())
}
