//! L1: all access to the pool's blocks goes through [`Disk`], so that a simulated disk can stand in
//! for the real one and the whole engine runs in one thread from a seed.
//!
//! A `Disk` belongs to one thread: whoever awaits an I/O awaits it on the ring of its own thread.
//! Buffers go in by value and come back, so that a dropped future can never leave the kernel with
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

/// The narrow waist to the device, with the time of its thread. All lengths are whole blocks.
pub trait Disk: Clock {
    /// Length of the device in bytes (a block device or a regular file).
    fn len_bytes(&self) -> u64;

    /// Fills the whole of `buf` from `at` on. Short reads are retried; reading past the end is an
    /// error. The buffer comes back in either case.
    fn read(&self, at: BlockNo, buf: Buf) -> LocalFuture<'_, (Buf, Result<()>)>;

    /// Writes `bufs` one behind the other from `at` on. Complete when the device has taken the
    /// data; durable after the next [`Disk::sync`] that is called after this completed.
    fn write(&self, at: BlockNo, bufs: Vec<Buf>) -> LocalFuture<'_, Result<()>>;

    /// Makes every write that completed before the call durable. A barrier for those only.
    fn sync(&self) -> LocalFuture<'_, Result<()>>;

    /// Tells the device that `count` blocks from `at` on hold nothing (trim, punch hole).
    fn discard(&self, at: BlockNo, count: u64) -> LocalFuture<'_, Result<()>>;

    /// Makes the backing file at least `len_bytes` long; an error on a block device that is
    /// shorter.
    fn extend(&self, len_bytes: u64) -> LocalFuture<'_, Result<()>>;
}
