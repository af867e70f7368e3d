//! Faults of a simulated disk.

use crate::units::BlockNo;

/// What a fault happens to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// or not, and no later sync makes it durable.
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

/// The faults that are still to come.
#[derive(Default)]
pub(super) struct Faults {
    waiting: Vec<Fault>,
    struck: u64,
}

impl Faults {
    pub(super) fn add(&mut self, fault: Fault) {
        self.waiting.push(fault);
    }

    pub(super) const fn struck(&self) -> u64 {
        self.struck
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
        self.struck += u64::from(effect.is_some());
        effect
    }
}
