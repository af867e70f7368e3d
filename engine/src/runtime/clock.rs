//! The clock of a thread. It is part of the thread's disk, because time passes where the thread
//! sleeps: in its ring, or in a simulated disk, whose time advances only when no task is ready.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use crate::runtime::LocalFuture;

/// A clock with timers.
pub trait Clock {
    /// Monotonic time since a fixed moment that is the same for all threads.
    fn now(&self) -> Duration;

    /// Resolves when `time` has passed, or slightly later.
    fn sleep(&self, time: Duration) -> LocalFuture<'_, ()>;
}

/// Real time since the first call in the process.
pub(crate) fn real_now() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

/// Sleeps in real time, for a thread that runs one task only: it delays nothing else.
pub(crate) fn blocking_sleep(time: Duration) -> LocalFuture<'static, ()> {
    Box::pin(async move { std::thread::sleep(time) })
}
