//! Faults of a simulated disk.

use std::time::Duration;

use crate::units::BlockNo;

/// What a fault happens to.
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

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The operation fails with `errno` (EIO, ENOSPC). A write that has `landed` is on the disk all
    /// the same; without it nothing is. After a failed sync what it was to cover may be on the disk
    /// or not, and no later sync of this process makes it durable. (What is lost of it the next
    /// process does not see: it reads the device, past all caches of the host.)
    Error {
        /// What the caller gets.
        errno: i32,
        /// Whether a write or discard happened all the same.
        landed: bool,
    },
    /// A write or discard is acknowledged and never happens. A sync is acknowledged and covers
    /// nothing.
    Lost,
    /// A write goes to another place, a read comes from there.
    Misdirected {
        /// The first block that is hit; the operation must fit there.
        to: BlockNo,
    },
    /// A write goes so many blocks further on (or back), a read comes from there; not beyond the
    /// ends of the disk.
    Shifted(i64),
    /// It takes this long.
    Slow(Duration),
    /// It never completes. What was written may land or not when the power fails.
    Hung,
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What it happens to.
    pub op: FaultOp,
    /// Operations of that sort that are spared first, counted from the injection.
    pub after: u64,
    /// Whether it happens again and again from then on.
    pub sticky: bool,
    /// What goes wrong.
    pub effect: Effect,
}

/// A fault that has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strike {
    /// What it happened to.
    pub op: FaultOp,
    /// The first block of that; 0 for a sync.
    pub at: BlockNo,
    /// The first block of what it was done to instead.
    pub to: BlockNo,
    /// Blocks; none for a sync.
    pub blocks: u64,
}

/// The faults that are still to come, and those that have happened.
#[derive(Default)]
pub(super) struct Faults {
    waiting: Vec<Fault>,
    pub(super) strikes: Vec<Strike>,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        self.waiting.push(fault);
    }

    /// What goes wrong with the operation that is asked for now.
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
