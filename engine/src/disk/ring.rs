//! Memory that outlives the process: in it the newest records of the journal wait for the flush
//! that writes them to the pool.
//!
//! ```text
//!  mark: whose records these are, and  synced ........ head     (positions in the log)
//!                                        |               |
//!  bytes, a ring:                 [......r r r r r r r r .......]
//! ```
//! A store survives SIGKILL at once. It never reaches the disk by itself, so a power failure takes
//! all of it away, and what is left is what the last flush has written.

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::runtime::sync::Mutex;

/// Whose records a memory holds, and which part of the log.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RingMark {
    /// UUID of the pool.
    pub pool: [u8; 16],
    /// Salt of its records: it changes whenever the pool is opened.
    pub salt: u32,
    /// A checkpoint that was durable when the mark was set. A pool with an older one is an older
    /// copy of that pool.
    pub generation: u32,
    /// Position in the log up to which it is durable in the pool: a block border.
    pub synced: u64,
    /// Position of the log's end.
    pub head: u64,
}

/// Memory for the end of a log. The byte at a position of the log is at that position modulo the
/// length of the memory.
pub trait RingMemory: Send {
    /// Bytes of the ring; a whole number of blocks.
    fn len_bytes(&self) -> usize;

    /// Copies `bytes` to `offset`; the range lies inside the ring.
    fn store(&mut self, offset: usize, bytes: &[u8]);

    /// Fills `out` from `offset` on; the range lies inside the ring.
    fn load(&self, offset: usize, out: &mut [u8]);

    /// The mark, as it was set last, by this process or by one before.
    fn mark(&self) -> RingMark;

    /// Replaces the mark: whole or not at all, and never before the bytes that were stored before.
    fn set_mark(&mut self, mark: &RingMark);
}

/// A ring in ordinary memory, which dies with the process.
#[derive(Clone, Debug)]
pub struct HeapRing {
    bytes: Vec<u8>,
    mark: RingMark,
}

impl HeapRing {
    /// A ring of `len` bytes of zeros.
    #[must_use]
    pub fn new(len: usize) -> Self {
        Self { bytes: vec![0; len], mark: RingMark::default() }
    }
}

impl RingMemory for HeapRing {
    fn len_bytes(&self) -> usize {
        self.bytes.len()
    }
    fn store(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    fn load(&self, offset: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.bytes[offset..offset + out.len()]);
    }
    fn mark(&self) -> RingMark {
        self.mark
    }
    fn set_mark(&mut self, mark: &RingMark) {
        self.mark = *mark;
    }
}

/// A ring that several may hold, one behind the other, as processes do.
impl RingMemory for Arc<Mutex<HeapRing>> {
    fn len_bytes(&self) -> usize {
        self.lock().len_bytes()
    }
    fn store(&mut self, offset: usize, bytes: &[u8]) {
        self.lock().store(offset, bytes);
    }
    fn load(&self, offset: usize, out: &mut [u8]) {
        self.lock().load(offset, out);
    }
    fn mark(&self) -> RingMark {
        self.lock().mark()
    }
    fn set_mark(&mut self, mark: &RingMark) {
        self.lock().set_mark(mark);
    }
}
