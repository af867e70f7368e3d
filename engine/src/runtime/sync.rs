//! L0: locks, atomics and threads for everything that several shards share: pool, executor, park,
//! simulated disk. Ordinary builds use `parking_lot` and the standard library under other names.
//! Builds with the feature `shuttle` use the crate of that name: all threads of a test take turns
//! on one thread. At each lock, unlock, atomic operation, thread start and sleep a scheduler
//! chooses the next thread, at random, but reproducibly from the seed. An engine built this way
//! runs only in such tests.
//!
//! ```text
//!  ordinary:  sync::Mutex = parking_lot::Mutex       sync::thread = std::thread    sync::Parker: park
//!  shuttle:   sync::Mutex { shuttle::sync::Mutex }   shuttle::thread               a token of its own
//! ```
//!
//! The following is **not** controlled. Why this hides no bug:
//! * `tokio::sync` (`Notify`, `oneshot`, `mpsc`, the asynchronous `Mutex`): its operations never
//!   block a thread and never yield to another one halfway, so each is one step. A task that they
//!   wake is put into the queue of an executor, behind a [`Mutex`] of this module, where the
//!   scheduler chooses; it also chooses wherever such a lock is released. Two consecutive
//!   operations of this kind are one step.
//! * Atomics that are used only under a lock (`map/cache.rs`): no other thread runs there.
//! * [`Counter`]: its value is displayed only; no decision depends on it.
//! * Weak memory: every atomic operation is sequentially consistent under `shuttle`. Code that
//!   needs an ordering gives the reason beside it.
//! * The ring of the kernel (`reactor/`, `shard.rs`), and the layers above the pool.

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

/// A counter for display.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `by`.
    pub fn add(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    /// The current value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A thread sleeps in it until another one unparks it. Only for the thread that created it. An
/// unpark before the sleep ends the sleep at once.
#[derive(Debug)]
pub struct Parker {
    unparker: Unparker,
}

/// Ends the sleep of a [`Parker`] from any thread.
#[derive(Clone, Debug)]
pub struct Unparker(imp::Token);

impl Parker {
    /// A parker for the calling thread.
    #[must_use]
    pub fn new() -> Self {
        Self { unparker: Unparker(imp::Token::new()) }
    }

    /// Sleeps until unparked; can return spuriously.
    pub fn park(&self) {
        self.unparker.0.park();
    }

    /// The handle that unparks it.
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

    /// The token that the standard library keeps per thread.
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

    /// A token of our own: shuttle's threads can wake up spuriously, which would mask a lost
    /// wake-up.
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

    /// `parking_lot`'s mutex interface on shuttle's mutex: a thread that panics poisons nothing.
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

        /// Takes the lock if it is free.
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

    /// The guard of the lock. The scheduler can also switch threads right after the unlock, because
    /// the next step may not be controlled: a check of a `Notify`, an answer through a `oneshot`.
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
