//! Memory of a process whose pool has many extents in use.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::future::join_all;
use pando_engine::device::BlockDevice;
use pando_engine::disk::Disk;
use pando_engine::disk::file::{Allocate, PoolFile};
use pando_engine::disk::sim::Rng;
use pando_engine::error::Result as DiskResult;
use pando_engine::pool::Pool;
use pando_engine::runtime::executor::Executor;
use pando_engine::runtime::reactor::ReactorDriver;
use pando_engine::runtime::{Buf, Clock, LocalFuture};
use pando_engine::units::BlockNo;

use crate::rig::{self, RigOptions};

/// What the data of this benchmark begins with, and no structure of a pool.
const MARK: &[u8; 16] = b"data of no value";
const DEPTH: u64 = 64;

/// A disk that keeps the structures of the pool and drops the data: tens of gigabytes would only
/// take time and space here.
struct Forgetful(Rc<dyn Disk>);

impl Clock for Forgetful {
    fn now(&self) -> Duration {
        self.0.now()
    }

    fn sleep(&self, time: Duration) -> LocalFuture<'_, ()> {
        self.0.sleep(time)
    }
}

impl Disk for Forgetful {
    fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }
    fn read(&self, at: BlockNo, buf: Buf) -> LocalFuture<'_, (Buf, DiskResult<()>)> {
        self.0.read(at, buf)
    }
    fn write(&self, at: BlockNo, bufs: Vec<Buf>) -> LocalFuture<'_, DiskResult<()>> {
        if bufs.iter().all(|buf| buf.as_bytes().starts_with(MARK)) {
            return Box::pin(std::future::ready(Ok(())));
        }
        self.0.write(at, bufs)
    }
    fn sync(&self) -> LocalFuture<'_, DiskResult<()>> {
        self.0.sync()
    }
    fn discard(&self, at: BlockNo, count: u64) -> LocalFuture<'_, DiskResult<()>> {
        self.0.discard(at, count)
    }
    fn extend(&self, len_bytes: u64) -> LocalFuture<'_, DiskResult<()>> {
        self.0.extend(len_bytes)
    }
}

/// Resident bytes of this process: all, and those that are no file's.
pub struct Resident {
    /// `VmRSS`.
    pub all: u64,
    /// `RssAnon`.
    pub anonymous: u64,
    /// `VmHWM`: the most that it ever was.
    pub peak: u64,
}

fn resident() -> Result<Resident> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let field = |name: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|rest| rest.trim_matches([':', ' ', '\t', 'k', 'B']).parse().ok());
        kib.map(|kib: u64| kib << 10).with_context(|| format!("{name} in /proc/self/status"))
    };
    Ok(Resident { all: field("VmRSS")?, anonymous: field("RssAnon")?, peak: field("VmHWM")? })
}

/// Maps `extents` single blocks, none beside another, overwrites some of them at random, and says
/// how much memory is resident then, and how long it took.
pub fn measure(path: &Path, cache_bytes: u64, extents: u64) -> Result<(Resident, f64)> {
    let pool_bytes = extents * 4096 / 4 * 5 + (4 << 30);
    let options = RigOptions { cache_bytes, ..RigOptions::sized(pool_bytes) };
    rig::make_file_as(path, options, Allocate::Sparse)?;
    let file = Arc::new(PoolFile::open(path)?);
    let begin = Instant::now();
    let measured = Executor::new(ReactorDriver::new()?).block_on(async {
        let disk: Rc<dyn Disk> = Rc::new(Forgetful(file.disk()));
        let pool =
            Pool::open(disk, |len| file.map_ring(Path::new(rig::RINGS), len), options.open())
                .await?;
        rig::start_background(&pool, options);
        let info = rig::volume(&pool, "v", extents * 8192).await?;
        let device = rig::device(&pool, &info)?;
        write(&device, extents, |index, _| index).await?;
        write(&device, extents / 50, |_, random| random.below(extents)).await?;
        resident()
    })?;
    std::fs::remove_file(path)?;
    Ok((measured, begin.elapsed().as_secs_f64()))
}

/// Writes `count` single blocks: to every other block, the one that `place` says.
async fn write(
    device: &Rc<dyn BlockDevice>,
    count: u64,
    place: impl Fn(u64, &mut Rng) -> u64,
) -> Result<()> {
    let worker = |first: u64| {
        let (place, mut random) = (&place, Rng::new(first + 1));
        async move {
            for index in (first..count).step_by(64) {
                let mut buf = Buf::new(1);
                buf.as_mut_bytes()[..MARK.len()].copy_from_slice(MARK);
                device.write(place(index, &mut random) * 8192, 4096, buf, false).await?;
            }
            anyhow::Ok(())
        }
    };
    join_all((0..DEPTH).map(worker)).await.into_iter().collect()
}
