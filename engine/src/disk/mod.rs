//! L1: all access to the pool's blocks goes through [`Disk`]. So a simulated disk can replace the
//! real one, and the whole engine can run in one thread, reproducibly from a seed.
//!
//! A `Disk` belongs to one thread: an I/O is awaited on the ring of that thread. Buffers are passed
//! by value and returned, so a dropped future never leaves the kernel with a pointer into freed
//! memory.
//! a pointer into freed memory.

mod backend;
pub mod blocking;
pub mod file;
pub mod mapped;
#[cfg(any(test, feature = "testing"))]
pub mod mem;
pub mod ring;
#[cfg(any(test, feature = "testing"))]
pub mod sim;
pub mod uring;

use crate::error::Result;
use crate::runtime::{Buf, Clock, LocalFuture};
use crate::units::BlockNo;
pub use file::{Allocate, PoolFile};
pub use ring::{HeapRing, RingMark, RingMemory};

/// The interface to the device, with the clock of its thread. All lengths are whole blocks.
pub trait Disk: Clock {
    /// Length of the device in bytes (a block device or a regular file).
    fn len_bytes(&self) -> u64;

    /// Fills all of `buf` from block `at` on. Short reads are retried; reading past the end is an
    /// error. Returns the buffer in either case.
    fn read(&self, at: BlockNo, buf: Buf) -> LocalFuture<'_, (Buf, Result<()>)>;

    /// Writes `bufs` consecutively from block `at` on. Completes when the device has taken the
    /// data. The data is durable after a [`Disk::sync`] that is called after this completed.
    fn write(&self, at: BlockNo, bufs: Vec<Buf>) -> LocalFuture<'_, Result<()>>;

    /// Makes every write durable that completed before the call, and only those.
    fn sync(&self) -> LocalFuture<'_, Result<()>>;

    /// Discards `count` blocks from `at` on (trim, punch hole): their content is no longer needed.
    fn discard(&self, at: BlockNo, count: u64) -> LocalFuture<'_, Result<()>>;

    /// Extends a backing file to at least `len_bytes`. Fails on a block device that is shorter.
    fn extend(&self, len_bytes: u64) -> LocalFuture<'_, Result<()>>;
}
