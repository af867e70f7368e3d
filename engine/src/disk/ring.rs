//! Memory that survives the process. The newest records of the journal stay in it until a flush
//! writes them to the pool.
//!
//! ```text
//!  mark: pool of the records, and      synced ........ head     (positions in the log)
//!                                        |               |
//!  bytes, a ring:                 [......r r r r r r r r .......]
//! ```
//! A store survives SIGKILL at once. It never reaches the disk by itself, so after a power failure
//! only what the last flush wrote is left.

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::runtime::sync::Mutex;

/// Identifies the pool of the records in the memory, and the part of the log.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RingMark {
    /// UUID of the pool.
    pub pool: [u8; 16],
    /// Salt of its records: it changes every time the pool is opened.
    pub salt: u32,
    /// Generation of a checkpoint that was durable when the mark was set. A pool at an older
    /// generation is an older copy of that pool.
    pub generation: u32,
    /// Position in the log up to which the pool has it durably: a block boundary.
    pub synced: u64,
    /// Position of the end of the log.
    pub head: u64,
}

/// Memory for the end of a log. The byte at a position of the log is stored at that position modulo
/// the length of the memory.
pub trait RingMemory: Send {
    /// Bytes of the ring: a whole number of blocks.
    fn len_bytes(&self) -> usize;

    /// Copies `bytes` to `offset`; the range must be inside the ring.
    fn store(&mut self, offset: usize, bytes: &[u8]);

    /// Fills `out` from `offset` on; the range must be inside the ring.
    fn load(&self, offset: usize, out: &mut [u8]);

    /// The last mark that was set, by this process or an earlier one.
    fn mark(&self) -> RingMark;

    /// Replaces the mark atomically, and not before the bytes that were stored earlier.
    fn set_mark(&mut self, mark: &RingMark);
}

/// A ring in ordinary memory: it does not survive the process.
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

/// A ring that several owners use in turn, as successive processes do.
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
