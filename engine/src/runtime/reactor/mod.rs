//! The io_uring of this thread.
//!
//! ```text
//!   async fn (ops.rs) -- Op<T> future: owns T (buffers, descriptor) ----+
//!        |  start: entry + slot                                         | dropped early:
//!        v                                                              v T moves into the slot,
//!   submission queue --> kernel --> completion queue --> slot: result   and a cancel is sent
//!                                         ^
//!   other threads -- eventfd read, kept armed (unpark)
//! ```
//!
//! Invariants:
//! * Memory that the kernel may read or write is owned by the `Op` or by its slot until the
//!   completion has been taken: never by the caller, never freed early.
//! * The ring is torn down only after every operation that points to memory has completed
//!   ([`ReactorDriver`]'s drop).
//! * Wakers run without a borrow of the reactor.
//!
//! Only the thread that created the ring uses it (`SINGLE_ISSUER`), and the kernel processes
//! completions only when that thread asks for them (`DEFER_TASKRUN`): the running task is not
//! interrupted, and one system call serves many operations.

mod ops;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use io_uring::squeue::Entry;
use io_uring::types::{CancelBuilder, Fd};
use io_uring::{IoUring, opcode};
use rustix::event::{EventfdFlags, eventfd};
use slab::Slab;

use crate::error::{Error, ErrorKind, Result};
use crate::runtime::executor::{Driver, Parked, Unpark};
use crate::units::{to_u64, to_usize};

pub use ops::{
    SendPart, accept, device_command, punch_hole, read_at, recv, recv_buf, send, sleep, sync_data,
    write_all_at,
};

/// Entries of the submission queue: operations of one turn before a submission is forced.
const SUBMISSION_ENTRIES: u32 = 256;
/// Entries of the completion queue. Further completions wait in the kernel.
const COMPLETION_ENTRIES: u32 = 4096;

/// User data of entries without a slot.
const EVENT: u64 = u64::MAX;
const CANCEL: u64 = u64::MAX - 1;

/// Kind of an operation: determines which counter it belongs to and how an unwanted result is
/// released.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum OpKind {
    /// Read, write, sync or discard of the pool.
    Disk,
    /// Accept; its result is a new descriptor.
    Accept,
    /// A device command, which points to no memory. Only the end of the ring can cancel it, so the
    /// end of the ring does not wait for it.
    Command,
    /// Everything else.
    Other,
}

struct Slot {
    kind: OpKind,
    state: SlotState,
}

enum SlotState {
    Waiting(Waker),
    Done(i32),
    /// The future was dropped; what it owned stays here until the completion.
    Abandoned {
        _owned: Box<dyn Any>,
    },
}

struct Inner {
    ring: IoUring,
    slots: Slab<Slot>,
    /// Operations for which the end of the ring must wait, without the read of the eventfd.
    in_flight: usize,
    disk_in_flight: usize,
    event: Arc<OwnedFd>,
    /// Buffer for the counter of the eventfd.
    event_value: Box<u64>,
    event_armed: bool,
    /// Wakers to call as soon as nothing is borrowed.
    woken: Vec<Waker>,
}

/// The ring of one thread, as operations access it.
struct Reactor {
    inner: RefCell<Inner>,
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Reactor>>> = const { RefCell::new(None) };
}

fn current() -> Rc<Reactor> {
    let reactor = CURRENT.with(|current| current.borrow().clone());
    reactor.expect("I/O on a ring is done on a thread that has one")
}

/// Whether the calling thread has a ring.
#[must_use]
pub fn is_here() -> bool {
    CURRENT.with(|current| current.borrow().is_some())
}

/// Reads, writes and syncs of disks under way on this thread's ring.
///
/// # Panics
/// On a thread without a ring.
#[must_use]
pub fn disk_ops_in_flight() -> usize {
    current().inner.borrow().disk_in_flight
}

/// Submits everything queued now, before the thread blocks elsewhere.
///
/// # Panics
/// On a thread without a ring.
pub fn submit_now() {
    current().inner.borrow_mut().submit_pending();
}

/// The ring of the calling thread, in which its executor sleeps.
pub struct ReactorDriver {
    reactor: Rc<Reactor>,
}

impl ReactorDriver {
    /// Creates a ring and installs it as the calling thread's.
    ///
    /// # Errors
    /// `Unsupported` if the kernel has no io_uring or forbids it; `Busy` if the thread already has
    /// a ring.
    pub fn new() -> Result<Self> {
        if is_here() {
            return Err(Error::new(ErrorKind::Busy, "this thread already has an io_uring"));
        }
        let ring = build_ring().map_err(|e| {
            Error::new(
                ErrorKind::Unsupported,
                format!(
                    "io_uring is not available ({e}); allow it in the container's seccomp profile \
                     and in the sysctl kernel.io_uring_disabled"
                ),
            )
        })?;
        let event = eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|e| Error::io("creation of an eventfd", e.into()))?;
        let inner = Inner {
            ring,
            slots: Slab::new(),
            in_flight: 0,
            disk_in_flight: 0,
            event: Arc::new(event),
            event_value: Box::new(0),
            event_armed: false,
            woken: Vec::new(),
        };
        let reactor = Rc::new(Reactor { inner: RefCell::new(inner) });
        CURRENT.with(|current| current.borrow_mut().replace(Rc::clone(&reactor)));
        Ok(Self { reactor })
    }

    fn deliver(&self) {
        let mut woken = std::mem::take(&mut self.reactor.inner.borrow_mut().woken);
        for waker in woken.drain(..) {
            waker.wake();
        }
        // Keep the allocation, unless a waker has queued others already.
        let mut inner = self.reactor.inner.borrow_mut();
        if inner.woken.is_empty() {
            inner.woken = woken;
        }
    }
}

/// The best ring that this kernel supports: 6.1 and later the first, 5.19 the second.
fn build_ring() -> io::Result<IoUring> {
    let sized = || {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(COMPLETION_ENTRIES).setup_clamp();
        builder
    };
    sized()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(SUBMISSION_ENTRIES)
        .or_else(|_| sized().setup_coop_taskrun().setup_taskrun_flag().build(SUBMISSION_ENTRIES))
        .or_else(|_| sized().build(SUBMISSION_ENTRIES))
}

impl Driver for ReactorDriver {
    fn poll(&mut self) {
        {
            let mut inner = self.reactor.inner.borrow_mut();
            inner.arm_event();
            inner.submit_pending();
            inner.reap();
        }
        self.deliver();
    }

    fn park(&mut self) -> Parked {
        {
            let mut inner = self.reactor.inner.borrow_mut();
            inner.arm_event();
            // Any completion ends the wait, even one without a waker: it may be the unpark.
            if inner.reap() == 0 {
                // One call submits and waits.
                inner.enter(1);
                inner.reap();
            } else {
                inner.submit_pending();
            }
        }
        self.deliver();
        Parked::Awake
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        Arc::new(EventUnparker(Arc::clone(&self.reactor.inner.borrow().event)))
    }
}

impl Drop for ReactorDriver {
    fn drop(&mut self) {
        CURRENT.with(|current| current.borrow_mut().take());
        {
            let mut inner = self.reactor.inner.borrow_mut();
            let all = opcode::AsyncCancel2::new(CancelBuilder::any()).build().user_data(CANCEL);
            // SAFETY: the entry points to no memory.
            let cancelled = unsafe { inner.push(&all) };
            if let Err(error) = cancelled {
                tracing::error!(%error, "operations of a ring cannot be cancelled");
            }
            // The cancel ends socket waits; disk operations end by themselves.
            while inner.in_flight > 0 || inner.event_armed {
                inner.enter(1);
                inner.reap();
            }
        }
        self.deliver();
    }
}

struct EventUnparker(Arc<OwnedFd>);

impl Unpark for EventUnparker {
    fn unpark(&self) {
        // This fails only if the counter is about to overflow, and then the ring wakes anyway.
        let _ignored = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

impl Inner {
    /// Queues an entry; submits to make room if the queue is full.
    ///
    /// # Safety
    /// The memory that the entry points to stays valid until its completion has been reaped.
    unsafe fn push(&mut self, entry: &Entry) -> io::Result<()> {
        // SAFETY: the caller's promise.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.try_enter(0)?;
            self.reap();
        }
        Ok(())
    }

    fn arm_event(&mut self) {
        if self.event_armed {
            return;
        }
        let fd = Fd(self.event.as_raw_fd());
        let to = (&raw mut *self.event_value).cast::<u8>();
        let entry = opcode::Read::new(fd, to, 8).build().user_data(EVENT);
        // SAFETY: `event_value` is in a box of its own that lives as long as the ring.
        match unsafe { self.push(&entry) } {
            Ok(()) => self.event_armed = true,
            Err(error) => panic!("the wake-up of an io_uring cannot be armed: {error}"),
        }
    }

    /// Submits what is queued and lets the kernel deliver deferred completions; never blocks.
    fn submit_pending(&mut self) {
        let queue = self.ring.submission();
        let needed = !queue.is_empty() || queue.taskrun() || queue.cq_overflow();
        drop(queue);
        if needed {
            self.enter(0);
        }
    }

    fn enter(&mut self, want: usize) {
        if let Err(error) = self.try_enter(want) {
            panic!("io_uring_enter failed, the ring is unusable: {error}");
        }
    }

    /// Submits everything queued and waits for `want` completions.
    fn try_enter(&mut self, want: usize) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Too many completions are pending, or the kernel is short of memory for new
                // operations. Taking completions helps in both cases, here or in the next call.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => {
                    if self.reap() > 0 {
                        return Ok(());
                    }
                    std::thread::yield_now();
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Takes all available completions; returns their number.
    fn reap(&mut self) -> usize {
        let Self { ring, slots, woken, .. } = self;
        let mut taken = 0;
        let mut finished = 0;
        let mut disk_finished = 0;
        for completion in ring.completion() {
            taken += 1;
            match completion.user_data() {
                EVENT => self.event_armed = false,
                CANCEL => {}
                key => {
                    let key = to_usize(key);
                    let slot = &mut slots[key];
                    finished += usize::from(slot.kind != OpKind::Command);
                    disk_finished += usize::from(slot.kind == OpKind::Disk);
                    let done = SlotState::Done(completion.result());
                    match std::mem::replace(&mut slot.state, done) {
                        SlotState::Waiting(waker) => woken.push(waker),
                        SlotState::Abandoned { .. } => discard(&slots.remove(key)),
                        SlotState::Done(_) => unreachable!("an operation completes once"),
                    }
                }
            }
        }
        self.in_flight -= finished;
        self.disk_in_flight -= disk_finished;
        taken
    }
}

/// Releases a result that no future will take.
fn discard(slot: &Slot) {
    if let Slot { kind: OpKind::Accept, state: SlotState::Done(fd @ 0..) } = slot {
        // SAFETY: the kernel has just created this descriptor for us; nothing else owns it.
        drop(unsafe { OwnedFd::from_raw_fd(*fd) });
    }
}

/// An operation in the kernel. Resolves to what it owns and the kernel's result (a count, or a
/// negated errno).
struct Op<T: 'static> {
    reactor: Rc<Reactor>,
    state: OpState,
    owned: Option<T>,
}

enum OpState {
    Slot(usize),
    /// It could not be queued.
    Refused(i32),
    Taken,
}

/// Starts the operation `entry` on the ring of this thread.
///
/// # Safety
/// All memory that `entry` points to, and the descriptor it names, belong to `owned`, are used by
/// nothing else, and keep their addresses when `owned` is moved.
unsafe fn start<T: 'static>(kind: OpKind, entry: Entry, owned: T) -> Op<T> {
    let reactor = current();
    let mut inner = reactor.inner.borrow_mut();
    // The first poll sets the waker.
    let key = inner.slots.insert(Slot { kind, state: SlotState::Waiting(Waker::noop().clone()) });
    // SAFETY: `owned` lives in the operation, and afterwards in the slot, until the completion
    // has been reaped; the caller promises that it covers everything that the entry names.
    let pushed = unsafe { inner.push(&entry.user_data(to_u64(key))) };
    let state = match pushed {
        Ok(()) => {
            inner.in_flight += usize::from(kind != OpKind::Command);
            inner.disk_in_flight += usize::from(kind == OpKind::Disk);
            OpState::Slot(key)
        }
        Err(error) => {
            inner.slots.remove(key);
            OpState::Refused(-error.raw_os_error().unwrap_or(libc::EIO))
        }
    };
    drop(inner);
    Op { reactor, state, owned: Some(owned) }
}

// `owned` is never pinned: its own address does not matter, by the contract of `start`.
impl<T> Unpin for Op<T> {}

impl<T: 'static> Future for Op<T> {
    type Output = (T, i32);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let result = match self.state {
            OpState::Refused(result) => result,
            OpState::Taken => panic!("an operation was polled after it was done"),
            OpState::Slot(key) => {
                let mut inner = self.reactor.inner.borrow_mut();
                match &mut inner.slots[key].state {
                    SlotState::Waiting(waker) => {
                        waker.clone_from(context.waker());
                        return Poll::Pending;
                    }
                    SlotState::Done(result) => {
                        let result = *result;
                        inner.slots.remove(key);
                        result
                    }
                    SlotState::Abandoned { .. } => unreachable!("only a drop abandons"),
                }
            }
        };
        self.state = OpState::Taken;
        let owned = self.owned.take().expect("taken once, here");
        Poll::Ready((owned, result))
    }
}

impl<T: 'static> Drop for Op<T> {
    fn drop(&mut self) {
        let OpState::Slot(key) = self.state else { return };
        let mut inner = self.reactor.inner.borrow_mut();
        let slot = &mut inner.slots[key];
        if let SlotState::Done(_) = slot.state {
            discard(&inner.slots.remove(key));
            return;
        }
        slot.state = SlotState::Abandoned { _owned: Box::new(self.owned.take()) };
        let cancel = opcode::AsyncCancel::new(to_u64(key)).build().user_data(CANCEL);
        // SAFETY: the entry points to no memory.
        // If the cancel cannot be queued, nothing is lost: the operation ends by itself or with the
        // ring.
        let _ignored = unsafe { inner.push(&cancel) };
    }
}
