//! Whether a task stands in the queue of its executor. All that threads settle among themselves
//! without a lock; `engine/tests/loom.rs` includes this file and goes through every order in which the
//! two operations and the memory behind them can be seen.

use super::sync::atomic::{AtomicBool, Ordering};

/// A mark on a task that is in the queue, so that it is not put there twice. What was written before
/// a task was woken is seen by a poll that comes behind it: the one that [`Self::enter`] asks for, or,
/// when there was one to come already, that one.
#[derive(Debug)]
pub(crate) struct Queued(AtomicBool);

impl Queued {
    /// The mark of a task that stands in the queue from the beginning.
    #[must_use]
    pub(crate) fn new() -> Self {
        Self(AtomicBool::new(true))
    }

    /// The task is woken: whether the caller has to put it into the queue. `Release`, for
    /// [`Self::leave`] to acquire: whoever need not queue the task relies on that.
    pub(crate) fn enter(&self) -> bool {
        !self.0.swap(true, Ordering::Release)
    }

    /// The task was taken from the queue and is about to be polled. A swap and `Acquire`, though
    /// nobody asks for the old value: a store would see nothing of what was written before `enter`.
    pub(crate) fn leave(&self) {
        self.0.swap(false, Ordering::Acquire);
    }
}
