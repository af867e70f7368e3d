//! What threads settle without a lock, in every order of threads and of memory: `loom`. That is one
//! thing, the mark of a task in the queue of its executor. Everything else that threads share is behind
//! locks, see `engine/src/runtime/sync.rs` and `shuttle.rs`.

/// Where `queued.rs` looks for its atomic.
mod sync {
    pub(crate) use loom::sync::atomic;
}
#[path = "../src/runtime/queued.rs"]
mod queued;

use std::collections::VecDeque;

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

use queued::Queued;

struct Task {
    mark: Queued,
    /// As the executor's: what stands in it is polled.
    queue: Mutex<VecDeque<()>>,
    /// What each thread writes before it wakes the task. Nothing orders it but the wake-up.
    written: Vec<AtomicBool>,
}

impl Task {
    fn wake(&self) {
        if self.mark.enter() {
            let mut queue = self.queue.lock().expect("nobody panics");
            queue.push_back(());
            assert_eq!(queue.len(), 1, "the task stands in the queue twice");
        }
    }

    /// Takes the task from the queue and polls it: what it sees. `None` if it is not there.
    fn poll(&self) -> Option<Vec<bool>> {
        self.queue.lock().expect("nobody panics").pop_front()?;
        self.mark.leave();
        Some(self.written.iter().map(|one| one.load(Ordering::Relaxed)).collect())
    }
}

/// However many threads wake a task while it is polled: the last poll sees what all have written.
#[test]
fn no_wake_up_is_lost() {
    for wakers in 1..=2 {
        loom::model(move || {
            let written = (0..wakers).map(|_| AtomicBool::new(false)).collect();
            let queue = Mutex::new(VecDeque::from([()]));
            let task = Arc::new(Task { mark: Queued::new(), queue, written });
            let threads = (0..wakers).map(|number| {
                let task = Arc::clone(&task);
                thread::spawn(move || {
                    task.written[number].store(true, Ordering::Relaxed);
                    task.wake();
                })
            });
            let threads: Vec<_> = threads.collect();
            let mut seen = task.poll().expect("it stands there from the beginning");
            for thread in threads {
                thread.join().expect("a thread");
            }
            while let Some(more) = task.poll() {
                seen = more;
            }
            assert!(seen.iter().all(|one| *one), "a wake-up was lost: {seen:?}");
        });
    }
}
