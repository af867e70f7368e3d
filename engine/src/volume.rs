//! L6: a volume as a block device. Splits requests at block edges: whole blocks go straight to
//! fresh blocks; a partly covered block is read, merged and redirected, and merged again if it
//! has changed meanwhile, so that of two racing writes to one block neither is lost. Requests wait
//! here for the limits of the volume, before anything is done for them; flushes never do.

use std::rc::Rc;
use std::sync::Arc;

use crate::device::{BlockDevice, MappedRun, ReadData, ZeroFlags, check_payload, check_range};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::{LiveVolume, Outcome, Pool};
use crate::runtime::{Buf, LocalFuture};
use crate::units::{
    BLOCK_BYTES, BLOCK_SIZE, BlockNo, Lba, VolumeId, blocks_for, to_u32, to_u64, to_usize,
};

/// Zeros that are written as data at once, for `no_hole`.
const ZERO_CHUNK_BLOCKS: u64 = 256;

/// A volume, for one thread.
pub struct Volume {
    pool: Pool,
    id: VolumeId,
    live: Arc<LiveVolume>,
}

/// The part of a block that a request covers.
#[derive(Clone, Copy)]
struct Edge {
    lba: Lba,
    from: usize,
    to: usize,
}

impl Pool {
    /// The volume as a block device for this thread.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn device(&self, id: VolumeId) -> Result<Rc<dyn BlockDevice>> {
        Ok(Rc::new(Volume::open(self, id)?))
    }
}

impl Volume {
    /// A device for a volume or snapshot that exists.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn open(pool: &Pool, id: VolumeId) -> Result<Self> {
        let live = pool.live(id)?;
        Ok(Self { pool: pool.clone(), id, live })
    }

    /// Lets a request that moves `bytes` pass when the limits of the volume allow it.
    async fn pass(&self, bytes: u64) {
        let throttle = &self.live.throttle;
        if throttle.is_limited() {
            throttle.pass(self.pool.disk().as_ref(), bytes).await;
        }
    }

    /// Size in bytes of a volume that exists.
    fn size(&self) -> Result<u64> {
        if self.live.is_deleted() {
            return Err(Error::new(ErrorKind::NotFound, format!("{} was deleted", self.id)));
        }
        Ok(self.live.size_bytes())
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.size()?;
        if self.live.refuses_writes() {
            return Err(Error::new(ErrorKind::ReadOnly, format!("{} is read-only", self.id)));
        }
        check_range(size, offset, len).map(|_| ())
    }

    async fn do_read(&self, offset: u64, len: u32) -> Result<ReadData> {
        check_payload(len)?;
        check_range(self.size()?, offset, u64::from(len))?;
        self.pool.count_read(u64::from(len));
        let start = to_usize(offset % BLOCK_BYTES);
        if len == 0 {
            return Ok(ReadData { buf: Buf::zeroed(1), start: 0, len: 0 });
        }
        let len = to_usize(u64::from(len));
        let blocks = blocks_for(to_u64(start + len));
        let lba = Lba::new(offset / BLOCK_BYTES);
        let (buf, _) = self.pool.read_blocks(self.id, lba, blocks).await?;
        Ok(ReadData { buf, start, len })
    }

    async fn do_write(&self, offset: u64, len: u32, mut buf: Buf, fua: bool) -> Result<()> {
        check_payload(len)?;
        self.check_write(offset, u64::from(len))?;
        self.pool.count_write(u64::from(len));
        if len == 0 {
            return Ok(());
        }
        let start = to_usize(offset % BLOCK_BYTES);
        let end = start + to_usize(u64::from(len));
        let blocks = blocks_for(to_u64(end));
        if buf.block_count() != blocks {
            return Err(Error::invalid("buffer does not have the blocks of the request"));
        }
        let lba = Lba::new(offset / BLOCK_BYTES);
        let edges = edges(lba, start, end);
        if edges.is_empty() {
            self.pool.write_blocks(self.id, lba, buf, Vec::new()).await?;
        } else {
            loop {
                let expected = self.merge(&mut buf, lba, &edges).await?;
                // Kept for another round, since the write takes the buffer with it.
                let again = copy_of(&buf);
                match self.pool.write_blocks(self.id, lba, buf, expected).await? {
                    Outcome::Done => break,
                    Outcome::Overtaken => buf = again,
                }
            }
        }
        if fua { self.pool.flush().await } else { Ok(()) }
    }

    /// Fills the parts of the edge blocks that the request does not cover with what the volume
    /// holds there, and says on which blocks that stood.
    async fn merge(
        &self,
        buf: &mut Buf,
        lba: Lba,
        edges: &[Edge],
    ) -> Result<Vec<(Lba, Option<BlockNo>)>> {
        let mut expected = Vec::with_capacity(edges.len());
        for edge in edges {
            let (old, block) = self.pool.read_blocks(self.id, edge.lba, 1).await?;
            let at = to_usize(edge.lba.get() - lba.get()) * BLOCK_SIZE;
            let new = &mut buf.as_mut_bytes()[at..at + BLOCK_SIZE];
            new[..edge.from].copy_from_slice(&old.as_bytes()[..edge.from]);
            new[edge.to..].copy_from_slice(&old.as_bytes()[edge.to..]);
            expected.push((edge.lba, block));
        }
        Ok(expected)
    }

    async fn do_write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.check_write(offset, len)?;
        let end = offset + len;
        let first = offset.next_multiple_of(BLOCK_BYTES).min(end);
        let last = (end / BLOCK_BYTES * BLOCK_BYTES).max(first);
        for (from, to) in [(offset, first), (last, end)] {
            if from < to {
                self.do_write(from, to_u32(to - from), Buf::zeroed(1), false).await?;
            }
        }
        if flags.no_hole {
            self.write_zero_blocks(first, last).await?;
        } else {
            self.pool.unmap(self.id, first / BLOCK_BYTES, (last - first) / BLOCK_BYTES).await?;
        }
        if flags.fua { self.pool.flush().await } else { Ok(()) }
    }

    async fn write_zero_blocks(&self, first: u64, last: u64) -> Result<()> {
        let mut at = first;
        while at < last {
            let blocks = ((last - at) / BLOCK_BYTES).min(ZERO_CHUNK_BLOCKS);
            let lba = Lba::new(at / BLOCK_BYTES);
            let zeros = Buf::zeroed(to_usize(blocks));
            self.pool.write_blocks(self.id, lba, zeros, Vec::new()).await?;
            at += blocks * BLOCK_BYTES;
        }
        Ok(())
    }

    async fn do_discard(&self, offset: u64, len: u64, fua: bool) -> Result<()> {
        self.check_write(offset, len)?;
        let size = self.size()?;
        let first = offset.div_ceil(BLOCK_BYTES);
        // The last block of a volume may be short; a discard up to the end covers it whole.
        let end = offset + len;
        let last = if end == size { end.div_ceil(BLOCK_BYTES) } else { end / BLOCK_BYTES };
        if first < last {
            self.pool.unmap(self.id, first, last - first).await?;
        }
        if fua { self.pool.flush().await } else { Ok(()) }
    }
}

impl BlockDevice for Volume {
    fn size_bytes(&self) -> u64 {
        self.size().unwrap_or(0)
    }

    fn read_only(&self) -> bool {
        self.live.is_deleted() || self.live.refuses_writes()
    }

    fn read(&self, offset: u64, len: u32) -> LocalFuture<'_, Result<ReadData>> {
        Box::pin(async move {
            self.pass(len.into()).await;
            self.do_read(offset, len).await
        })
    }

    fn write(&self, offset: u64, len: u32, buf: Buf, fua: bool) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.pass(len.into()).await;
            self.do_write(offset, len, buf, fua).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            // What is unmapped moves no bytes, and counts as one request.
            self.pass(if flags.no_hole { len } else { 0 }).await;
            self.do_write_zeroes(offset, len, flags).await
        })
    }

    fn discard(&self, offset: u64, len: u64, fua: bool) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.pass(0).await;
            self.do_discard(offset, len, fua).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.pool.flush())
    }

    fn mapped_runs(
        &self,
        offset: u64,
        len: u64,
        max_runs: usize,
    ) -> LocalFuture<'_, Result<Vec<MappedRun>>> {
        Box::pin(async move {
            let end = check_range(self.size()?, offset, len)?;
            self.pool.mapped_runs(self.id, offset, end, max_runs).await
        })
    }
}

/// The blocks at either end that a request from byte `start` to byte `end` behind `lba` covers
/// only in part.
fn edges(lba: Lba, start: usize, end: usize) -> Vec<Edge> {
    let (head, tail) = (start / BLOCK_SIZE, (end - 1) / BLOCK_SIZE);
    let mut edges = Vec::new();
    for block in [head, tail] {
        let from = start.max(block * BLOCK_SIZE) - block * BLOCK_SIZE;
        let to = end.min((block + 1) * BLOCK_SIZE) - block * BLOCK_SIZE;
        let known = edges.last().is_some_and(|e: &Edge| e.lba == lba.plus(to_u64(block)));
        if (from, to) != (0, BLOCK_SIZE) && !known {
            edges.push(Edge { lba: lba.plus(to_u64(block)), from, to });
        }
    }
    edges
}

fn copy_of(buf: &Buf) -> Buf {
    let mut copy = Buf::new(to_usize(buf.block_count()));
    copy.as_mut_bytes().copy_from_slice(buf.as_bytes());
    copy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_of_requests() {
        let cut = |start, end| {
            let all = edges(Lba::new(10), start, end);
            all.iter().map(|e| (e.lba.get(), e.from, e.to)).collect::<Vec<_>>()
        };
        assert_eq!(cut(0, 4096), []);
        assert_eq!(cut(0, 8192), []);
        assert_eq!(cut(512, 1024), [(10, 512, 1024)]);
        assert_eq!(cut(512, 4096), [(10, 512, 4096)]);
        assert_eq!(cut(512, 4608), [(10, 512, 4096), (11, 0, 512)]);
        assert_eq!(cut(0, 8704), [(12, 0, 512)]);
    }
}
