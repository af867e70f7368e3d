//! L1: the runtime of a shard, which is a thread with an executor, an `io_uring` and a mailbox.
//!
//! ```text
//!   shard     a thread, its mailbox, its executor         sync      locks, atomics, shared threads
//!     executor   runs the tasks of one thread in turns    queued    queue flag of a task
//!     reactor/   the io_uring of the thread               park      a driver without I/O
//!     buffer     block-aligned memory for direct I/O
//!     clock      the time of a thread
//! ```
//!
//! The runtime depends on no pool, volume or disk.

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

/// A boxed future of one thread: one small allocation per I/O, which takes microseconds itself.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;
