//! A driver for executors whose tasks do no I/O of their own: it only sleeps until it is woken.

use std::sync::Arc;
use std::thread::{self, Thread};

use super::executor::{Driver, Parked, Unpark};

/// Sleeps in `std::thread::park`. For the thread that made it.
pub struct ThreadDriver {
    thread: Thread,
}

impl ThreadDriver {
    /// A driver for the calling thread.
    #[must_use]
    pub fn new() -> Self {
        Self { thread: thread::current() }
    }
}

impl Default for ThreadDriver {
    fn default() -> Self {
        Self::new()
    }
}

impl Driver for ThreadDriver {
    fn poll(&mut self) {}

    fn park(&mut self) -> Parked {
        thread::park();
        Parked::Awake
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        Arc::new(ThreadUnparker(self.thread.clone()))
    }
}

struct ThreadUnparker(Thread);

impl Unpark for ThreadUnparker {
    fn unpark(&self) {
        self.0.unpark();
    }
}
