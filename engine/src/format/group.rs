//! A group's structures: pages of the reference-count and checksum tables, and the header that
//! says in which of its two slots each page's last version is.
//!
//! A page and a header of generation 0 were never written: the page is all zero, so that making a
//! pool writes no tables.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::geometry::{GROUP_PAGES_MAX, PAGE_ENTRIES, PageId, Table};
use super::layout::{Field, fields};
use crate::crc::crc32;
use crate::error::{Error, Result};
use crate::units::{BLOCK_SIZE, Generation, to_usize};

const ENTRIES: usize = 1020;
const _: () = assert!(ENTRIES as u64 == PAGE_ENTRIES);
const PAGES: usize = 2 * to_usize(GROUP_PAGES_MAX);

/// Count of a reference-count entry: the low 30 bits.
pub const COUNT_MASK: u32 = (1 << 30) - 1;
/// Type of a reference-count entry: the high two bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockType {
    /// Free.
    Free,
    /// A block of a volume.
    Data,
    /// A node of a map.
    Node,
    /// A block of the catalogue.
    Catalogue,
}

impl BlockType {
    /// Of an entry.
    #[must_use]
    pub const fn of(entry: u32) -> Self {
        match entry >> 30 {
            0 => Self::Free,
            1 => Self::Data,
            2 => Self::Node,
            _ => Self::Catalogue,
        }
    }

    /// The entry of this type with `count` references; zero when there are none.
    #[must_use]
    pub const fn entry(self, count: u32) -> u32 {
        let tag = match self {
            Self::Free => 0,
            Self::Data => 1,
            Self::Node => 2,
            Self::Catalogue => 3,
        };
        if count == 0 { 0 } else { (tag << 30) | (count & COUNT_MASK) }
    }
}

/// One page of either table: 1020 entries, and who it is.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TablePage {
    crc: U32,
    group: U32,
    /// Table in the high bit, page number below.
    which: U32,
    generation: U32,
    entries: [U32; ENTRIES],
}

const _: () = assert!(size_of::<TablePage>() == BLOCK_SIZE);

/// The fields of a table page.
pub const PAGE_FIELDS: &[Field] = fields!(TablePage: crc, group, which, generation, entries [U32]);

impl TablePage {
    /// The page that was never written: all zero.
    #[must_use]
    pub fn empty(id: PageId) -> Box<Self> {
        let mut page = Box::new(<Self as zerocopy::FromZeros>::new_zeroed());
        page.group = id.group.into();
        page.which = which(id).into();
        page
    }

    /// Entry `index`, less than 1020.
    #[must_use]
    pub fn get(&self, index: usize) -> u32 {
        self.entries[index].get()
    }

    /// Sets entry `index`, less than 1020.
    pub fn set(&mut self, index: usize, value: u32) {
        self.entries[index] = value.into();
    }

    /// The checkpoint that wrote it.
    #[must_use]
    pub fn generation(&self) -> Generation {
        Generation::new(self.generation.get())
    }

    /// Stamps and copies the page for writing.
    pub fn encode(&mut self, generation: Generation, out: &mut [u8]) {
        self.generation = generation.get().into();
        let crc = crc32(&self.as_bytes()[4..]);
        self.crc = crc.into();
        out.copy_from_slice(self.as_bytes());
    }

    /// Reads the page `id`, last written by `generation`.
    ///
    /// # Errors
    /// `Corrupt` when it is damaged, stale or another page.
    pub fn decode(bytes: &[u8], id: PageId, generation: Generation) -> Result<Box<Self>> {
        let page = Self::ref_from_bytes(bytes)
            .map_err(|_| Error::corrupt(format!("{id} is cut short")))?;
        if page.crc.get() != crc32(&bytes[4..]) {
            return Err(Error::corrupt(format!("{id}: checksum does not match")));
        }
        if page.group.get() != id.group || page.which.get() != which(id) {
            return Err(Error::corrupt(format!("{id}: another page lies in its place")));
        }
        if page.generation() != generation {
            return Err(Error::corrupt(format!(
                "{id}: {} lies there, its header says {generation}",
                page.generation()
            )));
        }
        let whole = page.entries.iter().all(|entry| is_whole(entry.get()));
        if id.table == Table::Refs && !whole {
            return Err(Error::corrupt(format!("{id}: a count without a type, or a type alone")));
        }
        Ok(Box::new(page.clone()))
    }
}

/// Whether an entry is either free or of a type and counted.
const fn is_whole(entry: u32) -> bool {
    (entry & COUNT_MASK == 0) == (entry >> 30 == 0)
}

fn which(id: PageId) -> u32 {
    let table = match id.table {
        Table::Refs => 0,
        Table::Sums => 1 << 31,
    };
    table | id.page
}

impl std::fmt::Display for PageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let table = match self.table {
            Table::Refs => "reference-count",
            Table::Sums => "checksum",
        };
        write!(f, "{table} page {} of group {}", self.page, self.group)
    }
}

/// Header of a group: the slot and generation of each page of both tables.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GroupHeader {
    crc: U32,
    magic: U32,
    uuid: [u8; 16],
    group: U32,
    generation: U32,
    /// One byte a page: 0 or 1; reference-count pages first, checksum pages from 256 on.
    slots: [u8; PAGES],
    generations: [U32; PAGES],
    reserved: [u8; BLOCK_SIZE - 32 - 5 * PAGES],
}

const _: () = assert!(size_of::<GroupHeader>() == BLOCK_SIZE);

/// The fields of a group's header.
pub const HEADER_FIELDS: &[Field] = fields!(
    GroupHeader: crc, magic, uuid [u64], group, generation, slots [u8], generations [U32],
    reserved [u8],
);
const HEADER_MAGIC: u32 = 0x7072_4750;

impl GroupHeader {
    /// The header that was never written: no page was either.
    #[must_use]
    pub fn empty(group: u32, uuid: [u8; 16]) -> Box<Self> {
        let mut header = Box::new(<Self as zerocopy::FromZeros>::new_zeroed());
        header.magic = HEADER_MAGIC.into();
        header.uuid = uuid;
        header.group = group.into();
        header
    }

    /// Slot and generation of the last version of a page; generation 0: never written.
    #[must_use]
    pub fn version(&self, id: PageId) -> (u64, Generation) {
        let at = position(id);
        (u64::from(self.slots[at] & 1), Generation::new(self.generations[at].get()))
    }

    /// Gives `generation` a version of the page of its own and returns the slot to write it to:
    /// the other one, unless this generation has chosen already.
    pub fn choose_slot(&mut self, id: PageId, generation: Generation) -> u64 {
        let (slot, written) = self.version(id);
        if written == generation {
            return slot;
        }
        let at = position(id);
        self.slots[at] = u8::from(slot == 0);
        self.generations[at] = generation.get().into();
        1 - slot
    }

    /// Stamps and copies the header for writing.
    pub fn encode(&mut self, generation: Generation, out: &mut [u8]) {
        self.generation = generation.get().into();
        let crc = crc32(&self.as_bytes()[4..]);
        self.crc = crc.into();
        out.copy_from_slice(self.as_bytes());
    }

    /// Reads the header of `group`, last written by `generation`.
    ///
    /// # Errors
    /// `Corrupt` when it is damaged, stale or another header.
    pub fn decode(
        bytes: &[u8],
        group: u32,
        generation: Generation,
        uuid: [u8; 16],
    ) -> Result<Box<Self>> {
        let bad = |what: &str| Error::corrupt(format!("header of group {group}: {what}"));
        let header = Self::ref_from_bytes(bytes).map_err(|_| bad("cut short"))?;
        if header.crc.get() != crc32(&bytes[4..]) {
            return Err(bad("checksum does not match"));
        }
        if header.magic.get() != HEADER_MAGIC || header.group.get() != group || header.uuid != uuid
        {
            return Err(bad("another structure lies in its place"));
        }
        if header.generation.get() != generation.get() {
            return Err(bad("an older or newer version lies in its place"));
        }
        if header.generations.iter().any(|g| g.get() > generation.get()) {
            return Err(bad("a page is newer than the header"));
        }
        Ok(Box::new(header.clone()))
    }
}

fn position(id: PageId) -> usize {
    let table = match id.table {
        Table::Refs => 0,
        Table::Sums => GROUP_PAGES_MAX,
    };
    to_usize(table + u64::from(id.page))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: PageId = PageId { group: 3, table: Table::Sums, page: 5 };

    #[test]
    fn page_round_trip_and_damage() {
        let mut page = TablePage::empty(ID);
        page.set(1019, 77);
        let mut bytes = [0; BLOCK_SIZE];
        page.encode(Generation::new(4), &mut bytes);
        let back = TablePage::decode(&bytes, ID, Generation::new(4)).unwrap();
        assert_eq!((back.get(1019), back.get(0)), (77, 0));
        assert!(TablePage::decode(&bytes, ID, Generation::new(5)).is_err(), "stale");
        for other in [
            PageId { page: 6, ..ID },
            PageId { group: 2, ..ID },
            PageId { table: Table::Refs, ..ID },
        ] {
            let error = TablePage::decode(&bytes, other, Generation::new(4)).err().unwrap();
            assert!(error.to_string().ends_with("another page lies in its place"), "{error}");
        }
        bytes[100] ^= 1;
        assert!(TablePage::decode(&bytes, ID, Generation::new(4)).is_err(), "damaged");
    }

    #[test]
    fn entries_that_cannot_be_are_refused() {
        for (entry, good) in [(0, true), (1, false), (1 << 30, false), ((2 << 30) | 5, true)] {
            for table in [Table::Refs, Table::Sums] {
                let id = PageId { table, ..ID };
                let mut page = TablePage::empty(id);
                page.set(7, entry);
                let mut bytes = [0; BLOCK_SIZE];
                page.encode(Generation::new(4), &mut bytes);
                let read = TablePage::decode(&bytes, id, Generation::new(4));
                assert_eq!(read.is_ok(), good || table == Table::Sums);
            }
        }
    }

    #[test]
    fn header_alternates_slots_by_generation() {
        let mut header = GroupHeader::empty(3, [1; 16]);
        assert_eq!(header.version(ID), (0, Generation::new(0)));
        assert_eq!(header.choose_slot(ID, Generation::new(2)), 1);
        assert_eq!(header.choose_slot(ID, Generation::new(2)), 1, "once a generation");
        assert_eq!(header.choose_slot(ID, Generation::new(4)), 0);
        assert_eq!(header.choose_slot(ID, Generation::new(6)), 1, "never the last version's slot");
        let mut bytes = [0; BLOCK_SIZE];
        header.encode(Generation::new(6), &mut bytes);
        assert!(GroupHeader::decode(&bytes, 3, Generation::new(6), [1; 16]).is_ok());
    }

    #[test]
    fn headers_that_are_not_the_one_are_refused() {
        let mut header = GroupHeader::empty(3, [1; 16]);
        header.choose_slot(ID, Generation::new(6));
        let mut bytes = [0; BLOCK_SIZE];
        header.encode(Generation::new(6), &mut bytes);
        let refusal = |bytes: &[u8], group, generation, uuid| {
            let read = GroupHeader::decode(bytes, group, Generation::new(generation), uuid);
            read.err().expect("it is another one").to_string()
        };
        let misplaced = [refusal(&bytes, 2, 6, [1; 16]), refusal(&bytes, 3, 6, [2; 16])];
        assert_eq!(misplaced[0], "header of group 2: another structure lies in its place");
        assert_eq!(misplaced[1], "header of group 3: another structure lies in its place");
        for generation in [5, 7] {
            let error = refusal(&bytes, 3, generation, [1; 16]);
            assert!(error.ends_with("an older or newer version lies in its place"), "{error}");
        }
        let mut flipped = bytes;
        flipped[3000] ^= 1;
        assert!(refusal(&flipped, 3, 6, [1; 16]).ends_with("checksum does not match"));
        // The checksum is right, and it is not a header, or one that speaks of the future.
        header.magic = 0.into();
        header.encode(Generation::new(6), &mut bytes);
        assert!(refusal(&bytes, 3, 6, [1; 16]).ends_with("another structure lies in its place"));
        header.magic = HEADER_MAGIC.into();
        header.encode(Generation::new(5), &mut bytes);
        assert!(refusal(&bytes, 3, 5, [1; 16]).ends_with("a page is newer than the header"));
    }

    #[test]
    fn entries_hold_type_and_count() {
        for kind in [BlockType::Data, BlockType::Node, BlockType::Catalogue] {
            assert_eq!(BlockType::of(kind.entry(9)), kind);
            assert_eq!(kind.entry(9) & COUNT_MASK, 9);
            assert_eq!(kind.entry(0), 0);
        }
    }
}
