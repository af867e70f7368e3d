//! When a freed block may be allocated again. One rule, one place (I4).
//!
//! A block whose count fell to 0 in checkpoint *n* may be allocated once
//! 1. checkpoint *n* is durable: nothing that a crash could bring back refers to it;
//! 2. every reader that looked the block up before *n* was published has finished;
//! 3. its discard, if the pool discards, is done.

use std::collections::{BTreeMap, VecDeque};

use super::Run;

/// Freed blocks on their way back, and the readers that hold them up.
#[derive(Default)]
pub struct Reuse {
    epoch: u64,
    readers: BTreeMap<u64, u64>,
    waiting: VecDeque<Batch>,
}

struct Batch {
    /// Readers of this epoch or an earlier one may still look at the blocks.
    epoch: u64,
    runs: Vec<Run>,
    discarded: bool,
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

    /// A checkpoint that no longer refers to `runs` is durable (1). `discard`: they must be
    /// discarded first, which [`Self::discarded`] reports.
    pub fn freed(&mut self, runs: Vec<Run>, discard: bool) {
        if runs.is_empty() {
            return;
        }
        self.waiting.push_back(Batch { epoch: self.epoch, runs, discarded: !discard });
        self.epoch += 1;
    }

    /// Runs whose readers have finished and that wait for their discard.
    #[must_use]
    pub fn to_discard(&self) -> Option<(u64, &[Run])> {
        let batch = self.waiting.iter().find(|b| !b.discarded)?;
        (!self.is_read(batch.epoch)).then_some((batch.epoch, &batch.runs))
    }

    /// The discard of the batch of `epoch` is done (3).
    pub fn discarded(&mut self, epoch: u64) {
        for batch in self.waiting.iter_mut().filter(|b| b.epoch == epoch) {
            batch.discarded = true;
        }
    }

    /// The runs that may be allocated from now on.
    pub fn reusable(&mut self) -> Vec<Run> {
        let mut runs = Vec::new();
        while let Some(batch) = self.waiting.front() {
            if self.is_read(batch.epoch) || !batch.discarded {
                break;
            }
            runs.append(&mut self.waiting.pop_front().expect("front exists").runs);
        }
        runs
    }

    /// Runs that are free on the disk and not yet reusable.
    pub fn waiting(&self) -> impl Iterator<Item = &Run> {
        self.waiting.iter().flat_map(|batch| &batch.runs)
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
        reuse.freed(vec![run(1)], false);
        let young = reuse.pin();
        reuse.freed(vec![run(2)], false);
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
        reuse.freed(vec![run(3)], false);
        assert_eq!(reuse.reusable(), vec![run(3)], "nobody is left");
        assert_eq!(reuse.waiting().count(), 0);
    }

    #[test]
    fn a_reader_that_comes_later_holds_nothing_back() {
        let mut reuse = Reuse::default();
        reuse.freed(vec![run(1)], true);
        let _later = reuse.pin();
        let epoch = reuse.to_discard().expect("nobody has looked block 1 up").0;
        reuse.discarded(epoch);
        assert_eq!(reuse.reusable(), vec![run(1)]);
    }

    #[test]
    fn discards_hold_blocks_back() {
        let mut reuse = Reuse::default();
        let reader = reuse.pin();
        reuse.freed(vec![run(1)], true);
        assert!(reuse.to_discard().is_none(), "not while it may be read");
        reuse.unpin(reader);
        reuse.freed(vec![run(2)], true);
        let (epoch, runs) = reuse.to_discard().expect("nobody reads it any more");
        assert_eq!(runs, [run(1)]);
        assert!(reuse.reusable().is_empty(), "not before its discard");
        reuse.discarded(epoch);
        assert_eq!(reuse.reusable(), vec![run(1)], "the discard of 2 is not done");
        let epoch = reuse.to_discard().expect("2 is left").0;
        reuse.discarded(epoch);
        assert_eq!(reuse.reusable(), vec![run(2)]);
        assert!(reuse.to_discard().is_none());
    }
}
