//! A disk in memory, for benchmarks and tests of the layers above: a read or write is a copy, and
//! its future is ready at once. It loses nothing and has no faults; the simulated disk has.

use std::cell::RefCell;
use std::future::ready;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::disk::{Disk, HeapRing, RingMemory};
use crate::error::{Error, Result};
use crate::runtime::clock::{blocking_sleep, real_now};
use crate::runtime::sync::Mutex;
use crate::runtime::{Buf, Clock, LocalFuture};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, BlockNo, to_usize};

/// Blocks whose memory is allocated together, with the first write to one of them.
const CHUNK_BLOCKS: u64 = 256;

/// A disk in memory. Cheap to clone; all clones share one disk.
#[derive(Clone)]
pub struct MemDisk {
    content: Rc<RefCell<Content>>,
}

struct Content {
    /// `None` stands for zeros.
    chunks: Vec<Option<Box<[u8]>>>,
    len_blocks: u64,
    ring: Option<Arc<Mutex<HeapRing>>>,
}

impl MemDisk {
    /// A disk of `len_bytes` (whole blocks) of zeros. Allocates memory only for written chunks.
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

    /// The memory of the journal, as [`super::PoolFile::map_ring`]: every call returns the same
    /// memory, as after the death of a process.
    ///
    /// # Errors
    /// Never.
    pub fn map_ring(&self, len: usize) -> Result<Box<dyn RingMemory>> {
        let mut content = self.content.borrow_mut();
        let ring = content.ring.get_or_insert_with(|| Arc::new(Mutex::new(HeapRing::new(len))));
        Ok(Box::new(Arc::clone(ring)))
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

    fn read(&self, at: u64, into: &mut [u8]) {
        for (block, target) in (at..).zip(into.chunks_exact_mut(BLOCK_SIZE)) {
            let (chunk, offset) = split(block);
            match &self.chunks[chunk] {
                Some(bytes) => target.copy_from_slice(&bytes[offset..offset + BLOCK_SIZE]),
                None => target.fill(0),
            }
        }
    }

    fn write(&mut self, at: u64, from: &[u8]) {
        for (block, source) in (at..).zip(from.chunks_exact(BLOCK_SIZE)) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::executor::Executor;
    use crate::runtime::park::ThreadDriver;

    fn filled(byte: u8, blocks: usize) -> Buf {
        let mut buf = Buf::new(blocks);
        buf.as_mut_bytes().fill(byte);
        buf
    }

    #[test]
    fn reads_what_was_written() {
        let memory = MemDisk::new(1000 * BLOCK_BYTES);
        let disk = memory.disk();
        Executor::new(ThreadDriver::new()).block_on(async {
            disk.write(BlockNo::new(254), vec![filled(1, 1), filled(2, 3)]).await.unwrap();
            disk.discard(BlockNo::new(254), 1).await.unwrap();
            let (buf, result) = disk.read(BlockNo::new(253), Buf::new(6)).await;
            result.unwrap();
            let firsts: Vec<u8> = buf.iter_blocks().map(|block| block[0]).collect();
            assert_eq!(firsts, [0, 0, 2, 2, 2, 0]);
            assert!(disk.write(BlockNo::new(999), vec![filled(1, 2)]).await.is_err());
            disk.extend(1001 * BLOCK_BYTES).await.unwrap();
            disk.write(BlockNo::new(999), vec![filled(1, 2)]).await.unwrap();
        });
        // A later process finds the memory of the journal unchanged.
        memory.map_ring(BLOCK_SIZE).unwrap().store(7, &[3]);
        let mut out = [0];
        memory.map_ring(BLOCK_SIZE).unwrap().load(7, &mut out);
        assert_eq!(out, [3]);
    }
}
