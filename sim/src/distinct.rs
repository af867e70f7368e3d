//! Counts how many of many states are different ones.

use std::collections::HashSet;

/// Sums that are remembered: half a gigabyte. What is new after that is not counted.
const REMEMBERED_MAX: usize = 1 << 25;

/// The states seen so far, by their sums.
#[derive(Debug, Default)]
pub struct Distinct {
    seen: HashSet<u64>,
}

impl Distinct {
    /// Whether a state is known to be new.
    pub fn insert(&mut self, sum: u64) -> bool {
        self.seen.len() < REMEMBERED_MAX && self.seen.insert(sum)
    }
}
