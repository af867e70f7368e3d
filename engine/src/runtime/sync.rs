//! L0: locks, atomics and threads of everything that several shards share: pool, executor, park,
//! simulated disk. In ordinary builds these are `parking_lot`'s and the standard library's own, by
//! another name. With the feature `shuttle` they are those of the crate of that name, under which
//! all threads of a test take turns on one, and at each lock, unlock, atomic operation, start and
//! sleep of a thread a scheduler chooses who goes on: at random, but the same from the same seed.
//! An engine that was built so runs in such tests and nowhere else.
//!
//! ```text
//!  ordinary:  sync::Mutex = parking_lot::Mutex       sync::thread = std::thread    sync::Parker: park
//!  shuttle:   sync::Mutex { shuttle::sync::Mutex }   shuttle::thread               a token of its own
//! ```
//!
//! What is **not** controlled, and why that hides nothing:
//! * `tokio::sync` (`Notify`, `oneshot`, `mpsc`, the asynchronous `Mutex`): its operations never
//!   block a thread and never let another one in halfway, so each is one step. Whom it wakes stands
//!   in the queue of an executor afterwards, which is behind a [`Mutex`] of this module: there the
//!   scheduler has its say, and wherever such a lock is given back. Two such operations one behind
//!   the other are one step.
//! * Atomics that are used under a lock only (`map/cache.rs`): nobody else is let in there.
//! * [`Counter`]: it is shown and decides nothing.
//! * Weak memory: every atomic operation is sequentially consistent under `shuttle`. What needs an
//!   ordering says why beside it.
//! * The ring of the kernel (`reactor/`, `shard.rs`), and what is above the pool.

use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(not(feature = "shuttle"))]
pub use parking_lot::{Mutex, MutexGuard};
#[cfg(not(feature = "shuttle"))]
pub use std::{sync::atomic, thread, thread_local};

#[cfg(feature = "shuttle")]
pub use controlled::{Mutex, MutexGuard};
#[cfg(feature = "shuttle")]
pub use shuttle::{sync::atomic, thread, thread_local};

#[cfg(all(feature = "shuttle", feature = "daemon"))]
compile_error!("an engine with the feature `shuttle` runs only under its scheduler, in tests");

/// A number that is counted up and shown.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `by`.
    pub fn add(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    /// The number.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What one thread sleeps in until another one wakes it; for the thread that made it. A wake-up
/// that comes before the sleep ends that at once.
#[derive(Debug)]
pub struct Parker {
    unparker: Unparker,
}

/// Ends the sleep of a [`Parker`], from any thread.
#[derive(Clone, Debug)]
pub struct Unparker(imp::Token);

impl Parker {
    /// A place to sleep for the calling thread.
    #[must_use]
    pub fn new() -> Self {
        Self { unparker: Unparker(imp::Token::new()) }
    }

    /// Sleeps until somebody unparks; may return without a reason.
    pub fn park(&self) {
        self.unparker.0.park();
    }

    /// The handle that ends a sleep.
    #[must_use]
    pub fn unparker(&self) -> Unparker {
        self.unparker.clone()
    }
}

impl Default for Parker {
    fn default() -> Self {
        Self::new()
    }
}

impl Unparker {
    /// Makes the current or the next [`Parker::park`] return.
    pub fn unpark(&self) {
        self.0.unpark();
    }
}

#[cfg(not(feature = "shuttle"))]
mod imp {
    use std::thread::{self, Thread};

    /// The token that the standard library keeps for each thread.
    #[derive(Clone, Debug)]
    pub(super) struct Token(Thread);

    impl Token {
        pub(super) fn new() -> Self {
            Self(thread::current())
        }

        pub(super) fn park(&self) {
            debug_assert_eq!(self.0.id(), thread::current().id(), "a thread sleeps for itself");
            thread::park();
        }

        pub(super) fn unpark(&self) {
            self.0.unpark();
        }
    }
}

#[cfg(feature = "shuttle")]
mod imp {
    use std::sync::Arc;

    use shuttle::sync::{Condvar, Mutex, PoisonError};

    /// A token of our own: shuttle's threads wake up without a reason at times, and a wake-up that
    /// was lost would be made good by that.
    #[derive(Clone, Debug)]
    pub(super) struct Token(Arc<Shared>);

    #[derive(Debug)]
    struct Shared {
        there: Mutex<bool>,
        came: Condvar,
    }

    impl Token {
        pub(super) fn new() -> Self {
            Self(Arc::new(Shared { there: Mutex::new(false), came: Condvar::new() }))
        }

        pub(super) fn park(&self) {
            let mut there = self.0.there.lock().unwrap_or_else(PoisonError::into_inner);
            while !*there {
                there = self.0.came.wait(there).unwrap_or_else(PoisonError::into_inner);
            }
            *there = false;
        }

        pub(super) fn unpark(&self) {
            *self.0.there.lock().unwrap_or_else(PoisonError::into_inner) = true;
            self.0.came.notify_one();
        }
    }
}

#[cfg(feature = "shuttle")]
mod controlled {
    use std::ops::{Deref, DerefMut};
    use std::time::Duration;

    use shuttle::sync::{PoisonError, TryLockError};
    use shuttle::thread;

    /// `parking_lot`'s mutex over shuttle's: a thread that panics poisons nothing.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        /// An unlocked mutex.
        pub const fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        /// Waits for the lock.
        pub fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard(Some(self.0.lock().unwrap_or_else(PoisonError::into_inner)))
        }

        /// The lock, if it is free.
        pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            match self.0.try_lock() {
                Ok(guard) => Some(MutexGuard(Some(guard))),
                Err(TryLockError::Poisoned(poisoned)) => {
                    Some(MutexGuard(Some(poisoned.into_inner())))
                }
                Err(TryLockError::WouldBlock) => None,
            }
        }
    }

    /// The lock is held. Others may go on right after its end too, for the sake of what comes next
    /// and is not controlled: a look at a `Notify`, the answer through a `oneshot`.
    #[derive(Debug)]
    pub struct MutexGuard<'a, T>(Option<shuttle::sync::MutexGuard<'a, T>>);

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.0.as_ref().expect("held until the guard is dropped")
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().expect("held until the guard is dropped")
        }
    }

    impl<T> Drop for MutexGuard<'_, T> {
        fn drop(&mut self) {
            self.0 = None;
            if !thread::panicking() {
                thread::sleep(Duration::ZERO);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_up_before_the_sleep_ends_it() {
        let parker = Parker::new();
        let unparker = parker.unparker();
        thread::spawn(move || unparker.unpark()).join().expect("a thread");
        parker.park();
    }
}
