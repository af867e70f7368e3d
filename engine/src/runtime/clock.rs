//! The time of a thread, for what has to wait. It comes with the thread's disk, because it passes
//! where the thread sleeps: in its ring, or in a simulated disk, whose time stands still until
//! nothing else is to be done.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use crate::runtime::LocalFuture;

/// Time, and waiting for it.
pub trait Clock {
    /// Time since a fixed moment, which is the same for all threads; never goes back.
    fn now(&self) -> Duration;

    /// Resolves when `time` has passed, or a little later.
    fn sleep(&self, time: Duration) -> LocalFuture<'_, ()>;
}

/// Real time since the process first asked for it.
pub(crate) fn real_now() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

/// Real time for a thread that does one thing after another: nobody else is held up.
pub(crate) fn blocking_sleep(time: Duration) -> LocalFuture<'static, ()> {
    Box::pin(async move { std::thread::sleep(time) })
}
