//! What lies where: every block of an image with the structure that it holds, found from the
//! newest superblock on, by the decoders alone.

use pando_engine::disk::sim::Image;
use pando_engine::format::catalogue::{Catalogue, ChainReader};
use pando_engine::format::codec::decode_catalogue;
use pando_engine::format::geometry::{Geometry, PAGE_ENTRIES, PageId, SUPER_SLOTS, Table};
use pando_engine::format::group::GroupHeader;
use pando_engine::format::node::{Node, NodeChild, NodeRef, children};
use pando_engine::format::superblock::Superblock;
use pando_engine::units::{BlockNo, to_u32, to_usize};

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Structure {
    /// A superblock, of either slot.
    Superblock,
    /// A part of the journal's ring.
    Journal,
    /// The header of a group.
    GroupHeader,
    /// A page of reference counts.
    Counts,
    /// A page of checksums.
    Sums,
    /// A part of the catalogue.
    Catalogue,
    /// A node of a map above the leaves.
    Inner,
    /// A leaf.
    Leaf,
    /// A block of a volume.
    Data,
    /// Nothing that is needed: free, or the slot of an older version.
    Unused,
}

impl Structure {
    /// The name, for reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Superblock => "superblock",
            Self::Journal => "journal",
            Self::GroupHeader => "group header",
            Self::Counts => "reference counts",
            Self::Sums => "checksums",
            Self::Catalogue => "catalogue",
            Self::Inner => "inner node",
            Self::Leaf => "leaf",
            Self::Data => "data",
            Self::Unused => "unused",
        }
    }
}

/// The blocks of an image.
pub struct Places {
    /// The newest superblock.
    pub superblock: Superblock,
    /// Its catalogue.
    pub catalogue: Catalogue,
    /// Blocks of the catalogue.
    pub chain: Vec<BlockNo>,
    /// What each block holds, by its number.
    pub holds: Vec<Structure>,
}

impl Places {
    /// Looks at a sound image.
    ///
    /// # Panics
    /// When it is not sound.
    #[must_use]
    pub fn of(image: &Image) -> Self {
        let superblock = newest(image);
        let geometry = superblock.geometry;
        let (chain, catalogue) = catalogue(image, &superblock);
        let holds = vec![Structure::Unused; to_usize(geometry.pool_blocks)];
        let mut places = Self { superblock, catalogue, chain, holds };
        for place in [0, 1].into_iter().flat_map(|slot| geometry.super_places(slot)) {
            places.put(place, Structure::Superblock);
        }
        for offset in 0..geometry.journal_blocks {
            places.put(geometry.journal_start().plus(offset), Structure::Journal);
        }
        for place in places.chain.clone() {
            places.put(place, Structure::Catalogue);
        }
        places.tables(image, &geometry);
        places.maps(image);
        places
    }

    /// What a block holds.
    #[must_use]
    pub fn at(&self, block: BlockNo) -> Structure {
        self.holds[to_usize(block.get())]
    }

    /// All blocks that hold this.
    pub fn blocks(&self, structure: Structure) -> impl Iterator<Item = BlockNo> {
        let numbered = (0..).zip(&self.holds);
        numbered.filter(move |(_, held)| **held == structure).map(|(n, _)| BlockNo::new(n))
    }

    fn put(&mut self, block: BlockNo, structure: Structure) {
        self.holds[to_usize(block.get())] = structure;
    }

    fn tables(&mut self, image: &Image, geometry: &Geometry) {
        for (group, entry) in (0u32..).zip(self.catalogue.groups.clone()) {
            if entry.generation.get() == 0 {
                continue;
            }
            let place = geometry.header_place(u64::from(group), u64::from(entry.slot));
            let (bytes, uuid) = (image.block(place), self.superblock.uuid);
            let header = GroupHeader::decode(bytes, group, entry.generation, uuid);
            let header = header.expect("a sound image");
            self.put(place, Structure::GroupHeader);
            for page in 0..geometry.group_len(u64::from(group)).div_ceil(PAGE_ENTRIES) {
                for (table, structure) in
                    [(Table::Refs, Structure::Counts), (Table::Sums, Structure::Sums)]
                {
                    let id = PageId { group, table, page: to_u32(page) };
                    let (slot, generation) = header.version(id);
                    if generation.get() > 0 {
                        self.put(geometry.page_place(id, slot), structure);
                    }
                }
            }
        }
    }

    fn maps(&mut self, image: &Image) {
        let roots = self.catalogue.volumes.iter().filter_map(|volume| volume.root);
        let mut left: Vec<NodeRef> = roots.map(|root| root.node_ref()).collect();
        while let Some(wanted) = left.pop() {
            if self.at(wanted.block) != Structure::Unused {
                continue; // Shared, and met before.
            }
            let node = Node::verify(image.block(wanted.block), &wanted, &self.superblock.uuid);
            let node = node.expect("a sound image");
            let structure = if node.level() == 0 { Structure::Leaf } else { Structure::Inner };
            self.put(wanted.block, structure);
            left.extend(node.child_refs(wanted.end));
            for child in children(node) {
                let NodeChild::Data(extent) = child else { continue };
                for offset in 0..extent.len {
                    self.put(extent.block.plus(offset), Structure::Data);
                }
            }
        }
        assert!(self.catalogue.drops.is_empty(), "no deletion is under way in these images");
    }
}

fn newest(image: &Image) -> Superblock {
    let end = image.len_blocks() - SUPER_SLOTS;
    let places = [0, 1, end, end + 1].map(BlockNo::new).into_iter();
    let found = places.filter_map(|at| Superblock::decode(image.block(at), at).ok());
    found.max_by_key(|superblock| superblock.generation).expect("a sound image")
}

fn catalogue(image: &Image, superblock: &Superblock) -> (Vec<BlockNo>, Catalogue) {
    let Superblock { uuid, generation, catalogue, catalogue_bytes, .. } = *superblock;
    let chain = ChainReader::new(uuid, generation, catalogue, catalogue_bytes);
    let mut chain = chain.expect("a sound image");
    while let Some(place) = chain.wants() {
        chain.take(image.block(place)).expect("a sound image");
    }
    let (blocks, bytes) = chain.finish();
    (blocks, decode_catalogue(&bytes).expect("a sound image"))
}
