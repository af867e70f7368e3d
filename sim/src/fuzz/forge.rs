//! Pools made by hand, with every checksum right: one group, a catalogue at its first blocks, counts
//! and checksums as they are given.

use std::collections::BTreeMap;

use pando_engine::crc::crc32;
use pando_engine::disk::sim::{Image, SimImage};
use pando_engine::format::catalogue::{
    Catalogue, GroupEntry, IoLimits, VolumeEntry, chain_blocks, encode_chain_block,
};
use pando_engine::format::codec::encode_catalogue;
use pando_engine::format::geometry::{Geometry, PageId, Table};
use pando_engine::format::group::{BlockType, GroupHeader, TablePage};
use pando_engine::format::node::Root;
use pando_engine::format::superblock::Superblock;
use pando_engine::units::{
    BLOCK_BYTES, BLOCK_SIZE, BlockNo, Generation, Seqno, VolumeId, to_u32, to_u64,
};

/// Identity of the pools.
pub(super) const POOL: [u8; 16] = [7; 16];
const GENERATION: Generation = Generation::new(4);

/// A pool in the making.
pub(super) struct Forge {
    pub(super) image: Image,
    pub(super) superblock: Superblock,
    pub(super) catalogue: Catalogue,
    /// Type and number of references of blocks.
    pub(super) counts: BTreeMap<BlockNo, (BlockType, u32)>,
    /// Checksums of blocks.
    pub(super) sums: BTreeMap<BlockNo, u32>,
}

impl Forge {
    /// An empty pool of one group.
    pub(super) fn new(pool_blocks: u64, journal_blocks: u64, seal: u64) -> Self {
        let geometry = Geometry::new(pool_blocks, journal_blocks, 1).expect("a small pool");
        assert_eq!(geometry.groups(), 1, "a small pool has one group");
        let superblock = Superblock {
            uuid: POOL,
            geometry,
            generation: GENERATION,
            catalogue: geometry.block_at(0, 0),
            catalogue_bytes: 0,
            journal_offset: 0,
            seal: Seqno::new(seal),
            salt: 77,
            clean: false,
        };
        Self {
            image: Image::new(pool_blocks),
            superblock,
            catalogue: Catalogue { next_id: 1, ..Catalogue::default() },
            counts: BTreeMap::new(),
            sums: BTreeMap::new(),
        }
    }

    /// A block of the group.
    pub(super) fn block(&self, index: u64) -> BlockNo {
        self.superblock.geometry.block_at(0, index)
    }

    /// Adds a volume.
    pub(super) fn volume(&mut self, name: &str, blocks: u64, root: Option<Root>) -> VolumeId {
        let id = VolumeId::new(self.catalogue.next_id);
        self.catalogue.next_id += 1;
        self.catalogue.volumes.push(VolumeEntry {
            id,
            name: name.into(),
            size_bytes: blocks * BLOCK_BYTES,
            source: None,
            snapshot: false,
            read_only: false,
            reservation_blocks: 0,
            growth_limit_blocks: 0,
            io_limits: IoLimits::default(),
            labels: vec![],
            created_at: 0,
            root,
            shared_at: Seqno::new(0),
            held_blocks: 0,
            frozen_blocks: 0,
        });
        id
    }

    /// Puts data that says where it is into a block; its checksum is known.
    pub(super) fn data(&mut self, block: BlockNo) {
        let content = content(block);
        self.sums.insert(block, crc32(&content));
        self.image.write(block, 0, &content);
    }

    /// Adds one reference to a block.
    pub(super) fn refer(&mut self, block: BlockNo, kind: BlockType) {
        self.counts.entry(block).or_insert((kind, 0)).1 += 1;
    }

    /// Writes tables, catalogue and superblocks.
    pub(super) fn seal(mut self) -> SimImage {
        let geometry = self.superblock.geometry;
        self.catalogue.groups = vec![GroupEntry::default()];
        let bytes = encode_catalogue(&self.catalogue).expect("a small catalogue").len();
        let chain: Vec<BlockNo> =
            (0..to_u64(chain_blocks(bytes))).map(|index| self.block(index)).collect();
        for block in &chain {
            self.counts.insert(*block, (BlockType::Catalogue, 1));
        }
        let free = to_u32(geometry.group_len(0) - to_u64(self.counts.len()));
        self.catalogue.groups = vec![GroupEntry { generation: GENERATION, slot: 1, free }];
        let encoded = encode_catalogue(&self.catalogue).expect("as before");
        let mut block = [0; BLOCK_SIZE];
        for (index, place) in chain.iter().enumerate() {
            encode_chain_block(&encoded, index, &chain, GENERATION, POOL, &mut block);
            self.image.write(*place, 0, &block);
        }
        self.tables();
        self.superblock.catalogue_bytes = to_u64(encoded.len());
        let older = Superblock { generation: Generation::new(3), ..self.superblock.clone() };
        for superblock in [&older, &self.superblock] {
            let slot = u64::from(superblock.generation.get()) % 2;
            for place in geometry.super_places(slot) {
                self.image.write(place, 0, &superblock.encode());
            }
        }
        self.image.into()
    }

    fn tables(&mut self) {
        let geometry = self.superblock.geometry;
        let mut header = GroupHeader::empty(0, POOL);
        let mut bytes = [0; BLOCK_SIZE];
        for table in [Table::Refs, Table::Sums] {
            let id = PageId { group: 0, table, page: 0 };
            let mut page = TablePage::empty(id);
            let counts = self.counts.iter().map(|(block, (kind, n))| (*block, kind.entry(*n)));
            let sums = self.sums.iter().map(|(block, sum)| (*block, *sum));
            let entries: Vec<_> =
                if table == Table::Refs { counts.collect() } else { sums.collect() };
            for (block, entry) in entries {
                let (_, at) = geometry.page_of(table, block).expect("a block of the group");
                page.set(at, entry);
            }
            page.encode(GENERATION, &mut bytes);
            let slot = header.choose_slot(id, GENERATION);
            self.image.write(geometry.page_place(id, slot), 0, &bytes);
        }
        header.encode(GENERATION, &mut bytes);
        self.image.write(geometry.header_place(0, 1), 0, &bytes);
    }
}

/// What a data block holds.
pub(super) fn content(block: BlockNo) -> [u8; BLOCK_SIZE] {
    let word = block.get().wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = [0; BLOCK_SIZE];
    bytes.copy_from_slice([word.to_le_bytes(); BLOCK_SIZE / 8].as_flattened());
    bytes
}
