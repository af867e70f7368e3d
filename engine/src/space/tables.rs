//! The reference-count and checksum tables as the last durable checkpoint left them: where each
//! page's last version is, and a bounded cache of headers and pages. No I/O: what is missing is
//! returned to the caller, who reads it and hands it in.

use std::sync::Arc;

use super::clock::Clock;
use crate::error::Result;
use crate::format::catalogue::GroupEntry;
use crate::format::geometry::{Geometry, PageId};
use crate::format::group::{GroupHeader, TablePage};
use crate::units::{BlockNo, Generation, to_u64, to_usize};

/// A table page or header that must be read first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingTable {
    /// Header of a group.
    Header {
        /// Group.
        group: u32,
        /// Where it is.
        place: BlockNo,
        /// What must lie there.
        generation: Generation,
    },
    /// A page of a table.
    Page {
        /// Which.
        id: PageId,
        /// Where it is.
        place: BlockNo,
        /// What must lie there.
        generation: Generation,
    },
}

impl MissingTable {
    /// The block to read.
    #[must_use]
    pub const fn place(&self) -> BlockNo {
        match self {
            Self::Header { place, .. } | Self::Page { place, .. } => *place,
        }
    }
}

/// The tables of all groups.
pub struct Tables {
    geometry: Geometry,
    uuid: [u8; 16],
    entries: Vec<GroupEntry>,
    headers: Clock<u32, Arc<GroupHeader>>,
    pages: Clock<PageId, Arc<TablePage>>,
}

impl Tables {
    /// The tables of a checkpoint with these group entries, caching at most `pages` pages.
    #[must_use]
    pub fn new(geometry: Geometry, uuid: [u8; 16], entries: Vec<GroupEntry>, pages: usize) -> Self {
        assert_eq!(to_u64(entries.len()), geometry.groups(), "one entry for each group");
        Self {
            geometry,
            uuid,
            entries,
            headers: Clock::new((pages / 4).max(64)),
            pages: Clock::new(pages.max(64)),
        }
    }

    /// All groups' entries.
    #[must_use]
    pub fn entries(&self) -> &[GroupEntry] {
        &self.entries
    }

    /// The entry of a group.
    #[must_use]
    pub fn entry(&self, group: u32) -> GroupEntry {
        self.entries[to_usize(u64::from(group))]
    }

    /// The header of a group.
    ///
    /// # Errors
    /// What to read first.
    pub fn header(&mut self, group: u32) -> std::result::Result<Arc<GroupHeader>, MissingTable> {
        if let Some(header) = self.headers.get(group) {
            return Ok(header);
        }
        let entry = self.entry(group);
        if entry.generation.get() == 0 {
            let header: Arc<GroupHeader> = GroupHeader::empty(group, self.uuid).into();
            self.headers.put(group, Arc::clone(&header));
            return Ok(header);
        }
        let place = self.geometry.header_place(u64::from(group), u64::from(entry.slot & 1));
        Err(MissingTable::Header { group, place, generation: entry.generation })
    }

    /// A page, or `None` for one that was never written (all zero).
    ///
    /// # Errors
    /// What to read first.
    pub fn page(
        &mut self,
        id: PageId,
    ) -> std::result::Result<Option<Arc<TablePage>>, MissingTable> {
        if let Some(page) = self.pages.get(id) {
            return Ok(Some(page));
        }
        let (slot, generation) = self.header(id.group)?.version(id);
        if generation.get() == 0 {
            return Ok(None);
        }
        let place = self.geometry.page_place(id, slot);
        Err(MissingTable::Page { id, place, generation })
    }

    /// Takes what was missing, unless a checkpoint has replaced it since it was asked for; then
    /// it is dropped and the caller asks again.
    ///
    /// # Errors
    /// `Corrupt` when `bytes` is not what must lie there.
    pub fn install(&mut self, missing: MissingTable, bytes: &[u8]) -> Result<()> {
        match missing {
            MissingTable::Header { group, generation, .. } => {
                if self.entry(group).generation == generation && !self.headers.contains(group) {
                    let header = GroupHeader::decode(bytes, group, generation, self.uuid)?;
                    self.headers.put(group, header.into());
                }
            }
            MissingTable::Page { id, generation, .. } => {
                let current = self.header(id.group).is_ok_and(|h| h.version(id).1 == generation);
                if current && !self.pages.contains(id) {
                    self.pages.put(id, TablePage::decode(bytes, id, generation)?.into());
                }
            }
        }
        Ok(())
    }

    /// A checkpoint is durable: its headers and pages take the place of the older ones.
    pub fn publish(
        &mut self,
        groups: Vec<(u32, GroupEntry, Arc<GroupHeader>)>,
        pages: Vec<(PageId, Arc<TablePage>)>,
    ) {
        for (group, entry, header) in groups {
            self.entries[to_usize(u64::from(group))] = entry;
            self.headers.put(group, header);
        }
        for (id, page) in pages {
            self.pages.put(id, page);
        }
    }

    /// The pool has grown: new groups appear at the end, and the last may be longer.
    pub fn grow(&mut self, geometry: Geometry, entries: Vec<GroupEntry>) {
        self.geometry = geometry;
        self.entries = entries;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::geometry::Table;
    use crate::units::BLOCK_SIZE;

    const UUID: [u8; 16] = [1; 16];
    const ID: PageId = PageId { group: 0, table: Table::Refs, page: 0 };

    /// A checkpoint that has written the page: its group, and the blocks of the header and page.
    fn checkpoint(generation: u32) -> (GroupEntry, Box<GroupHeader>, [[u8; BLOCK_SIZE]; 2]) {
        let generation = Generation::new(generation);
        let (mut header, mut page) = (GroupHeader::empty(0, UUID), TablePage::empty(ID));
        header.choose_slot(ID, generation);
        let mut bytes = [[0; BLOCK_SIZE]; 2];
        header.encode(generation, &mut bytes[0]);
        page.encode(generation, &mut bytes[1]);
        (GroupEntry { generation, slot: 0, free: 0 }, header, bytes)
    }

    /// Between the question and the answer a checkpoint can replace what was asked for.
    #[test]
    fn what_a_checkpoint_has_replaced_is_not_taken_in() {
        let (old, _, [old_header, old_page]) = checkpoint(2);
        let (new, header, [new_header, _]) = checkpoint(3);
        let geometry = Geometry::new(1036, 8, 1).expect("a pool of one group");
        let mut tables = Tables::new(geometry, UUID, vec![old], 64);
        let asked = tables.page(ID).err().expect("nothing is here");
        assert!(matches!(asked, MissingTable::Header { .. }));
        tables.install(asked, &old_header).expect("it is the one");
        let page = tables.page(ID).err().expect("the header is here");
        assert!(matches!(page, MissingTable::Page { .. }));
        tables.publish(vec![(0, new, header.into())], Vec::new());
        tables.install(page, &old_page).expect("it was the one");
        let wanted = tables.page(ID).err().expect("the page of the last checkpoint is not here");
        let generation = Generation::new(3);
        assert_eq!(wanted, MissingTable::Page { id: ID, place: wanted.place(), generation });
        // The same for a header that is not in the cache any more.
        let mut tables = Tables::new(geometry, UUID, vec![old], 64);
        let asked = tables.header(0).err().expect("nothing is here");
        tables.entries[0] = new;
        tables.install(asked, &old_header).expect("it was the one");
        let wanted = tables.header(0).err().expect("the header of the last checkpoint is not here");
        tables.install(wanted, &new_header).expect("it is the one");
    }
}
