//! A gate in front of a disk: it holds operations until they are let through, so that a test
//! controls their order.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::disk::Disk;
use crate::disk::sim::FaultOp;
use crate::error::Result;
use crate::runtime::{Buf, Clock, LocalFuture};
use crate::units::BlockNo;

/// How often a test polls the gate before it fails.
const PATIENCE: usize = 1000;

/// The gate. Cheap to clone; all clones share one gate.
#[derive(Clone, Default)]
pub struct Gate(Rc<State>);

#[derive(Default)]
struct State {
    holds: RefCell<Vec<Hold>>,
    waiting: Cell<usize>,
    /// How often the gate was opened.
    opened: Cell<u64>,
    event: Notify,
}

/// A rule that holds operations.
struct Hold {
    op: FaultOp,
    at: Option<BlockNo>,
    left: usize,
}

impl Gate {
    /// The given disk behind this gate.
    #[must_use]
    pub fn before(&self, disk: Rc<dyn Disk>) -> Rc<dyn Disk> {
        Rc::new(Gated { gate: self.clone(), disk })
    }

    /// Holds the next `most` operations of this kind; with `at`, only those that start there.
    pub fn hold(&self, op: FaultOp, at: Option<BlockNo>, most: usize) {
        self.0.holds.borrow_mut().push(Hold { op, at, left: most });
    }

    /// Lets all held and all later operations through.
    pub fn open(&self) {
        self.0.holds.borrow_mut().clear();
        self.0.opened.set(self.0.opened.get() + 1);
        self.0.event.notify_waiters();
    }

    /// Number of held operations.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.waiting.get()
    }

    /// Lets other I/O continue until `count` operations are held.
    ///
    /// # Panics
    /// If they do not arrive.
    pub async fn until_waiting(&self, disk: &Rc<dyn Disk>, count: usize) {
        for _ in 0..PATIENCE {
            if self.waiting() >= count {
                return;
            }
            pass_time(disk).await;
        }
        panic!("{} operations wait at the gate, not {count}", self.waiting());
    }

    async fn pass(&self, op: FaultOp, at: BlockNo) {
        let is_held = {
            let mut holds = self.0.holds.borrow_mut();
            let hold = holds
                .iter_mut()
                .find(|hold| hold.op == op && hold.left > 0 && hold.at.is_none_or(|a| a == at));
            hold.map(|hold| hold.left -= 1).is_some()
        };
        if !is_held {
            return;
        }
        self.0.waiting.set(self.waiting() + 1);
        let opened = self.0.opened.get();
        while self.0.opened.get() == opened {
            self.0.event.notified().await;
        }
        self.0.waiting.set(self.waiting() - 1);
    }
}

/// Lets some I/O of other tasks complete.
pub async fn pass_time(disk: &Rc<dyn Disk>) {
    drop(disk.read(BlockNo::new(0), Buf::new(1)).await);
}

struct Gated {
    gate: Gate,
    disk: Rc<dyn Disk>,
}

impl Clock for Gated {
    fn now(&self) -> Duration {
        self.disk.now()
    }

    fn sleep(&self, time: Duration) -> LocalFuture<'_, ()> {
        self.disk.sleep(time)
    }
}

impl Disk for Gated {
    fn len_bytes(&self) -> u64 {
        self.disk.len_bytes()
    }

    fn read(&self, at: BlockNo, buf: Buf) -> LocalFuture<'_, (Buf, Result<()>)> {
        Box::pin(async move {
            self.gate.pass(FaultOp::Read, at).await;
            self.disk.read(at, buf).await
        })
    }

    fn write(&self, at: BlockNo, bufs: Vec<Buf>) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.gate.pass(FaultOp::Write, at).await;
            self.disk.write(at, bufs).await
        })
    }

    fn sync(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.gate.pass(FaultOp::Sync, BlockNo::new(0)).await;
            self.disk.sync().await
        })
    }

    fn discard(&self, at: BlockNo, count: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.gate.pass(FaultOp::Discard, at).await;
            self.disk.discard(at, count).await
        })
    }

    fn extend(&self, len_bytes: u64) -> LocalFuture<'_, Result<()>> {
        self.disk.extend(len_bytes)
    }
}
