//! Faults of a simulated disk.

use std::time::Duration;

use crate::units::BlockNo;

/// Kind of operation that a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultOp {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A sync.
    Sync,
    /// A discard.
    Discard,
}

/// Effect of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The operation fails with `errno` (EIO, ENOSPC). A write that has `landed` is on the disk
    /// anyway, otherwise nothing of it is. After a failed sync the covered writes may be on the
    /// disk or not, and no later sync of this process makes them durable. (The next process does
    /// not see the lost ones: it reads from the device, not through the caches of the host.)
    Error {
        /// The error that the caller gets.
        errno: i32,
        /// Whether a write or discard happens anyway.
        landed: bool,
    },
    /// A write or discard is acknowledged but never happens; a sync is acknowledged but covers
    /// nothing.
    Lost,
    /// A write goes to another place; a read comes from there.
    Misdirected {
        /// The first block there; the operation must fit.
        to: BlockNo,
    },
    /// A write goes this many blocks forward (or back), within the disk; a read comes from there.
    Shifted(i64),
    /// The operation takes this long.
    Slow(Duration),
    /// The operation never completes. A write may land or not when the power fails.
    Hung,
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Kind of operation that it hits.
    pub op: FaultOp,
    /// Operations of that kind, from the injection on, that it spares first.
    pub after: u64,
    /// Whether it then hits every operation of that kind.
    pub sticky: bool,
    /// Its effect.
    pub effect: Effect,
}

/// A fault that has struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strike {
    /// The operation that it hit.
    pub op: FaultOp,
    /// The first block of the request; 0 for a sync.
    pub at: BlockNo,
    /// The first block where the operation really happened.
    pub to: BlockNo,
    /// Number of blocks; 0 for a sync.
    pub blocks: u64,
}

/// Pending faults, and those that have struck.
#[derive(Default)]
pub(super) struct Faults {
    waiting: Vec<Fault>,
    pub(super) strikes: Vec<Strike>,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        self.waiting.push(fault);
    }

    /// The effect on the operation that is requested now, if any.
    pub(super) fn next(&mut self, op: FaultOp) -> Option<Effect> {
        let mut effect = None;
        self.waiting.retain_mut(|fault| {
            if fault.op != op {
                return true;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return true;
            }
            effect.get_or_insert(fault.effect);
            fault.sticky
        });
        effect
    }
}
