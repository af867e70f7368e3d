//! A driver for executors whose tasks do no I/O: it only sleeps until it is unparked.

use std::sync::Arc;

use crate::runtime::executor::{Driver, Parked, Unpark};
use crate::runtime::sync::{Parker, Unparker};

/// Sleeps until unparked. Only for the thread that created it.
#[derive(Default)]
pub struct ThreadDriver {
    parker: Parker,
}

impl ThreadDriver {
    /// A driver for the calling thread.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl Driver for ThreadDriver {
    fn poll(&mut self) {}

    fn park(&mut self) -> Parked {
        self.parker.park();
        Parked::Awake
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        Arc::new(self.parker.unparker())
    }
}

impl Unpark for Unparker {
    fn unpark(&self) {
        Self::unpark(self);
    }
}
