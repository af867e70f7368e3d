//! Where everything is in a pool, computed from four numbers of the superblock.
//!
//! ```text
//! block 0   2          2+J                                            end-2     end
//! +---+---+-----------+----------------+----------------+-- .. --+----+----+----+
//! | s0| s1|  journal  |    group 0     |    group 1     |        | gN | s0 | s1 |
//! +---+---+-----------+----------------+----------------+-- .. --+----+----+----+
//! group, P pages:  [ header x2 | refs pages x2 | sums pages x2 | 1020 P blocks ]
//! blocks:               2            2P              2P
//! ```

use crate::error::{Error, Result};
use crate::limits::POOL_BYTES_MAX;
use crate::units::{BLOCK_BYTES, BlockNo, Size, to_u32};

/// Counts, or checksums, in one table page.
pub const PAGE_ENTRIES: u64 = 1020;
/// Most pages of one table in a group; bounded by the room in the group's header.
pub const GROUP_PAGES_MAX: u64 = 256;
/// Superblock slots at each end.
pub const SUPER_SLOTS: u64 = 2;
/// Smallest journal.
pub const JOURNAL_BLOCKS_MIN: u64 = 8;
/// Largest journal: 1 GiB.
pub const JOURNAL_BLOCKS_MAX: u64 = 1 << 18;
/// Fewest blocks for data and nodes in a pool: what is kept back from growth, and a few more.
const USABLE_BLOCKS_MIN: u64 = 64;

/// One of the two tables of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Reference counts.
    Refs,
    /// Checksums.
    Sums,
}

/// A page of a table: which group, which table, which page of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId {
    /// Group.
    pub group: u32,
    /// Table.
    pub table: Table,
    /// Page in the table, from 0.
    pub page: u32,
}

fn size(blocks: u64) -> Size {
    Size(blocks.saturating_mul(BLOCK_BYTES))
}

/// The places in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Geometry {
    /// Blocks of the pool, superblocks included.
    pub pool_blocks: u64,
    /// Blocks of the journal.
    pub journal_blocks: u64,
    /// Pages of one table in a group.
    pub group_pages: u64,
}

impl Geometry {
    /// Checks the numbers against each other.
    ///
    /// # Errors
    /// `Invalid`, naming the number and its bounds.
    pub fn new(pool_blocks: u64, journal_blocks: u64, group_pages: u64) -> Result<Self> {
        let geometry = Self { pool_blocks, journal_blocks, group_pages };
        if !(1..=GROUP_PAGES_MAX).contains(&group_pages) {
            return Err(Error::invalid(format!("{group_pages} table pages in a group")));
        }
        if !(JOURNAL_BLOCKS_MIN..=JOURNAL_BLOCKS_MAX).contains(&journal_blocks) {
            return Err(Error::invalid(format!(
                "a journal of {}: it has {} to {}",
                size(journal_blocks),
                size(JOURNAL_BLOCKS_MIN),
                size(JOURNAL_BLOCKS_MAX)
            )));
        }
        if pool_blocks > POOL_BYTES_MAX / BLOCK_BYTES {
            return Err(Error::invalid(format!(
                "a pool of {} is too large: the largest has {}",
                size(pool_blocks),
                Size(POOL_BYTES_MAX)
            )));
        }
        if geometry.usable_blocks() < USABLE_BLOCKS_MIN {
            let places = SUPER_SLOTS + geometry.first_group() + geometry.tables_blocks();
            return Err(Error::invalid(format!(
                "too small: a pool with a journal of {} has at least {}",
                size(journal_blocks),
                size(places + USABLE_BLOCKS_MIN)
            )));
        }
        Ok(geometry)
    }

    /// Table pages for a pool of `pool_blocks`: about 4096 groups, of 4 MiB to 1 GiB.
    #[must_use]
    pub fn default_group_pages(pool_blocks: u64) -> u64 {
        let groups_4096 = (pool_blocks >> 22).next_power_of_two();
        let groups_16 = (pool_blocks >> 14).next_power_of_two();
        groups_4096.max(groups_16.min(32)).clamp(1, GROUP_PAGES_MAX)
    }

    /// Journal blocks for a pool of `pool_blocks`: a 16th, at most 64 MiB.
    #[must_use]
    pub fn default_journal_blocks(pool_blocks: u64) -> u64 {
        (pool_blocks / 16).clamp(JOURNAL_BLOCKS_MIN, 16 << 10)
    }

    /// Blocks of one whole group.
    #[must_use]
    pub const fn group_blocks(&self) -> u64 {
        self.tables_blocks() + PAGE_ENTRIES * self.group_pages
    }

    const fn tables_blocks(&self) -> u64 {
        2 + 4 * self.group_pages
    }

    const fn first_group(&self) -> u64 {
        SUPER_SLOTS + self.journal_blocks
    }

    /// Groups; the last may be shorter, but holds at least one block.
    #[must_use]
    pub const fn groups(&self) -> u64 {
        let area = self.pool_blocks.saturating_sub(SUPER_SLOTS + self.first_group());
        let whole = area / self.group_blocks();
        let rest = area % self.group_blocks();
        whole + (rest > self.tables_blocks()) as u64
    }

    /// Blocks for data and nodes in `group`.
    #[must_use]
    pub fn group_len(&self, group: u64) -> u64 {
        let start = self.first_group() + group * self.group_blocks();
        let end = (start + self.group_blocks()).min(self.pool_blocks - SUPER_SLOTS);
        end - start - self.tables_blocks()
    }

    /// Blocks for data and nodes in the pool.
    #[must_use]
    pub fn usable_blocks(&self) -> u64 {
        match self.groups() {
            0 => 0,
            n => (n - 1) * PAGE_ENTRIES * self.group_pages + self.group_len(n - 1),
        }
    }

    /// First block of the journal.
    #[must_use]
    pub const fn journal_start(&self) -> BlockNo {
        BlockNo::new(SUPER_SLOTS)
    }

    /// The places of superblock slot `slot`: at the front and at the end.
    #[must_use]
    pub const fn super_places(&self, slot: u64) -> [BlockNo; 2] {
        [BlockNo::new(slot), BlockNo::new(self.pool_blocks - SUPER_SLOTS + slot)]
    }

    /// Place of a group's header slot.
    #[must_use]
    pub fn header_place(&self, group: u64, slot: u64) -> BlockNo {
        debug_assert!(group < self.groups() && slot < 2);
        BlockNo::new(self.first_group() + group * self.group_blocks() + slot)
    }

    /// Place of a slot of a table page.
    #[must_use]
    pub fn page_place(&self, id: PageId, slot: u64) -> BlockNo {
        let table = match id.table {
            Table::Refs => 0,
            Table::Sums => 2 * self.group_pages,
        };
        self.header_place(u64::from(id.group), 0).plus(2 + table + 2 * u64::from(id.page) + slot)
    }

    /// The block at `index` among a group's blocks for data and nodes.
    #[must_use]
    pub fn block_at(&self, group: u64, index: u64) -> BlockNo {
        self.header_place(group, 0).plus(self.tables_blocks() + index)
    }

    /// Group and index of a block for data or nodes; `None` for any other block.
    #[must_use]
    pub fn locate(&self, block: BlockNo) -> Option<(u64, u64)> {
        let offset = block.get().checked_sub(self.first_group())?;
        let (group, within) = (offset / self.group_blocks(), offset % self.group_blocks());
        let index = within.checked_sub(self.tables_blocks())?;
        (group < self.groups() && index < self.group_len(group)).then_some((group, index))
    }

    /// Whether `count` blocks from `block` on all lie among the blocks of one group.
    #[must_use]
    pub fn holds_run(&self, block: BlockNo, count: u64) -> bool {
        self.locate(block).is_some_and(|(group, index)| {
            count > 0 && index.checked_add(count).is_some_and(|end| end <= self.group_len(group))
        })
    }

    /// The page and the entry in it that speak of a block for data or nodes.
    #[must_use]
    pub fn page_of(&self, table: Table, block: BlockNo) -> Option<(PageId, usize)> {
        let (group, index) = self.locate(block)?;
        let page = to_u32(index / PAGE_ENTRIES);
        let entry = crate::units::to_usize(index % PAGE_ENTRIES);
        Some((PageId { group: to_u32(group), table, page }, entry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_do_not_overlap_and_locate_inverts() {
        for (blocks, journal, pages) in [(90, 8, 1), (3000, 8, 1), (40_000, 64, 4)] {
            let g = Geometry::new(blocks, journal, pages).unwrap();
            let mut seen = std::collections::BTreeSet::new();
            let mut usable = 0;
            for slot in 0..2 {
                seen.extend(g.super_places(slot));
            }
            seen.extend((0..journal).map(|i| g.journal_start().plus(i)));
            for group in 0..g.groups() {
                for slot in 0..2 {
                    assert!(seen.insert(g.header_place(group, slot)));
                    for table in [Table::Refs, Table::Sums] {
                        for page in 0..g.group_pages {
                            let id = PageId { group: to_u32(group), table, page: to_u32(page) };
                            assert!(seen.insert(g.page_place(id, slot)));
                        }
                    }
                }
                for index in 0..g.group_len(group) {
                    let block = g.block_at(group, index);
                    assert!(seen.insert(block));
                    assert_eq!(g.locate(block), Some((group, index)));
                    usable += 1;
                }
            }
            assert_eq!(usable, g.usable_blocks());
            assert!(seen.len() as u64 <= blocks);
            assert!(seen.last().unwrap().get() < blocks);
            assert_eq!(g.locate(BlockNo::new(0)), None);
            assert_eq!(g.locate(BlockNo::new(blocks - 1)), None);
        }
    }

    #[test]
    fn bounds() {
        assert!(Geometry::new(20, 8, 1).is_err());
        assert!(Geometry::new(1 << 40, 8, 1).is_err());
        assert!(Geometry::new(1 << 20, 4, 1).is_err());
        assert!(Geometry::new(1 << 20, JOURNAL_BLOCKS_MAX + 1, 1).is_err());
        assert!(Geometry::new(1 << 20, 8, 0).is_err());
        assert!(Geometry::new(1 << 20, 8, GROUP_PAGES_MAX + 1).is_err());
        let error = Geometry::new(20, 8, 1).unwrap_err().to_string();
        assert!(error.ends_with("a pool with a journal of 32 KiB has at least 328 KiB"), "{error}");
        let smallest = 328 * 1024 / BLOCK_BYTES;
        assert!(
            Geometry::new(smallest, 8, 1).is_ok() && Geometry::new(smallest - 1, 8, 1).is_err()
        );
        let two = Geometry::new(3000, 8, 1).unwrap();
        let last = two.block_at(0, 1019);
        assert!(two.holds_run(last, 1) && !two.holds_run(last, 2), "not over its group's end");
        assert!(!two.holds_run(last, 0) && !two.holds_run(last, u64::MAX));
        assert_eq!(Geometry::default_group_pages(1 << 28), 64);
        assert_eq!(Geometry::default_group_pages(1 << 34), 256);
        assert_eq!(Geometry::default_group_pages(256), 1);
    }
}
