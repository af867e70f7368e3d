//! L1: the runtime of a shard: a thread with an executor, an `io_uring` and a mailbox.
//!
//! ```text
//!   shard     a thread, its mailbox, its executor         sync      locks, atomics, threads of shards
//!     executor   tasks of one thread, in turns            queued    whether a task is in the queue
//!     reactor/   the io_uring of the thread               park      a driver without I/O
//!     buffer     block-aligned memory that the kernel fills or reads
//!     clock      the time of a thread
//! ```
//!
//! Nothing here refers to pools, volumes or disks.

pub mod buffer;
pub mod clock;
pub mod executor;
pub mod park;
mod queued;
pub mod reactor;
pub mod shard;
pub mod sync;

use std::future::Future;
use std::pin::Pin;

pub use buffer::Buf;
pub use clock::Clock;

/// A boxed future of one thread. One small allocation for an I/O that costs microseconds.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;
