//! A disk in memory, for benchmarks and tests of what lies above: a read or write is a copy, and
//! its future is ready at once. Nothing is ever lost; faults are the simulated disk's matter.

use std::cell::RefCell;
use std::future::ready;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::clock::{blocking_sleep, real_now};
use super::{Buf, Clock, Disk, LocalFuture, RingMemory};
use crate::error::{Error, Result};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, BlockNo, to_u64, to_usize};

/// Blocks that get their memory together, when the first of them is written.
const CHUNK_BLOCKS: u64 = 256;

/// A disk in memory. Cheap to clone; all clones are the same disk.
#[derive(Clone)]
pub struct MemDisk {
    content: Rc<RefCell<Content>>,
}

struct Content {
    /// `None` is zeros.
    chunks: Vec<Option<Box<[u8]>>>,
    len_blocks: u64,
    ring: Option<Ring>,
}

/// The blocks that are mapped. Their content is here and not in the chunks, so that the mapping
/// can be used from any thread, as that of a file can.
struct Ring {
    blocks: Range<u64>,
    bytes: Arc<Mutex<Vec<u8>>>,
}

impl MemDisk {
    /// A disk of `len_bytes` (whole blocks) of zeros. Takes memory only for what is written.
    #[must_use]
    pub fn new(len_bytes: u64) -> Self {
        let mut content = Content { chunks: Vec::new(), len_blocks: 0, ring: None };
        content.extend(len_bytes / BLOCK_BYTES);
        Self { content: Rc::new(RefCell::new(content)) }
    }

    /// A handle for the code under test.
    #[must_use]
    pub fn disk(&self) -> Rc<dyn Disk> {
        Rc::new(self.clone())
    }

    /// The journal's ring, as [`super::PoolFile::map_ring`]. A disk has one; mapping another place
    /// ends the mapping before.
    ///
    /// # Errors
    /// `Invalid` when it is not whole blocks inside the disk.
    pub fn map_ring(&self, offset: u64, len: usize) -> Result<Box<dyn RingMemory>> {
        let mut content = self.content.borrow_mut();
        let (first, count) = (offset / BLOCK_BYTES, to_u64(len) / BLOCK_BYTES);
        if !offset.is_multiple_of(BLOCK_BYTES) || !to_u64(len).is_multiple_of(BLOCK_BYTES) {
            return Err(Error::invalid(format!("journal of {len} bytes at {offset}: no blocks")));
        }
        content.check_range(BlockNo::new(first), count)?;
        let blocks = first..first + count;
        if let Some(old) = content.ring.take_if(|ring| ring.blocks != blocks) {
            content.write(old.blocks.start, &old.bytes.lock());
        }
        if content.ring.is_none() {
            let mut bytes = vec![0; len];
            content.read(first, &mut bytes);
            content.ring = Some(Ring { blocks, bytes: Arc::new(Mutex::new(bytes)) });
        }
        let bytes = content.ring.as_ref().map(|ring| Arc::clone(&ring.bytes));
        Ok(Box::new(MemRing { bytes: bytes.expect("set above"), len }))
    }
}

impl Content {
    fn extend(&mut self, len_blocks: u64) {
        self.len_blocks = self.len_blocks.max(len_blocks);
        self.chunks.resize_with(to_usize(self.len_blocks.div_ceil(CHUNK_BLOCKS)), || None);
    }

    fn check_range(&self, at: BlockNo, count: u64) -> Result<()> {
        match at.get().checked_add(count) {
            Some(end) if end <= self.len_blocks => Ok(()),
            _ => Err(Error::invalid(format!(
                "{count} blocks at {at} are beyond the end of the disk in memory ({} blocks)",
                self.len_blocks
            ))),
        }
    }

    fn mapped(&self, block: u64) -> Option<(&Ring, usize)> {
        let ring = self.ring.as_ref().filter(|ring| ring.blocks.contains(&block))?;
        Some((ring, to_usize(block - ring.blocks.start) * BLOCK_SIZE))
    }

    fn read(&self, at: u64, into: &mut [u8]) {
        for (block, target) in (at..).zip(into.chunks_exact_mut(BLOCK_SIZE)) {
            if let Some((ring, offset)) = self.mapped(block) {
                target.copy_from_slice(&ring.bytes.lock()[offset..offset + BLOCK_SIZE]);
                continue;
            }
            let (chunk, offset) = split(block);
            match &self.chunks[chunk] {
                Some(bytes) => target.copy_from_slice(&bytes[offset..offset + BLOCK_SIZE]),
                None => target.fill(0),
            }
        }
    }

    fn write(&mut self, at: u64, from: &[u8]) {
        for (block, source) in (at..).zip(from.chunks_exact(BLOCK_SIZE)) {
            if let Some((ring, offset)) = self.mapped(block) {
                ring.bytes.lock()[offset..offset + BLOCK_SIZE].copy_from_slice(source);
                continue;
            }
            let (chunk, offset) = split(block);
            let bytes = self.chunks[chunk]
                .get_or_insert_with(|| vec![0; to_usize(CHUNK_BLOCKS * BLOCK_BYTES)].into());
            bytes[offset..offset + BLOCK_SIZE].copy_from_slice(source);
        }
    }

    fn discard(&mut self, blocks: Range<u64>) {
        for block in blocks {
            let (chunk, offset) = split(block);
            if let Some(bytes) = &mut self.chunks[chunk] {
                bytes[offset..offset + BLOCK_SIZE].fill(0);
            }
        }
    }
}

fn split(block: u64) -> (usize, usize) {
    (to_usize(block / CHUNK_BLOCKS), to_usize(block % CHUNK_BLOCKS) * BLOCK_SIZE)
}

impl Clock for MemDisk {
    fn now(&self) -> Duration {
        real_now()
    }

    fn sleep(&self, time: Duration) -> LocalFuture<'_, ()> {
        blocking_sleep(time)
    }
}

impl Disk for MemDisk {
    fn len_bytes(&self) -> u64 {
        self.content.borrow().len_blocks * BLOCK_BYTES
    }

    fn read(&self, at: BlockNo, mut buf: Buf) -> LocalFuture<'_, (Buf, Result<()>)> {
        let content = self.content.borrow();
        let result = content.check_range(at, buf.block_count());
        if result.is_ok() {
            content.read(at.get(), buf.as_mut_bytes());
        }
        Box::pin(ready((buf, result)))
    }

    fn write(&self, at: BlockNo, bufs: Vec<Buf>) -> LocalFuture<'_, Result<()>> {
        let mut content = self.content.borrow_mut();
        let result = content.check_range(at, bufs.iter().map(Buf::block_count).sum());
        if result.is_ok() {
            let mut at = at.get();
            for buf in &bufs {
                content.write(at, buf.as_bytes());
                at += buf.block_count();
            }
        }
        Box::pin(ready(result))
    }

    fn sync(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }

    fn discard(&self, at: BlockNo, count: u64) -> LocalFuture<'_, Result<()>> {
        let mut content = self.content.borrow_mut();
        let result = content.check_range(at, count);
        if result.is_ok() {
            content.discard(at.get()..at.get() + count);
        }
        Box::pin(ready(result))
    }

    fn extend(&self, len_bytes: u64) -> LocalFuture<'_, Result<()>> {
        self.content.borrow_mut().extend(len_bytes / BLOCK_BYTES);
        Box::pin(ready(Ok(())))
    }
}

/// The mapped blocks.
struct MemRing {
    bytes: Arc<Mutex<Vec<u8>>>,
    len: usize,
}

impl RingMemory for MemRing {
    fn len_bytes(&self) -> usize {
        self.len
    }

    fn store(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes.lock()[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn prepare(&mut self, offset: usize, len: usize) -> Result<()> {
        assert!(offset + len <= self.len, "a window is inside the ring");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::executor::Executor;
    use crate::disk::park::ThreadDriver;

    fn filled(byte: u8, blocks: usize) -> Buf {
        let mut buf = Buf::new(blocks);
        buf.as_mut_bytes().fill(byte);
        buf
    }

    #[test]
    fn reads_what_was_written_or_stored() {
        let memory = MemDisk::new(1000 * BLOCK_BYTES);
        let disk = memory.disk();
        Executor::new(ThreadDriver::new()).block_on(async {
            disk.write(BlockNo::new(254), vec![filled(1, 1), filled(2, 3)]).await.unwrap();
            let mut ring = memory.map_ring(256 * BLOCK_BYTES, 4 * BLOCK_SIZE).unwrap();
            ring.prepare(0, 4 * BLOCK_SIZE).unwrap();
            ring.store(BLOCK_SIZE, &[3; 10]);
            disk.discard(BlockNo::new(254), 1).await.unwrap();
            let (buf, result) = disk.read(BlockNo::new(253), Buf::new(6)).await;
            result.unwrap();
            let firsts: Vec<u8> = buf.iter_blocks().map(|block| block[0]).collect();
            assert_eq!(firsts, [0, 0, 2, 2, 3, 0]);
            assert_eq!(buf.as_bytes()[4 * BLOCK_SIZE + 10], 2, "what was there before the mapping");
            // A later process maps it again, or maps another place.
            let mut again = memory.map_ring(256 * BLOCK_BYTES, 4 * BLOCK_SIZE).unwrap();
            again.store(0, &[4]);
            memory.map_ring(0, BLOCK_SIZE).unwrap();
            let (buf, _) = disk.read(BlockNo::new(256), Buf::new(2)).await;
            assert_eq!([buf.as_bytes()[0], buf.as_bytes()[BLOCK_SIZE]], [4, 3]);
            assert!(disk.write(BlockNo::new(999), vec![filled(1, 2)]).await.is_err());
            disk.extend(1001 * BLOCK_BYTES).await.unwrap();
            disk.write(BlockNo::new(999), vec![filled(1, 2)]).await.unwrap();
            assert!(memory.map_ring(1000 * BLOCK_BYTES, 2 * BLOCK_SIZE).is_err());
            assert!(memory.map_ring(1, BLOCK_SIZE).is_err());
        });
    }
}
