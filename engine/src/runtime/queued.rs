//! The flag that marks a task as queued in its executor: the only lock-free protocol between
//! threads. `engine/tests/loom.rs` includes this file and explores every order in which the two
//! operations and the memory accesses around them can become visible.

use super::sync::atomic::{AtomicBool, Ordering};

/// Set while a task is queued, so that it is not queued twice. A poll after a wake sees everything
/// written before that wake: either the poll that [`Self::enter`] causes or, if the task was queued
/// already, the pending one.
#[derive(Debug)]
pub(crate) struct Queued(AtomicBool);

impl Queued {
    /// The flag of a new task, which starts out queued.
    #[must_use]
    pub(crate) fn new() -> Self {
        Self(AtomicBool::new(true))
    }

    /// Called when the task is woken. Returns whether the caller must queue it. `Release`, which
    /// [`Self::leave`] acquires: a caller that need not queue the task relies on it.
    pub(crate) fn enter(&self) -> bool {
        !self.0.swap(true, Ordering::Release)
    }

    /// Called when the task was taken from the queue and is about to be polled. A swap with
    /// `Acquire`, although the old value is not used: a plain store would not see what was written
    /// before `enter`.
    pub(crate) fn leave(&self) {
        self.0.swap(false, Ordering::Acquire);
    }
}
