//! A single-threaded executor for futures that stay on their thread.
//!
//! ```text
//!   wake (any thread) --> ready queue (FIFO) --> one turn: poll each task that is ready
//!                              ^                          |
//!                              |                          v  nothing ready
//!                        completions <-- Driver: poll / spin / park (blocks in the kernel)
//! ```
//!
//! Invariants:
//! * Tasks are polled in the order in which they became ready. With a deterministic [`Driver`] a
//!   whole run is deterministic.
//! * The driver is polled for completions only when no task is ready (or after `TURNS_PER_POLL`
//!   turns), so that all I/O of one turn is submitted together.
//! * A wake allocates nothing: each task has one waker for its life. A waker that outlives its task
//!   does nothing, because the identity of a task (slot and serial number) is never reused.
//!
//! Timers and I/O belong to the driver.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::hint;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use slab::Slab;

use crate::runtime::LocalFuture;
use crate::runtime::queued::Queued;
use crate::runtime::sync::thread::{self, ThreadId};
use crate::runtime::sync::{Mutex, thread_local};

/// Wakes a thread that is blocked in [`Driver::park`].
pub trait Unpark: Send + Sync {
    /// Makes the current or the next `park` return. Cheap enough for needless calls.
    fn unpark(&self);
}

/// How a [`Driver::park`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parked {
    /// Something may have become ready.
    Awake,
    /// Nothing will ever complete again (a simulated machine lost its power).
    Halted,
}

/// Performs the I/O of an executor.
pub trait Driver {
    /// Submits queued operations and delivers completions. Never blocks.
    fn poll(&mut self);

    /// Submits queued operations, then blocks until one completes or the driver is unparked.
    fn park(&mut self) -> Parked;

    /// Whether nothing will ever complete again. The executor then polls no more tasks.
    fn halted(&self) -> bool {
        false
    }

    /// The handle that unparks it from any thread.
    fn unparker(&self) -> Arc<dyn Unpark>;
}

/// Turns after which the driver is polled even though tasks are still ready, so that a task that
/// is always ready cannot starve the I/O.
const TURNS_PER_POLL: u32 = 16;

/// Approximate cost of waking a sleeping core on a virtual machine. Spinning would have paid for an
/// idle period that is longer than the spin by no more than this.
const WAKE_COST: Duration = Duration::from_micros(25);
/// Maximum of the score that decides about spinning, and the score from which on it spins.
const SPIN_SCORE_MAX: u32 = 16;
const SPIN_SCORE_ON: u32 = 8;
/// CPU pauses between two polls of the rings while spinning (about 1 us).
const SPIN_PAUSES: u32 = 16;

/// Slot of the future passed to `block_on`.
const MAIN_SLOT: usize = usize::MAX;

#[derive(Clone, Copy, PartialEq, Eq)]
struct TaskId {
    slot: usize,
    serial: u64,
}

/// State of the executor that other threads access.
struct Shared {
    queue: Mutex<Queue>,
    unparker: Arc<dyn Unpark>,
}

struct Queue {
    ready: VecDeque<TaskId>,
    /// The thread of the executor, if it is blocked or about to block: another thread that adds a
    /// task must unpark it. The thread itself adds tasks when it was woken and delivers
    /// completions; unparking itself would only cost a system call.
    sleeping: Option<ThreadId>,
}

impl Shared {
    fn push(&self, id: TaskId) {
        let kick = {
            let mut queue = self.queue.lock();
            queue.ready.push_back(id);
            queue.sleeping.take().is_some_and(|sleeper| sleeper != thread::current().id())
        };
        if kick {
            self.unparker.unpark();
        }
    }
}

struct TaskWaker {
    shared: Arc<Shared>,
    id: TaskId,
    /// Set while the task is in the ready queue: then a second wake adds nothing.
    queued: Queued,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.enter() {
            self.shared.push(self.id);
        }
    }
}

struct Task {
    handle: Arc<TaskWaker>,
    waker: Waker,
    /// `None` while the task is being polled, so that it can spawn other tasks.
    future: Option<LocalFuture<'static, ()>>,
}

/// State of the executor that tasks on its thread access.
struct Local {
    tasks: RefCell<Slab<Task>>,
    next_serial: Cell<u64>,
    shared: Arc<Shared>,
}

impl Local {
    fn new_waker(&self, slot: usize) -> Arc<TaskWaker> {
        let serial = self.next_serial.get();
        self.next_serial.set(serial + 1);
        let id = TaskId { slot, serial };
        // A new task starts out queued: its first poll needs no wake.
        let handle = TaskWaker { shared: Arc::clone(&self.shared), id, queued: Queued::new() };
        self.shared.push(id);
        Arc::new(handle)
    }

    fn spawn(&self, future: LocalFuture<'static, ()>) {
        let mut tasks = self.tasks.borrow_mut();
        let entry = tasks.vacant_entry();
        let handle = self.new_waker(entry.key());
        let waker = Waker::from(Arc::clone(&handle));
        entry.insert(Task { handle, waker, future: Some(future) });
    }

    fn poll_task(&self, id: TaskId) {
        let (mut future, waker) = {
            let mut tasks = self.tasks.borrow_mut();
            let Some(task) = tasks.get_mut(id.slot).filter(|task| task.handle.id == id) else {
                return;
            };
            // Cleared before the poll: a wake during the poll must queue the task again.
            task.handle.queued.leave();
            let Some(future) = task.future.take() else { return };
            (future, task.waker.clone())
        };
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Pending => self.tasks.borrow_mut()[id.slot].future = Some(future),
            Poll::Ready(()) => {
                let task = self.tasks.borrow_mut().remove(id.slot);
                // Dropped without a borrow, because the values that they own may wake or spawn
                // tasks.
                drop((future, task));
            }
        }
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Local>>> = const { RefCell::new(None) };
}

/// Makes an executor the current one of its thread for the duration of a `block_on`.
struct Entered;

impl Entered {
    fn new(local: &Rc<Local>) -> Self {
        CURRENT.with(|current| {
            let before = current.borrow_mut().replace(Rc::clone(local));
            assert!(before.is_none(), "block_on inside block_on would deadlock the thread");
        });
        Self
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.with(|current| current.borrow_mut().take());
    }
}

/// Starts `future` as a task on this thread's executor, without waiting for it. The task runs until
/// it ends or the executor is dropped.
///
/// # Panics
/// If this thread is not inside [`Executor::block_on`].
pub fn spawn_local(future: impl Future<Output = ()> + 'static) {
    let local = CURRENT.with(|current| current.borrow().clone());
    let local = local.expect("spawn_local is called from a task of an executor");
    local.spawn(Box::pin(future));
}

/// Resolves once every task that is ready now has been polled: this is where a batch closes. Costs
/// one pass through the ready queue.
pub fn end_of_turn() -> EndOfTurn {
    EndOfTurn { waited: false }
}

/// Future of [`end_of_turn`].
#[must_use = "futures do nothing unless awaited"]
pub struct EndOfTurn {
    waited: bool,
}

impl Future for EndOfTurn {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.waited, true) {
            return Poll::Ready(());
        }
        // The queue is first in, first out: this task goes after all that are ready now.
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Decides whether to spin before sleeping. A sleeping core takes 25 us or more to wake up, and an
/// I/O or a client's next request often arrives sooner. The score follows how many of the last idle
/// periods were short enough for spinning to have paid. An idle or a slow machine never spins.
struct Spin {
    limit: Duration,
    score: u32,
}

impl Spin {
    fn pays(&self) -> bool {
        self.score >= SPIN_SCORE_ON
    }

    fn learn(&mut self, idle: Duration) {
        self.score = if idle <= self.limit + WAKE_COST {
            (self.score + 1).min(SPIN_SCORE_MAX)
        } else {
            self.score.saturating_sub(1)
        };
    }
}

/// The executor of one thread, with the driver in which it sleeps.
pub struct Executor<D: Driver> {
    local: Rc<Local>,
    /// The tasks still to be polled in this turn.
    turn: VecDeque<TaskId>,
    turns_since_poll: u32,
    spin: Spin,
    driver: D,
}

impl<D: Driver> Executor<D> {
    /// An executor that sleeps as soon as no task is ready.
    pub fn new(driver: D) -> Self {
        Self::with_spin(driver, Duration::ZERO)
    }

    /// An executor that spins for up to `spin` before it sleeps, as long as spinning pays.
    pub fn with_spin(driver: D, spin: Duration) -> Self {
        let queue = Mutex::new(Queue { ready: VecDeque::new(), sleeping: None });
        let shared = Arc::new(Shared { queue, unparker: driver.unparker() });
        let tasks = RefCell::new(Slab::new());
        Self {
            local: Rc::new(Local { tasks, next_serial: Cell::new(0), shared }),
            turn: VecDeque::new(),
            turns_since_poll: 0,
            spin: Spin { limit: spin, score: 0 },
            driver,
        }
    }

    /// The driver, for queries or configuration between two runs.
    pub fn driver(&mut self) -> &mut D {
        &mut self.driver
    }

    /// Runs all tasks until `future` is done. Tasks that are not done by then stay and continue in
    /// the next call.
    ///
    /// # Panics
    /// If the driver halts; use [`Self::run`] with a driver that can halt.
    pub fn block_on<F: Future>(&mut self, future: F) -> F::Output {
        self.run(future).expect("the driver of this executor never halts")
    }

    /// As [`Self::block_on`]; `None` if the driver halted before `future` was done.
    pub fn run<F: Future>(&mut self, future: F) -> Option<F::Output> {
        let _entered = Entered::new(&self.local);
        let mut future = pin!(future);
        let main = self.local.new_waker(MAIN_SLOT);
        let waker = Waker::from(Arc::clone(&main));
        let mut context = Context::from_waker(&waker);
        loop {
            while let Some(id) = self.turn.pop_front() {
                let mut polled = Poll::Pending;
                if id == main.id {
                    main.queued.leave();
                    polled = future.as_mut().poll(&mut context);
                } else {
                    self.local.poll_task(id);
                }
                if self.driver.halted() {
                    return None;
                }
                if let Poll::Ready(output) = polled {
                    return Some(output);
                }
            }
            self.turns_since_poll += 1;
            if self.turns_since_poll >= TURNS_PER_POLL {
                self.turns_since_poll = 0;
                self.driver.poll();
            }
            if !self.take_ready() && self.idle() == Parked::Halted {
                return None;
            }
        }
    }

    /// Starts a turn with all ready tasks; returns false if there are none.
    fn take_ready(&mut self) -> bool {
        debug_assert!(self.turn.is_empty(), "a turn begins when the one before has ended");
        std::mem::swap(&mut self.local.shared.queue.lock().ready, &mut self.turn);
        !self.turn.is_empty()
    }

    /// Waits until a task is ready.
    fn idle(&mut self) -> Parked {
        self.turns_since_poll = 0;
        if self.spin.limit.is_zero() {
            return self.sleep();
        }
        let start = Instant::now();
        let parked = if self.spin.pays() && self.spin_until_ready(start) {
            Parked::Awake
        } else {
            self.sleep()
        };
        self.spin.learn(start.elapsed());
        parked
    }

    fn spin_until_ready(&mut self, start: Instant) -> bool {
        loop {
            self.driver.poll();
            if !self.local.shared.queue.lock().ready.is_empty() {
                return true;
            }
            if start.elapsed() >= self.spin.limit {
                return false;
            }
            for _ in 0..SPIN_PAUSES {
                hint::spin_loop();
            }
        }
    }

    fn sleep(&mut self) -> Parked {
        {
            // Set under the lock of the queue: a thread that adds a task from now on unparks this
            // one.
            let mut queue = self.local.shared.queue.lock();
            if !queue.ready.is_empty() {
                return Parked::Awake;
            }
            queue.sleeping = Some(thread::current().id());
        }
        let parked = self.driver.park();
        self.local.shared.queue.lock().sleeping = None;
        parked
    }
}

impl<D: Driver> Drop for Executor<D> {
    fn drop(&mut self) {
        // Before the driver and without a borrow, because the tasks may use both when dropped.
        let tasks = std::mem::take(&mut *self.local.tasks.borrow_mut());
        drop(tasks);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use tokio::sync::{Notify, mpsc, oneshot};

    use super::*;
    use crate::runtime::park::ThreadDriver;

    fn executor() -> Executor<ThreadDriver> {
        Executor::new(ThreadDriver::new())
    }

    #[test]
    fn woken_by_another_thread() {
        for spin in [Duration::ZERO, Duration::from_micros(200)] {
            let mut executor = Executor::with_spin(ThreadDriver::new(), spin);
            let (there, mut here) = mpsc::unbounded_channel();
            let (back, mut from_here) = mpsc::unbounded_channel();
            let echo = thread::spawn(move || {
                while let Some(number) = from_here.blocking_recv() {
                    there.send(number).unwrap();
                }
            });
            executor.block_on(async move {
                for number in 0..10_000 {
                    back.send(number).unwrap();
                    assert_eq!(here.recv().await, Some(number));
                }
            });
            echo.join().unwrap();
        }
    }

    #[test]
    fn many_tasks_in_order() {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let run = Rc::clone(&seen);
        executor().block_on(async move {
            let (done, mut all_done) = mpsc::channel::<()>(1);
            for number in 0..10_000 {
                let (seen, done) = (Rc::clone(&run), done.clone());
                spawn_local(async move {
                    end_of_turn().await;
                    seen.borrow_mut().push(number);
                    drop(done);
                });
            }
            drop(done);
            assert_eq!(all_done.recv().await, None);
        });
        assert!(seen.borrow().iter().copied().eq(0..10_000));
    }

    #[test]
    fn end_of_turn_comes_after_all_that_is_ready() {
        let log = Rc::new(RefCell::new(Vec::new()));
        let run = Rc::clone(&log);
        executor().block_on(async move {
            for name in ["a", "b", "c"] {
                let log = Rc::clone(&run);
                spawn_local(async move { log.borrow_mut().push(name) });
            }
            end_of_turn().await;
            run.borrow_mut().push("end");
        });
        assert_eq!(*log.borrow(), ["a", "b", "c", "end"]);
    }

    #[test]
    fn a_batch_gathers_the_requests_of_a_turn() {
        // Each task adds its request; the first one waits for the end of the turn and takes them
        // all.
        let gathered = executor().block_on(async {
            let requests = Rc::new(RefCell::new(Vec::new()));
            let (reply, batch) = oneshot::channel();
            let mut reply = Some(reply);
            for number in 0..100 {
                let (requests, reply) = (Rc::clone(&requests), reply.take());
                spawn_local(async move {
                    requests.borrow_mut().push(number);
                    if let Some(reply) = reply {
                        end_of_turn().await;
                        reply.send(requests.borrow().len()).unwrap();
                    }
                });
            }
            batch.await.unwrap()
        });
        assert_eq!(gathered, 100);
    }

    #[test]
    fn a_waker_may_outlive_its_task() {
        let mut executor = executor();
        let waker = executor.block_on(async {
            let (send, receive) = oneshot::channel();
            spawn_local(async move {
                let own = std::future::poll_fn(|context| Poll::Ready(context.waker().clone()));
                send.send(own.await).ok();
            });
            receive.await.unwrap()
        });
        let polls = executor.block_on(async move {
            let polls = Rc::new(Cell::new(0));
            let counted = Rc::clone(&polls);
            // This task takes the slot of the task that has ended.
            spawn_local(std::future::poll_fn(move |_| {
                counted.set(counted.get() + 1);
                Poll::Pending
            }));
            end_of_turn().await;
            waker.wake_by_ref();
            end_of_turn().await;
            end_of_turn().await;
            polls.get()
        });
        assert_eq!(polls, 1, "only its own waker polls a task");
    }

    #[test]
    fn unfinished_tasks_go_on_in_the_next_run_and_are_dropped_at_the_end() {
        let mut executor = executor();
        let notify = Rc::new(Notify::new());
        let (waiting, done) = (Rc::clone(&notify), Rc::new(Cell::new(false)));
        let set = Rc::clone(&done);
        executor.block_on(async move {
            let kept = Rc::clone(&set);
            spawn_local(async move {
                waiting.notified().await;
                set.set(true);
                // Never done: dropped with the executor.
                std::future::pending::<()>().await;
                drop(kept);
            });
            end_of_turn().await;
        });
        executor.block_on(async {
            notify.notify_one();
            end_of_turn().await;
            end_of_turn().await;
        });
        assert!(done.get());
        drop(executor);
        assert_eq!(Rc::strong_count(&done), 1);
    }
}
