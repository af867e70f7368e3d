//! Simulated time: it passes when I/O completes, a little each time, and in one leap to the next
//! moment that somebody waits for when there is no I/O. So it depends on the seed alone.

use std::collections::BTreeMap;
use std::task::Waker;
use std::time::Duration;

/// What each I/O takes, one after another.
const IO_TIME: Duration = Duration::from_micros(20);

/// Who waits for which moment; the number tells those of one moment apart.
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

    /// An I/O has completed. Whoever is to be woken is appended to `woken`.
    pub(super) fn io_completed(&mut self, woken: &mut Vec<Waker>) {
        self.now += IO_TIME;
        self.take_due(woken);
    }

    /// Nothing else is to be done: leaps to the next moment that somebody waits for, or at which
    /// an I/O is done. False if there is none.
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
