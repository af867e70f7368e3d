//! Load on a block device: so many requests, so many at a time, all from one thread.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pando_engine::device::BlockDevice;
use pando_engine::disk::Disk;
use pando_engine::disk::sim::Rng;
use pando_engine::error::Result;
use pando_engine::runtime::Buf;
use pando_engine::units::BlockNo;

/// Bytes of each request.
pub const REQUEST: u32 = 4096;

/// What the requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Random reads.
    Read,
    /// Random writes.
    Write,
    /// Random writes, each flushed before the next.
    WriteFlush,
    /// Writes to one block after the other.
    Sequential,
}

/// Runs `count` requests of 4 KiB over the first `span` bytes, `depth` at a time. Returns how long
/// they took together.
pub async fn run(
    device: &Rc<dyn BlockDevice>,
    kind: Kind,
    span: u64,
    depth: usize,
    count: u64,
) -> Result<Duration> {
    let next = Cell::new(0u64);
    let begin = Instant::now();
    let worker = |seed: u64| {
        let next = &next;
        async move {
            let mut random = Rng::new(seed);
            while next.get() < count {
                let index = next.replace(next.get() + 1);
                let block = match kind {
                    Kind::Sequential => index % (span / u64::from(REQUEST)),
                    _ => random.below(span / u64::from(REQUEST)),
                };
                let offset = block * u64::from(REQUEST);
                match kind {
                    Kind::Read => drop(device.read(offset, REQUEST).await?),
                    _ => device.write(offset, REQUEST, filled(index), false).await?,
                }
                if kind == Kind::WriteFlush {
                    device.flush().await?;
                }
            }
            Ok(())
        }
    };
    let workers = (0..depth as u64).map(|i| worker(i + 1));
    join_all(workers).await.into_iter().collect::<Result<()>>()?;
    Ok(begin.elapsed())
}

/// A block whose content nobody can take for another's.
fn filled(stamp: u64) -> Buf {
    let mut buf = Buf::new(1);
    for (word, bytes) in (0u64..).zip(buf.as_mut_bytes().chunks_exact_mut(512)) {
        bytes[..8].copy_from_slice(&(stamp ^ word << 48).to_le_bytes());
    }
    buf
}

/// Writes the first `span` bytes in large requests.
pub async fn fill(device: &Rc<dyn BlockDevice>, span: u64) -> Result<()> {
    const CHUNK: u64 = 1 << 20;
    for at in (0..span).step_by(1 << 20) {
        let len = CHUNK.min(span - at);
        let mut buf = Buf::new(usize::try_from(len / 4096).unwrap_or(1));
        for (index, block) in (at / 4096..).zip(buf.as_mut_bytes().chunks_exact_mut(4096)) {
            block[..8].copy_from_slice(&index.to_le_bytes());
        }
        device.write(at, u32::try_from(len).unwrap_or(0), buf, false).await?;
    }
    device.flush().await
}

/// The same load on a bare disk, for comparison: no map, no checksums, no journal.
pub async fn run_raw(
    disk: &Rc<dyn Disk>,
    kind: Kind,
    span: u64,
    depth: usize,
    count: u64,
) -> Result<Duration> {
    let next = Cell::new(0u64);
    let begin = Instant::now();
    let worker = |seed: u64| {
        let next = &next;
        async move {
            let mut random = Rng::new(seed);
            while next.get() < count {
                let index = next.replace(next.get() + 1);
                let at = BlockNo::new(random.below(span / u64::from(REQUEST)));
                match kind {
                    Kind::Read => disk.read(at, Buf::new(1)).await.1?,
                    _ => disk.write(at, vec![filled(index)]).await?,
                }
                if kind == Kind::WriteFlush {
                    disk.sync().await?;
                }
            }
            Ok(())
        }
    };
    let workers = (0..depth as u64).map(|i| worker(i + 1));
    join_all(workers).await.into_iter().collect::<Result<()>>()?;
    Ok(begin.elapsed())
}
