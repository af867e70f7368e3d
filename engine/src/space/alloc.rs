//! Free blocks of a loaded group as a bitmap, and the search for long runs of them.

use crate::units::to_usize;

/// One bit for each block of a group: set when it may be allocated.
pub struct Bitmap {
    words: Vec<u64>,
    len: u64,
    free: u64,
}

/// Runs looked at before the longest of them is taken.
const CANDIDATES: usize = 32;

impl Bitmap {
    /// `len` blocks, none of them free.
    #[must_use]
    pub fn full(len: u64) -> Self {
        Self { words: vec![0; to_usize(len.div_ceil(64))], len, free: 0 }
    }

    /// Blocks that may be allocated.
    #[must_use]
    pub const fn free(&self) -> u64 {
        self.free
    }

    /// The same, counted anew.
    #[must_use]
    pub fn count_free(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether block `index` may be allocated.
    #[must_use]
    pub fn is_free(&self, index: u64) -> bool {
        self.words[to_usize(index / 64)] >> (index % 64) & 1 == 1
    }

    /// Whether all of `[start, start + len)` may be allocated.
    #[must_use]
    pub fn all_free(&self, start: u64, len: u64) -> bool {
        let end = start + len;
        let mut at = start;
        while at < end {
            let in_use = !self.words[to_usize(at / 64)] >> (at % 64);
            if u64::from(in_use.trailing_zeros()) < (end - at).min(64 - at % 64) {
                return false;
            }
            at = (at / 64 + 1) * 64;
        }
        true
    }

    /// Marks `[start, start + len)`; every block of it must be in the other state.
    pub fn set(&mut self, start: u64, len: u64, free: bool) {
        assert!(start + len <= self.len, "run within the group");
        for index in start..start + len {
            assert_ne!(self.is_free(index), free, "block {index} of a group marked twice");
            self.words[to_usize(index / 64)] ^= 1 << (index % 64);
        }
        if free {
            self.free += len;
        } else {
            self.free -= len;
        }
    }

    /// Adds `added` free blocks at the end.
    pub fn lengthen(&mut self, added: u64) {
        let old = self.len;
        self.len += added;
        self.words.resize(to_usize(self.len.div_ceil(64)), 0);
        self.set(old, added, true);
    }

    /// First block at or after `from` whose state is `free`, or `len`.
    fn next(&self, from: u64, free: bool) -> u64 {
        let invert = if free { 0 } else { u64::MAX };
        let mut index = from;
        while index < self.len {
            let word = (self.words[to_usize(index / 64)] ^ invert) >> (index % 64);
            if word != 0 {
                return (index + u64::from(word.trailing_zeros())).min(self.len);
            }
            index = (index / 64 + 1) * 64;
        }
        self.len
    }

    /// A run of at most `want` free blocks: the first that is long enough from `from` on, going
    /// round; else the longest of the first few.
    #[must_use]
    pub fn find(&self, from: u64, want: u64) -> Option<(u64, u64)> {
        let mut best: Option<(u64, u64)> = None;
        let mut looked = 0;
        for (begin, limit) in [(from.min(self.len), self.len), (0, from.min(self.len))] {
            let mut at = begin;
            while at < limit && looked < CANDIDATES {
                let start = self.next(at, true);
                if start >= limit {
                    break;
                }
                let end = self.next(start, false).min(start + want);
                let len = end - start;
                if best.is_none_or(|(_, longest)| len > longest) {
                    best = Some((start, len));
                }
                if len == want {
                    return best;
                }
                looked += 1;
                at = end;
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_long_runs_first() {
        let mut map = Bitmap::full(1020);
        map.set(0, 1020, true);
        assert_eq!(map.find(0, 2000), Some((0, 1020)));
        map.set(0, 1020, false);
        assert_eq!(map.find(0, 1), None);
        map.set(10, 1, true);
        map.set(100, 64, true);
        assert_eq!(map.find(0, 64), Some((100, 64)));
        assert_eq!(map.find(0, 1), Some((10, 1)));
        assert_eq!(map.find(0, 100), Some((100, 64)));
        assert_eq!(map.find(130, 40), Some((100, 40)), "goes round for a run that is long enough");
        assert_eq!(map.free(), 65);
    }

    #[test]
    fn one_block_in_use_spoils_a_run() {
        let mut map = Bitmap::full(300);
        map.set(10, 200, true);
        for (start, len, free) in [
            (10, 200, true),
            (9, 200, false),
            (10, 201, false),
            (64, 64, true),
            (70, 3, true),
            (0, 10, false),
        ] {
            assert_eq!(map.all_free(start, len), free, "{len} blocks at {start}");
        }
        map.set(128, 1, false);
        assert!(map.all_free(64, 64) && map.all_free(129, 81));
        assert!(!map.all_free(64, 65) && !map.all_free(128, 1));
    }

    #[test]
    #[should_panic(expected = "marked twice")]
    fn double_free_is_caught() {
        let mut map = Bitmap::full(64);
        map.set(3, 1, true);
        map.set(3, 1, true);
    }
}
