//! The recount of references: one byte per block of a window of the pool. Pages of counts are
//! allocated with the first reference into them: 256 MiB for 1 TiB in use. A larger pool is counted
//! in several windows, each with a walk of its own.

use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasherDefault;
use std::ops::Range;

use crate::format::geometry::{Geometry, PAGE_ENTRIES};
use crate::format::group::BlockType;
use crate::space::KeyHasher;
use crate::units::{BlockNo, to_u64, to_usize};

/// Maximum of count pages per window.
pub(super) const WINDOW_PAGES: u64 = 1 << 18;
const ENTRIES: usize = to_usize(PAGE_ENTRIES);
/// The low bits of an entry are the count, the high bits the type.
const LOW: u8 = 63;

type Page = [u8; ENTRIES];
type ByNumber<V> = HashMap<u64, V, BuildHasherDefault<KeyHasher>>;

/// References found to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) kind: BlockType,
    pub(super) count: u64,
}

/// How a new reference relates to the earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Added {
    /// It is the first one.
    First,
    /// There were others of the same type.
    Again,
    /// The block is used as this other type; the reference is not counted.
    Otherwise(BlockType),
    /// The block is in another window.
    Elsewhere,
}

/// Counts for the blocks of a range of groups.
pub(super) struct Recount {
    geometry: Geometry,
    groups: Range<u64>,
    pages: ByNumber<Box<Page>>,
    /// Counts that do not fit into the low bits.
    large: BTreeMap<BlockNo, u64>,
}

/// Divides the groups into windows, one per pass.
pub(super) fn windows(geometry: &Geometry, pages: u64) -> Vec<Range<u64>> {
    let (groups, step) = (geometry.groups(), (pages / geometry.group_pages).max(1));
    let starts = (0..groups).step_by(to_usize(step));
    starts.map(|start| start..(start + step).min(groups)).collect()
}

impl Recount {
    pub(super) fn new(geometry: Geometry, groups: Range<u64>) -> Self {
        Self { geometry, groups, pages: ByNumber::default(), large: BTreeMap::new() }
    }

    pub(super) fn groups(&self) -> Range<u64> {
        self.groups.clone()
    }

    /// Counts one reference to a block.
    pub(super) fn add(&mut self, block: BlockNo, kind: BlockType) -> Added {
        let Some((page, at)) = self.place(block) else { return Added::Elsewhere };
        let page = self.pages.entry(page).or_insert_with(|| Box::new([0; ENTRIES]));
        let entry = &mut page[at];
        if *entry == 0 {
            *entry = tag(kind) | 1;
            return Added::First;
        }
        let known = type_of(*entry);
        if known != kind {
            return Added::Otherwise(known);
        }
        if *entry & LOW < LOW {
            *entry += 1;
        } else {
            *self.large.entry(block).or_insert(0) += 1;
        }
        Added::Again
    }

    /// The references counted to a block of the window.
    pub(super) fn of(&self, block: BlockNo) -> Counted {
        let place = self.place(block);
        let entry = place.and_then(|(page, at)| Some(self.pages.get(&page)?[at])).unwrap_or(0);
        let large = if entry & LOW == LOW { self.large.get(&block) } else { None };
        let count = u64::from(entry & LOW) + large.copied().unwrap_or(0);
        Counted { kind: type_of(entry), count }
    }

    /// Whether a table page of a group has any references.
    pub(super) fn has_page(&self, group: u64, page: u64) -> bool {
        self.pages.contains_key(&(group * self.geometry.group_pages + page))
    }

    fn place(&self, block: BlockNo) -> Option<(u64, usize)> {
        let (group, index) = self.geometry.locate(block)?;
        let page = group * self.geometry.group_pages + index / PAGE_ENTRIES;
        self.groups.contains(&group).then_some((page, to_usize(index % PAGE_ENTRIES)))
    }
}

fn tag(kind: BlockType) -> u8 {
    match kind {
        BlockType::Free => 0,
        BlockType::Data => 1 << 6,
        BlockType::Node => 2 << 6,
        BlockType::Catalogue => 3 << 6,
    }
}

fn type_of(entry: u8) -> BlockType {
    match entry >> 6 {
        0 => BlockType::Free,
        1 => BlockType::Data,
        2 => BlockType::Node,
        _ => BlockType::Catalogue,
    }
}

/// Fingerprint of a pointer that contains too little for one; agrees with any.
pub(super) const UNKNOWN: u32 = 0;

/// Visited nodes, with the fingerprint of the first pointer to each: about 24 bytes per 4 KiB of
/// metadata.
#[derive(Default)]
pub(super) struct Visited(ByNumber<u32>);

impl Visited {
    /// Adds a node. If it was visited before, returns whether the fingerprints agree.
    pub(super) fn meet(&mut self, block: BlockNo, fingerprint: u32) -> Option<bool> {
        use std::collections::hash_map::Entry;
        match self.0.entry(block.get()) {
            Entry::Occupied(known) => {
                let known = *known.get();
                Some(known == fingerprint || known == UNKNOWN || fingerprint == UNKNOWN)
            }
            Entry::Vacant(new) => {
                new.insert(fingerprint);
                None
            }
        }
    }

    pub(super) fn len(&self) -> u64 {
        to_u64(self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_types_and_windows() {
        let geometry = Geometry::new(40_000, 64, 4).unwrap();
        let parts = windows(&geometry, 8);
        assert!(parts.len() > 2 && parts.iter().all(|part| part.end - part.start <= 2));
        assert_eq!(parts.iter().map(|part| part.end - part.start).sum::<u64>(), geometry.groups());
        let mut counts = Recount::new(geometry, 1..3);
        let block = geometry.block_at(1, 1100);
        assert_eq!(counts.add(block, BlockType::Data), Added::First);
        for _ in 1..1000 {
            assert_eq!(counts.add(block, BlockType::Data), Added::Again);
        }
        assert_eq!(counts.of(block), Counted { kind: BlockType::Data, count: 1000 });
        assert_eq!(counts.add(block, BlockType::Node), Added::Otherwise(BlockType::Data));
        assert_eq!(counts.of(block).count, 1000);
        assert_eq!(counts.of(block.plus(1)).count, 0);
        assert_eq!(counts.add(geometry.block_at(0, 0), BlockType::Node), Added::Elsewhere);
        assert_eq!(counts.add(BlockNo::new(0), BlockType::Node), Added::Elsewhere);
    }
}
