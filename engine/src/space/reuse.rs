//! When a freed block may be allocated again. One rule, one place (I4).
//!
//! A block whose count fell to 0 in checkpoint *n* may be allocated once
//! 1. checkpoint *n* is durable: nothing that a crash could bring back refers to it;
//! 2. every reader that looked the block up before *n* was published has finished.
//!
//! It is free then, and waits for no discard. Later it may be taken out of the free blocks again
//! to be discarded, and
//! 3. may be allocated once that discard is over.

use std::collections::{BTreeMap, VecDeque};

use super::Run;

/// Freed blocks on their way back, and the readers that hold them up.
#[derive(Default)]
pub struct Reuse {
    epoch: u64,
    readers: BTreeMap<u64, u64>,
    waiting: VecDeque<Batch>,
    /// One at a time.
    discarding: Option<Run>,
}

struct Batch {
    /// Readers of this epoch or an earlier one may still look at the blocks.
    epoch: u64,
    runs: Vec<Run>,
}

impl Reuse {
    /// A reader looks blocks up; the token goes back to [`Self::unpin`].
    pub fn pin(&mut self) -> u64 {
        *self.readers.entry(self.epoch).or_insert(0) += 1;
        self.epoch
    }

    /// The reader that got `token` has finished.
    pub fn unpin(&mut self, token: u64) {
        let count = self.readers.get_mut(&token).expect("a pinned epoch has readers");
        *count -= 1;
        if *count == 0 {
            self.readers.remove(&token);
        }
    }

    /// A checkpoint that no longer refers to `runs` is durable (1).
    pub fn freed(&mut self, runs: Vec<Run>) {
        if runs.is_empty() {
            return;
        }
        self.waiting.push_back(Batch { epoch: self.epoch, runs });
        self.epoch += 1;
    }

    /// Free blocks are being discarded (3).
    pub fn begin_discard(&mut self, run: Run) {
        assert!(self.discarding.is_none(), "one discard at a time");
        self.discarding = Some(run);
    }

    /// The discard is over, if one was under way; its blocks.
    pub fn end_discard(&mut self) -> Option<Run> {
        self.discarding.take()
    }

    /// The blocks that are being discarded.
    #[must_use]
    pub const fn discarding(&self) -> Option<Run> {
        self.discarding
    }

    /// The runs that may be allocated from now on.
    pub fn reusable(&mut self) -> Vec<Run> {
        let mut runs = Vec::new();
        while let Some(batch) = self.waiting.front() {
            if self.is_read(batch.epoch) {
                break;
            }
            runs.append(&mut self.waiting.pop_front().expect("front exists").runs);
        }
        runs
    }

    /// Runs that are free on the disk and may not be allocated yet, or not just now.
    pub fn waiting(&self) -> impl Iterator<Item = &Run> {
        self.waiting.iter().flat_map(|batch| &batch.runs).chain(&self.discarding)
    }

    fn is_read(&self, epoch: u64) -> bool {
        self.readers.first_key_value().is_some_and(|(&oldest, _)| oldest <= epoch) // (2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::BlockNo;

    fn run(n: u64) -> Run {
        Run { block: BlockNo::new(n), len: 1 }
    }

    #[test]
    fn readers_hold_blocks_back_that_were_freed_under_them() {
        let mut reuse = Reuse::default();
        let old = reuse.pin();
        let too = reuse.pin();
        reuse.freed(vec![run(1)]);
        let young = reuse.pin();
        reuse.freed(vec![run(2)]);
        assert!(reuse.reusable().is_empty(), "readers may still look at block 1");
        reuse.unpin(old);
        assert!(reuse.reusable().is_empty(), "one of them may");
        assert_eq!(reuse.waiting().count(), 2);
        reuse.unpin(too);
        assert_eq!(reuse.reusable(), vec![run(1)]);
        reuse.unpin(young);
        assert_eq!(reuse.reusable(), vec![run(2)]);
        let later = reuse.pin();
        reuse.unpin(later);
        reuse.freed(vec![run(3)]);
        assert_eq!(reuse.reusable(), vec![run(3)], "nobody is left");
        assert_eq!(reuse.waiting().count(), 0);
    }

    #[test]
    fn a_reader_that_comes_later_holds_nothing_back() {
        let mut reuse = Reuse::default();
        reuse.freed(vec![run(1)]);
        let _later = reuse.pin();
        assert_eq!(reuse.reusable(), vec![run(1)]);
    }

    #[test]
    fn what_is_being_discarded_waits() {
        let mut reuse = Reuse::default();
        assert_eq!(reuse.end_discard(), None);
        reuse.begin_discard(run(1));
        reuse.freed(vec![run(2)]);
        assert_eq!(reuse.waiting().count(), 2);
        assert_eq!(reuse.reusable(), vec![run(2)], "a discard holds up its own blocks alone");
        assert_eq!(reuse.waiting().collect::<Vec<_>>(), [&run(1)]);
        assert_eq!((reuse.discarding(), reuse.end_discard()), (Some(run(1)), Some(run(1))));
        assert_eq!(reuse.waiting().count(), 0);
    }
}
