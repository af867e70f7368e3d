//! Simulated time. It advances a little with each completed I/O. Without I/O it leaps to the next
//! moment that a task waits for. So it depends on the seed alone.

use std::collections::BTreeMap;
use std::task::Waker;
use std::time::Duration;

/// Duration of each I/O; I/Os are sequential.
const IO_TIME: Duration = Duration::from_micros(20);

/// A waiting task: the moment, and a number that distinguishes tasks that wait for the same moment.
pub(super) type Key = (Duration, u64);

/// The clock of a simulated disk.
#[derive(Default)]
pub(super) struct Timers {
    pub(super) now: Duration,
    pub(super) next: u64,
    pub(super) waiting: BTreeMap<Key, Waker>,
}

impl Timers {
    pub(super) const fn now(&self) -> Duration {
        self.now
    }

    /// Called when an I/O has completed. Appends the wakers that are due to `woken`.
    pub(super) fn io_completed(&mut self, woken: &mut Vec<Waker>) {
        self.now += IO_TIME;
        self.take_due(woken);
    }

    /// Called when nothing else can run: leaps to the next moment that a task waits for or at which
    /// an I/O is ready. Returns false if nothing will become ready.
    pub(super) fn leap(&mut self, io: Option<Duration>, woken: &mut Vec<Waker>) -> bool {
        let timer = self.waiting.first_key_value().map(|((due, _), _)| *due);
        let Some(due) = timer.into_iter().chain(io).min() else { return false };
        self.now = self.now.max(due);
        self.take_due(woken);
        true
    }

    fn take_due(&mut self, woken: &mut Vec<Waker>) {
        while let Some(first) = self.waiting.first_entry()
            && first.key().0 <= self.now
        {
            woken.push(first.remove());
        }
    }
}
