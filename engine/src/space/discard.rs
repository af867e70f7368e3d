//! Which free blocks are worth a discard: aligned units that became free as a whole. A pool frees
//! single blocks all the time, and a discard of each would cost more than the write that freed it; so
//! pieces are merged here, over checkpoints, until a unit is complete.
//!
//! This is a set of hints. A unit may have been allocated again since it was noted: who takes one
//! looks at the bitmap of its group. The set is in memory alone, and a stop of the pool gives it up.
//! It takes 22 bytes for each 64 units: 22 MiB for 64 TiB that were freed at once.

use std::collections::BTreeMap;

use crate::units::BlockNo;

use super::Run;

/// Units in a word of the set.
const WORD: u64 = 64;

/// The units that were freed and not discarded since.
pub(super) struct FreedUnits {
    /// Blocks of a unit.
    unit: u64,
    /// Bits of 64 units each; no word is 0.
    words: BTreeMap<u64, u64>,
    /// Where the search goes on, so that no part of the pool is left out.
    cursor: u64,
}

impl FreedUnits {
    pub(super) const fn new(unit: u64) -> Self {
        assert!(unit > 0, "a unit has blocks");
        Self { unit, words: BTreeMap::new(), cursor: 0 }
    }

    /// The units that `run` lies in, whole or in part, as runs.
    pub(super) fn touched(&self, run: Run) -> impl Iterator<Item = Run> + use<> {
        let unit = self.unit;
        let first = run.block.get() / unit;
        let last = (run.block.get() + run.len - 1) / unit;
        (first..=last).map(move |number| Run { block: BlockNo::new(number * unit), len: unit })
    }

    /// A unit was freed.
    pub(super) fn insert(&mut self, unit: Run) {
        let number = unit.block.get() / self.unit;
        *self.words.entry(number / WORD).or_insert(0) |= 1 << (number % WORD);
    }

    /// Forgets the unit at `block`; whether it was there.
    pub(super) fn remove(&mut self, block: BlockNo) -> bool {
        let number = block.get() / self.unit;
        let Some(word) = self.words.get_mut(&(number / WORD)) else { return false };
        let bit = 1 << (number % WORD);
        let was = *word & bit != 0;
        *word &= !bit;
        if *word == 0 {
            self.words.remove(&(number / WORD));
        }
        was
    }

    /// The next unit, going round.
    pub(super) fn next(&self) -> Option<Run> {
        let (word, offset) = (self.cursor / WORD, self.cursor % WORD);
        let rest = self.words.get(&word).map(|bits| (word, bits & (u64::MAX << offset)));
        let after = || self.words.range(word + 1..).next().map(|(word, bits)| (*word, *bits));
        let around = || self.words.first_key_value().map(|(word, bits)| (*word, *bits));
        let (word, bits) = rest.filter(|(_, bits)| *bits != 0).or_else(after).or_else(around)?;
        let number = word * WORD + u64::from(bits.trailing_zeros());
        Some(Run { block: BlockNo::new(number * self.unit), len: self.unit })
    }

    /// The search goes on behind `run`.
    pub(super) fn go_on_behind(&mut self, run: Run) {
        self.cursor = (run.block.get() + run.len) / self.unit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(number: u64) -> Run {
        Run { block: BlockNo::new(number * 8), len: 8 }
    }

    #[test]
    fn goes_round() {
        let mut freed = FreedUnits::new(8);
        assert_eq!(freed.next(), None);
        for number in [3, 70, 71, 200] {
            freed.insert(unit(number));
        }
        let mut seen = Vec::new();
        for _ in 0..5 {
            let next = freed.next().expect("there are some");
            seen.push(next.block.get() / 8);
            freed.go_on_behind(next);
        }
        assert_eq!(seen, [3, 70, 71, 200, 3]);
        assert!(freed.remove(unit(70).block) && !freed.remove(unit(70).block));
        freed.go_on_behind(unit(3));
        assert_eq!(freed.next(), Some(unit(71)));
        for number in [3, 71, 200] {
            assert!(freed.remove(unit(number).block));
        }
        assert_eq!(freed.next(), None);
        assert!(freed.words.is_empty(), "what is empty takes no memory");
    }

    #[test]
    fn knows_the_units_of_a_run() {
        let freed = FreedUnits::new(8);
        let touched = |block, len| {
            let run = Run { block: BlockNo::new(block), len };
            freed.touched(run).map(|unit| unit.block.get()).collect::<Vec<_>>()
        };
        assert_eq!(touched(8, 8), [8]);
        assert_eq!(touched(15, 2), [8, 16]);
        assert_eq!(touched(7, 10), [0, 8, 16]);
    }
}
