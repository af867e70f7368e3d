//! The I/O limits of a volume. One throttle for all handles of a volume, on all threads; requests
//! that must wait are let through in the order in which they came.
//!
//! ```text
//!  request --> limited? --no------------------------------------> goes on (one relaxed load)
//!                  '--yes--> turn (fair lock) --> take from both buckets
//!                                 ^  in debt: sleep until it is paid off, or the limits change
//! ```
//! A bucket holds what the volume may do at once: [`BURST`] of its rate. A request passes whenever
//! the bucket is not in debt, whatever its size, and is paid off afterwards: so the largest request
//! passes under the smallest limit, and the rate holds on the average all the same.
//!
//! What waits is bounded by whoever sends requests: an export takes a bounded number of them.

use std::pin::pin;
use std::time::Duration;

use futures_util::future::select;
use tokio::sync::Notify;

use crate::disk::Disk;
use crate::pool::types::IoLimits;
use crate::runtime::LocalFuture;
use crate::runtime::sync::Mutex;
use crate::runtime::sync::atomic::{AtomicBool, Ordering};

/// What a volume that was idle may do at once, as a time at its rate.
const BURST: Duration = Duration::from_millis(100);
const NANOS: u128 = 1_000_000_000;

/// One limit.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    /// Units in a second; 0 is no limit.
    rate: u64,
    /// The moment at which the bucket is full again if nothing more is taken.
    full_at: Duration,
}

impl Bucket {
    /// How long the bucket is in debt from `now` on.
    fn debt(&self, now: Duration) -> Duration {
        self.full_at.saturating_sub(BURST).saturating_sub(now)
    }

    fn take(&mut self, now: Duration, units: u64) {
        if self.rate > 0 {
            let time = nanos(u128::from(units) * NANOS / u128::from(self.rate));
            self.full_at = self.full_at.max(now).saturating_add(time);
        }
    }

    /// Changes the rate. A debt becomes shorter with a higher rate, but not longer with a lower
    /// one: what has passed, has passed under the old one.
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
    // Some 500 years: no limit is meant to make anybody wait that long.
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[derive(Clone, Copy, Debug, Default)]
struct Buckets {
    requests: Bucket,
    bytes: Bucket,
}

/// The limits of one volume, and who waits for them.
#[derive(Default)]
pub(crate) struct Throttle {
    /// There is a limit.
    limited: AtomicBool,
    buckets: Mutex<Buckets>,
    /// Whose turn it is; the lock is fair.
    turn: tokio::sync::Mutex<()>,
    /// The limits have changed.
    changed: Notify,
}

impl Throttle {
    /// Whether requests have to pass.
    pub(crate) fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Relaxed)
    }

    /// Waits until a request that moves `bytes` may go on.
    pub(crate) fn pass<'a>(&'a self, disk: &'a dyn Disk, bytes: u64) -> LocalFuture<'a, ()> {
        Box::pin(async move {
            let _turn = self.turn.lock().await;
            loop {
                // Before the look, so that no change is missed between the two.
                let changed = pin!(self.changed.notified());
                let debt = self.take(disk.now(), bytes);
                if debt.is_zero() {
                    return;
                }
                select(disk.sleep(debt), changed).await;
            }
        })
    }

    /// Takes what a request needs. If there is a debt it takes nothing and says how long it lasts.
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

    /// Changes the limits, for those who wait as well.
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
