//! The I/O limits of a volume. All handles of a volume, on all threads, share one throttle. Waiting
//! requests pass in the order of arrival.
//!
//! ```text
//!  request --> limited? --no------------------------------------> continues (one relaxed load)
//!                  '--yes--> turn (fair lock) --> take from both buckets
//!                                 ^  in debt: sleep until it is paid off, or the limits change
//! ```
//! These are token buckets. A bucket holds [`BURST`] of its rate, which the volume may use at once.
//! A request of any size passes whenever the bucket is not in debt, and its cost is paid off
//! afterwards. So the largest request passes under the smallest limit, and the rate still holds on
//! average.
//!
//! The queue needs no bound of its own: an export accepts a bounded number of requests.

use std::pin::pin;
use std::time::Duration;

use futures_util::future::select;
use tokio::sync::Notify;

use crate::disk::Disk;
use crate::pool::types::IoLimits;
use crate::runtime::LocalFuture;
use crate::runtime::sync::Mutex;
use crate::runtime::sync::atomic::{AtomicBool, Ordering};

/// Burst of an idle volume, as a time at its rate.
const BURST: Duration = Duration::from_millis(100);
const NANOS: u128 = 1_000_000_000;

/// One limit, as a token bucket.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    /// Units per second; 0 means no limit.
    rate: u64,
    /// The moment at which the bucket is full again if nothing more is taken.
    full_at: Duration,
}

impl Bucket {
    /// How long the bucket stays in debt from `now` on.
    fn debt(&self, now: Duration) -> Duration {
        self.full_at.saturating_sub(BURST).saturating_sub(now)
    }

    fn take(&mut self, now: Duration, units: u64) {
        if self.rate > 0 {
            let time = nanos(u128::from(units) * NANOS / u128::from(self.rate));
            self.full_at = self.full_at.max(now).saturating_add(time);
        }
    }

    /// Changes the rate. A higher rate shortens a debt; a lower rate does not lengthen it, because
    /// the debt arose under the old rate.
    fn set(&mut self, now: Duration, rate: u64) {
        let debt = self.debt(now);
        if rate == 0 {
            self.full_at = Duration::ZERO;
        } else if rate > self.rate && !debt.is_zero() {
            let left = nanos(debt.as_nanos() * u128::from(self.rate) / u128::from(rate));
            self.full_at = now + BURST + left;
        }
        self.rate = rate;
    }
}

fn nanos(nanos: u128) -> Duration {
    // About 500 years; no sensible limit causes a longer wait.
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[derive(Clone, Copy, Debug, Default)]
struct Buckets {
    requests: Bucket,
    bytes: Bucket,
}

/// The limits of one volume, and the queue of the requests that wait for them.
#[derive(Default)]
pub(crate) struct Throttle {
    /// Whether there is a limit.
    limited: AtomicBool,
    buckets: Mutex<Buckets>,
    /// The queue: this lock is fair.
    turn: tokio::sync::Mutex<()>,
    /// Notified when the limits change.
    changed: Notify,
}

impl Throttle {
    /// Whether requests must call [`Self::pass`].
    pub(crate) fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    /// Waits until a request that moves `bytes` may continue.
    pub(crate) fn pass<'a>(&'a self, disk: &'a dyn Disk, bytes: u64) -> LocalFuture<'a, ()> {
        Box::pin(async move {
            let _turn = self.turn.lock().await;
            loop {
                // Registered before the look, so that no change in between is missed.
                let changed = pin!(self.changed.notified());
                let debt = self.take(disk.now(), bytes);
                if debt.is_zero() {
                    return;
                }
                select(disk.sleep(debt), changed).await;
            }
        })
    }

    /// Takes what a request needs and returns zero, or takes nothing and returns how long the debt
    /// lasts.
    fn take(&self, now: Duration, bytes: u64) -> Duration {
        let mut buckets = self.buckets.lock();
        let Buckets { requests, bytes: moved } = &mut *buckets;
        let debt = requests.debt(now).max(moved.debt(now));
        if debt.is_zero() {
            requests.take(now, 1);
            moved.take(now, bytes);
        }
        debt
    }

    /// Changes the limits, also for requests that already wait.
    pub(crate) fn set(&self, now: Duration, limits: IoLimits) {
        {
            let mut buckets = self.buckets.lock();
            buckets.requests.set(now, limits.iops);
            buckets.bytes.set(now, limits.bandwidth_bytes);
            self.limited.store(limits != IoLimits::default(), Ordering::Relaxed);
        }
        self.changed.notify_waiters();
    }
}
