//! Where in the cache a block's node is: open addressing with linear probing and backward-shift
//! deletion, no tombstones. One word for each entry, so that the index of a large cache stays in
//! the processor's caches; the order of nothing depends on it.

use crate::units::{BlockNo, to_usize};

/// Upper half: low 32 bits of the block number. Lower half: the slot.
const EMPTY: u64 = u64::MAX;
const SLOT_MASK: u64 = 0xffff_ffff;

pub(super) struct Index {
    entries: Vec<u64>,
    len: usize,
}

/// Fibonacci hashing: the high bits of the product depend on all bits of the block number's tag.
fn home(tag: u64, len: usize) -> usize {
    let product = tag.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    to_usize(product >> (64 - len.trailing_zeros()))
}

fn tag_of(block: BlockNo) -> u64 {
    block.get() & SLOT_MASK
}

impl Index {
    pub(super) fn new() -> Self {
        Self { entries: vec![EMPTY; 64], len: 0 }
    }

    /// The slot of `block`; `holds` tells whether a slot holds it (tags can collide).
    #[inline]
    pub(super) fn find(&self, block: BlockNo, holds: impl Fn(u32) -> bool) -> Option<u32> {
        self.position(block, holds).map(|at| slot_of(self.entries[at]))
    }

    /// Adds a block that is not in the index.
    pub(super) fn insert(&mut self, block: BlockNo, slot: u32) {
        if (self.len + 1) * 2 > self.entries.len() {
            self.grow();
        }
        self.len += 1;
        self.place(tag_of(block) << 32 | u64::from(slot));
    }

    /// Takes out `block`, which `holds` finds.
    pub(super) fn remove(&mut self, block: BlockNo, holds: impl Fn(u32) -> bool) {
        let Some(mut gap) = self.position(block, holds) else { return };
        let mask = self.entries.len() - 1;
        let mut at = gap;
        loop {
            at = (at + 1) & mask;
            let entry = self.entries[at];
            if entry == EMPTY {
                break;
            }
            // An entry may fill the gap if its home does not lie between the gap and its place.
            let distance = at.wrapping_sub(home(entry >> 32, self.entries.len())) & mask;
            if distance >= (at.wrapping_sub(gap) & mask) {
                self.entries[gap] = entry;
                gap = at;
            }
        }
        self.entries[gap] = EMPTY;
        self.len -= 1;
    }

    #[inline]
    fn position(&self, block: BlockNo, holds: impl Fn(u32) -> bool) -> Option<usize> {
        let tag = tag_of(block);
        let mask = self.entries.len() - 1;
        let mut at = home(tag, self.entries.len());
        loop {
            let entry = self.entries[at];
            if entry == EMPTY {
                return None;
            }
            if entry >> 32 == tag && holds(slot_of(entry)) {
                return Some(at);
            }
            at = (at + 1) & mask;
        }
    }

    fn place(&mut self, entry: u64) {
        let mask = self.entries.len() - 1;
        let mut at = home(entry >> 32, self.entries.len());
        while self.entries[at] != EMPTY {
            at = (at + 1) & mask;
        }
        self.entries[at] = entry;
    }

    fn grow(&mut self) {
        let doubled = vec![EMPTY; self.entries.len() * 2];
        for entry in std::mem::replace(&mut self.entries, doubled) {
            if entry != EMPTY {
                self.place(entry);
            }
        }
    }
}

fn slot_of(entry: u64) -> u32 {
    // The mask leaves 32 bits, so nothing is lost.
    u32::try_from(entry & SLOT_MASK).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn agrees_with_a_btree_map() {
        let mut index = Index::new();
        let mut model: BTreeMap<u64, u32> = BTreeMap::new();
        let mut blocks: Vec<u64> = Vec::new();
        let mut state = 1u64;
        for step in 0..20_000u32 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // Few distinct values, and pairs whose low 32 bits are equal.
            let block = (state >> 33) % 500 + (((state >> 60) % 2) << 32);
            let at = usize::try_from(step).unwrap();
            blocks.push(block);
            let holds = |slot: u32| blocks[usize::try_from(slot).unwrap()] == block;
            assert_eq!(index.find(BlockNo::new(block), holds), model.get(&block).copied());
            if model.remove(&block).is_some() {
                index.remove(BlockNo::new(block), holds);
            } else {
                index.insert(BlockNo::new(block), step);
                model.insert(block, u32::try_from(at).unwrap());
            }
            assert_eq!(index.len, model.len());
        }
    }
}
