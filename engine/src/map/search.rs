//! Finding a key in a node.

use crate::format::node::{Entry, NodeRef};
use crate::units::{to_u64, to_usize};

/// Number of `entries`, those of the node `of`, whose key is at most `lba`.
///
/// A large map lies outside of the processor's caches, so what counts is how many loads wait for
/// one another. The first guess is that the keys are spread evenly between the bounds of the node,
/// as they are in a volume that was written at random: then only entries that lie side by side are
/// loaded, and all at once.
pub(super) fn upper_bound<E: Entry>(entries: &[E], of: &NodeRef, lba: u64) -> usize {
    const AROUND: usize = 4;
    let (first, end) = (of.lba.get(), of.end.get());
    if lba < first || lba >= end {
        return upper_bound_anywhere(entries, lba);
    }
    // In a leaf of single blocks the pointer has told how many there are, so that nothing waits for
    // the node's header. Both factors are small: an LBA has 48 bits, a count 8.
    let spread = if of.mapped <= to_u64(E::MAX) { of.mapped } else { to_u64(entries.len()) };
    let guess = to_usize((lba - first) * spread / (end - first));
    let from = guess.saturating_sub(AROUND);
    match entries.get(from..guess + AROUND) {
        Some([head, middle @ .., tail]) if (from == 0 || head.key() <= lba) && tail.key() > lba => {
            from + usize::from(head.key() <= lba) + count_up_to(middle, lba)
        }
        _ => upper_bound_anywhere(entries, lba),
    }
}

/// As [`upper_bound`], for keys in any places. Two steps, and the loads within each do not depend
/// on one another, so that the cache misses of a step overlap: a binary search would wait for each
/// of its six or seven in turn.
fn upper_bound_anywhere<E: Entry>(entries: &[E], lba: u64) -> usize {
    const STRIDE: usize = 16;
    let mut from = 0;
    let mut pivot = STRIDE;
    while pivot < entries.len() {
        from += if entries[pivot].key() <= lba { STRIDE } else { 0 };
        pivot += STRIDE;
    }
    from + count_up_to(&entries[from..entries.len().min(from + STRIDE)], lba)
}

fn count_up_to<E: Entry>(entries: &[E], lba: u64) -> usize {
    entries.iter().map(|entry| usize::from(entry.key() <= lba)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::node::{Extent, LBA_END, LeafEntry};
    use crate::units::{BlockNo, Lba, Seqno};

    #[test]
    fn upper_bound_agrees_with_a_scan() {
        let spread = |i: u64| 10 + 3 * i;
        let dense = |i: u64| 10 + i;
        let crowded = |i: u64| 10 + i * i / 8 + i;
        for keys in [spread, dense, crowded] {
            for count in 0..80u64 {
                let entries: Vec<LeafEntry> = (0..count).map(|i| entry(keys(i))).collect();
                for (lba, end) in [(10, keys(count)), (10, LBA_END), (0, 1), (10, 11)] {
                    let (lba, end) = (Lba::new(lba), Lba::new(end));
                    let birth = Seqno::new(1);
                    let of = NodeRef {
                        block: BlockNo::new(1),
                        birth,
                        level: 0,
                        lba,
                        end,
                        mapped: count,
                    };
                    for lba in 0..keys(count) + 20 {
                        let scanned = entries.iter().filter(|entry| entry.key() <= lba).count();
                        assert_eq!(upper_bound(&entries, &of, lba), scanned);
                    }
                }
            }
        }
    }

    fn entry(lba: u64) -> LeafEntry {
        LeafEntry::new(&Extent { lba: Lba::new(lba), block: BlockNo::new(1), len: 1, own: false })
    }
}
