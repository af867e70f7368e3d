//! The changes of a checkpoint to one page of the reference-count table, and the blocks that it
//! frees.

use crate::error::{Error, Result};
use crate::format::geometry::{Geometry, PAGE_ENTRIES, PageId, Table};
use crate::format::group::BlockType;
use crate::map::{RefChange, RefDelta};
use crate::space::Run;
use crate::units::{BlockNo, Seqno, to_usize};

const ENTRIES: usize = to_usize(PAGE_ENTRIES);

/// Changes to the blocks of one page.
pub(super) struct PageChange {
    pub(super) id: PageId,
    /// Block of the first entry.
    pub(super) base: BlockNo,
    /// Number of entries that stand for a block: the last page of a group has spare ones.
    len: usize,
    pub(super) entries: [EntryChange; ENTRIES],
}

/// The net change of one block. A net change of 0 still counts as touched: the block may have been
/// allocated and released since the seal.
#[derive(Clone, Copy, Default)]
pub(super) struct EntryChange {
    pub(super) by: i64,
    /// `None` if the block is not touched.
    pub(super) kind: Option<BlockType>,
    /// A node that was replaced by a copy: its children are accounted for already.
    pub(super) moved: bool,
    /// Birth of a node that loses a reference.
    pub(super) birth: Seqno,
}

impl PageChange {
    pub(super) fn at(geometry: Geometry, block: BlockNo) -> Result<Box<Self>> {
        let (id, entry) =
            geometry.page_of(Table::Refs, block).ok_or_else(|| out_of_bounds(block))?;
        let base = BlockNo::new(block.get() - crate::units::to_u64(entry));
        let before = u64::from(id.page) * PAGE_ENTRIES;
        let len = to_usize(PAGE_ENTRIES.min(geometry.group_len(id.group.into()) - before));
        Ok(Box::new(Self { id, base, len, entries: [EntryChange::default(); ENTRIES] }))
    }

    /// Applies the part of `delta` that lies in this page; returns the rest after it.
    pub(super) fn take(&mut self, delta: &RefDelta) -> Result<Option<RefDelta>> {
        let (kind, by) = match delta.change {
            RefChange::DataUp => (BlockType::Data, 1),
            RefChange::DataDown => (BlockType::Data, -1),
            RefChange::NodeUp => (BlockType::Node, 1),
            RefChange::NodeDown | RefChange::NodeMoved => (BlockType::Node, -1),
            RefChange::CatalogueUp => (BlockType::Catalogue, 1),
            RefChange::CatalogueDown => (BlockType::Catalogue, -1),
        };
        let start = to_usize(delta.block.get() - self.base.get());
        let end = (start + to_usize(u64::from(delta.count))).min(ENTRIES);
        if end > self.len {
            // An extent of a damaged map. The tables of the next group, or nothing, follow.
            return Err(out_of_bounds(self.base.plus(crate::units::to_u64(self.len))));
        }
        for (offset, entry) in (0..).zip(&mut self.entries[start..end]) {
            if entry.kind.is_some_and(|known| known != kind) {
                let block = delta.block.plus(offset);
                return Err(Error::corrupt(format!("{block} is used as {kind:?} and otherwise")));
            }
            entry.by += by;
            entry.kind = Some(kind);
            entry.moved |= delta.change == RefChange::NodeMoved;
            entry.birth = entry.birth.max(delta.birth);
        }
        let taken = crate::units::to_u32(crate::units::to_u64(end - start));
        let rest = delta.count - taken;
        let block = delta.block.plus(u64::from(taken));
        Ok((rest > 0).then_some(RefDelta { block, count: rest, ..*delta }))
    }
}

/// Freed blocks, merged into runs.
#[derive(Default)]
pub(super) struct Freed {
    runs: Vec<Run>,
}

impl Freed {
    pub(super) fn push(&mut self, block: BlockNo) {
        match self.runs.last_mut() {
            Some(last) if last.block.plus(last.len) == block => last.len += 1,
            _ => self.runs.push(Run { block, len: 1 }),
        }
    }

    /// The runs. None spans two groups, because tables lie between them.
    pub(super) fn into_runs(self) -> Vec<Run> {
        self.runs
    }
}

fn out_of_bounds(block: BlockNo) -> Error {
    Error::corrupt(format!("{block} has no reference count: it is out of bounds"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    /// The last page of a group has entries that stand for no block.
    #[test]
    fn an_extent_does_not_go_beyond_its_group() {
        let geometry = Geometry::new(3000, 8, 1).unwrap();
        for group in 0..geometry.groups() {
            let last = geometry.block_at(group, geometry.group_len(group) - 1);
            let change = |count| {
                let change = RefChange::DataUp;
                let delta = RefDelta { block: last, count, change, birth: Seqno::new(0) };
                let mut page = PageChange::at(geometry, last)?;
                match page.take(&delta)? {
                    Some(rest) => PageChange::at(geometry, rest.block).map(|_| ()),
                    None => Ok(()),
                }
            };
            change(1).unwrap();
            assert_eq!(change(2).unwrap_err().kind(), ErrorKind::Corrupt, "group {group}");
        }
    }

    #[test]
    fn a_page_takes_its_part_of_a_change_and_no_block_is_of_two_kinds() {
        let geometry = Geometry::new(40_000, 8, 2).expect("a pool with two pages in a group");
        let block = geometry.block_at(0, 1000);
        let birth = Seqno::new(0);
        let data = RefDelta { block, birth, count: 50, change: RefChange::DataUp };
        let mut page = PageChange::at(geometry, block).expect("a block of the first page");
        let rest = page.take(&data).expect("it is data").expect("the second page has the rest");
        assert_eq!((rest.block, rest.count), (geometry.block_at(0, 1020), 30));
        let touched = page.entries.iter().filter(|entry| entry.by == 1).count();
        assert_eq!(touched, 20);
        for change in [RefChange::NodeDown, RefChange::CatalogueUp] {
            let other = RefDelta { count: 1, change, ..data };
            let error = page.take(&other).expect_err("it is data").to_string();
            assert!(error.contains(&format!("{block} is used as")), "{error}");
        }
        assert!(PageChange::at(geometry, BlockNo::new(3)).is_err(), "the journal has no counts");
    }
}
