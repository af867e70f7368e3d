//! A pool to measure, in memory or on a file, driven by one thread.

use std::future::Future;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use pando_engine::device::BlockDevice;
use pando_engine::disk::Disk;
use pando_engine::disk::file::{Allocate, PoolFile};
use pando_engine::disk::mem::MemDisk;
use pando_engine::error::Result;
use pando_engine::pool::{
    CreateVolume, FormatOptions, IoLimits, OpenOptions, Pool, Source, VolumeInfo,
};
use pando_engine::runtime::Buf;
use pando_engine::runtime::executor::{Executor, spawn_local};
use pando_engine::runtime::park::ThreadDriver;
use pando_engine::runtime::reactor::ReactorDriver;
use pando_engine::units::BlockNo;

/// How to make a pool for a benchmark.
#[derive(Clone, Copy, Debug)]
pub struct RigOptions {
    /// Bytes of the pool.
    pub pool_bytes: u64,
    /// Bytes of the cache.
    pub cache_bytes: u64,
    /// Bytes of the journal; `None` is the default.
    pub journal_bytes: Option<u64>,
    /// Make checkpoints in the background.
    pub background: bool,
}

impl RigOptions {
    /// A pool of this size with a cache that holds all of its metadata.
    #[must_use]
    pub const fn sized(pool_bytes: u64) -> Self {
        Self { pool_bytes, cache_bytes: 1 << 30, journal_bytes: None, background: true }
    }

    fn format(&self) -> FormatOptions {
        FormatOptions {
            size_bytes: self.pool_bytes,
            journal_bytes: self.journal_bytes,
            force: true,
            uuid: [1; 16],
        }
    }

    pub(crate) fn open(&self) -> OpenOptions {
        OpenOptions { cache_bytes: self.cache_bytes, ..OpenOptions::default() }
    }
}

/// Starts what the pool does in the background, if `options` want it.
pub(crate) fn start_background(pool: &Pool, options: RigOptions) {
    if !options.background {
        return;
    }
    let background = pool.clone();
    spawn_local(async move { background.run_background().await });
}

/// Runs `work` on a new pool in memory.
pub fn in_memory<F: Future>(
    options: RigOptions,
    work: impl FnOnce(Pool) -> F,
) -> Result<F::Output> {
    Executor::new(ThreadDriver::new()).block_on(async {
        let memory = MemDisk::new(options.pool_bytes);
        let disk = memory.disk();
        touch(&disk).await?;
        Pool::format(&disk, &options.format()).await?;
        let pool = Pool::open(disk, |len| memory.map_ring(len), options.open()).await?;
        start_background(&pool, options);
        Ok(work(pool).await)
    })
}

/// Writes every block once, so that no later write pays for memory.
async fn touch(disk: &Rc<dyn Disk>) -> Result<()> {
    const BLOCKS: usize = 256;
    let chunk = BLOCKS as u64;
    for at in (0..disk.len_bytes() / 4096 / chunk * chunk).step_by(BLOCKS) {
        disk.write(BlockNo::new(at), vec![Buf::zeroed(BLOCKS)]).await?;
    }
    Ok(())
}

/// Makes a pool on a file, all of it allocated and written, so that the file costs what a device
/// does.
pub fn make_file(path: &Path, options: RigOptions) -> Result<()> {
    make_file_as(path, options, Allocate::Write)
}

/// Makes a pool on a file whose space is taken as `allocate` says.
pub fn make_file_as(path: &Path, options: RigOptions, allocate: Allocate) -> Result<()> {
    let file = Arc::new(PoolFile::create(path, options.pool_bytes, allocate)?);
    Executor::new(ReactorDriver::new()?).block_on(async {
        let disk: Rc<dyn Disk> = file.disk();
        Pool::format(&disk, &options.format()).await
    })
}

/// Where the memory of journals is: in memory, as with the daemon.
pub const RINGS: &str = "/dev/shm/pando-bench";

/// Runs `work` on the pool in a file.
pub fn on_file<F: Future>(
    path: &Path,
    options: RigOptions,
    work: impl FnOnce(Pool) -> F,
) -> Result<F::Output> {
    let file = Arc::new(PoolFile::open(path)?);
    Executor::new(ReactorDriver::new()?).block_on(async {
        let disk = file.disk();
        let pool =
            Pool::open(disk, |len| file.map_ring(Path::new(RINGS), len), options.open()).await?;
        start_background(&pool, options);
        Ok(work(pool).await)
    })
}

/// An empty volume.
pub async fn volume(pool: &Pool, name: &str, size_bytes: u64) -> Result<VolumeInfo> {
    pool.create(request(name, Some(size_bytes), Source::Empty)).await
}

/// A clone.
pub async fn clone(pool: &Pool, name: &str, source: &VolumeInfo) -> Result<VolumeInfo> {
    pool.create(request(name, None, Source::Volume(source.id))).await
}

fn request(name: &str, size_bytes: Option<u64>, source: Source) -> CreateVolume {
    CreateVolume {
        name: name.into(),
        size_bytes,
        source,
        snapshot: false,
        read_only: false,
        reservation_bytes: 0,
        growth_limit_bytes: 0,
        io_limits: IoLimits::default(),
        labels: std::collections::BTreeMap::new(),
        created_at: 0,
    }
}

/// The volume as a device.
pub fn device(pool: &Pool, info: &VolumeInfo) -> Result<Rc<dyn BlockDevice>> {
    pool.device(info.id)
}
