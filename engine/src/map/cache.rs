//! The nodes in memory. A bounded arena of slots, an index by block number, CLOCK eviction.
//!
//! ```text
//! index: block -> slot       about: block, birth, level, dirty, referenced    (one per slot)
//!                            pages: the node itself, 512 to a huge page       (one per slot)
//!                            hints: slot of each child, when last seen        (inner nodes)
//! ```
//!
//! Invariants: a node in the cache has been verified against the pointer that led to it, or was
//! made here. A dirty node (made since the last durable checkpoint) is never evicted. Nothing is
//! evicted during an edit, so what [`super::prepare_edit`] found stays. Which node is evicted
//! depends on the order of calls alone.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use memmap2::{Advice, MmapMut};
use zerocopy::{FromBytes, IntoBytes};

use super::index::Index;
use super::{Fanout, Missing};
use crate::error::{Error, Result};
use crate::format::node::{INNER_ENTRIES_MAX, Node, NodeBlock, seal_crc};
use crate::limits::MAP_LEVELS_MAX;
use crate::units::{BLOCK_SIZE, BlockNo, Seqno, to_u32, to_u64, to_usize};

/// Nodes in a chunk of memory: 2 MiB.
const CHUNK_NODES: usize = 512;
/// Clean nodes that stay, however many are dirty: the two paths of an edit with room to spare.
/// With fewer, loading the lower end of a path would evict its upper end, over and over.
const CLEAN_MIN: usize = 4 * MAP_LEVELS_MAX;
/// Slots that one search for a victim looks at. Dirty nodes may be many; the search goes on from
/// there at the next call, and the cache is over its capacity until then.
const SCAN_MAX: usize = 1024;
const CLEAN: u32 = u32::MAX;
/// The row of hints of a leaf, which has none.
const NO_ROW: u32 = u32::MAX;
const NO_BLOCK: BlockNo = BlockNo::new(u64::MAX);

/// Index of a node's place in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot(u32);

impl Slot {
    fn at(self) -> usize {
        to_usize(u64::from(self.0))
    }
}

struct About {
    block: BlockNo,
    birth: Seqno,
    /// Position in the list of dirty nodes, or `CLEAN`.
    dirty_at: u32,
    /// Which row of hints is the node's, or `NO_ROW`.
    row: u32,
    level: u8,
    /// Set by readers, who share the cache; cleared by the hand of the clock.
    referenced: AtomicBool,
}

/// Where the children of an inner node were last found. A hint is checked against the pointer, so
/// it may be wrong; when it is right, which is nearly always, the way down does not wait for the
/// index.
struct Hints([AtomicU32; INNER_ENTRIES_MAX]);

/// Memory of many nodes: one huge page. A look-up in a large map goes to a node that no cache of
/// the processor holds, and with small pages it would miss the TLB for each of them as well.
struct Chunk(MmapMut);

impl Chunk {
    fn new(huge: bool) -> Self {
        let map = MmapMut::map_anon(CHUNK_NODES * BLOCK_SIZE).expect("memory for the node cache");
        // A kernel without huge pages refuses: then it is ordinary memory.
        let _advised = huge.then(|| map.advise(Advice::HugePage));
        Self(map)
    }

    fn nodes(&self) -> &[NodeBlock] {
        <[NodeBlock]>::ref_from_bytes(&self.0).expect("a mapping is whole, aligned blocks")
    }

    fn nodes_mut(&mut self) -> &mut [NodeBlock] {
        <[NodeBlock]>::mut_from_bytes(&mut self.0).expect("a mapping is whole, aligned blocks")
    }
}

/// A bounded cache of map nodes.
pub struct NodeCache {
    capacity: usize,
    pool: [u8; 16],
    fanout: Fanout,
    index: Index,
    about: Vec<About>,
    chunks: Vec<Chunk>,
    hints: Vec<Hints>,
    free_rows: Vec<u32>,
    free: Vec<Slot>,
    dirty: Vec<Slot>,
    hand: usize,
}

impl NodeCache {
    /// An empty cache for `capacity_nodes` nodes of 4 KiB (at least 40) of the pool `uuid`.
    /// Dirty nodes cannot be evicted and may take it beyond that: the caller makes a checkpoint
    /// before they fill the cache.
    ///
    /// # Panics
    /// If `fanout` is out of bounds.
    #[must_use]
    pub fn new(capacity_nodes: usize, uuid: [u8; 16], fanout: Fanout) -> Self {
        fanout.assert_valid();
        Self {
            capacity: capacity_nodes.max(CLEAN_MIN),
            pool: uuid,
            fanout,
            index: Index::new(),
            about: Vec::new(),
            chunks: Vec::new(),
            hints: Vec::new(),
            free_rows: Vec::new(),
            free: Vec::new(),
            dirty: Vec::new(),
            hand: 0,
        }
    }

    /// Nodes in the cache.
    #[must_use]
    pub fn len(&self) -> usize {
        self.about.len() - self.free.len()
    }

    /// Whether the cache holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Nodes that a checkpoint has still to write.
    #[must_use]
    pub fn dirty_len(&self) -> usize {
        self.dirty.len()
    }

    /// Nodes that fit.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The node at `block`, whatever its birth.
    #[must_use]
    pub fn get(&self, block: BlockNo) -> Option<&Node> {
        self.find(block).map(|slot| self.node(slot))
    }

    /// The bytes of the node at `block`, without a crc if it is dirty ([`Self::copy_out`]).
    #[must_use]
    pub fn get_bytes(&self, block: BlockNo) -> Option<&[u8; BLOCK_SIZE]> {
        self.get(block).and_then(|node| node.as_bytes().try_into().ok())
    }

    /// Takes in a node that was read because it was `missing`. All of it is verified. A node that
    /// has come in meanwhile stays.
    ///
    /// The caller makes sure that the block was not freed and written anew during the read.
    ///
    /// # Errors
    /// `Corrupt` if the bytes are not that node.
    pub fn insert_loaded(&mut self, missing: &Missing, bytes: &[u8]) -> Result<()> {
        let node = Node::verify(bytes, missing, &self.pool)?;
        if let Some(slot) = self.find(missing.block) {
            let about = &self.about[slot.at()];
            if about.birth == missing.birth {
                return Ok(());
            }
            if about.dirty_at != CLEAN {
                let (block, birth) = (about.block, about.birth);
                return Err(Error::corrupt(format!(
                    "map node at {block}: in use with birth {}, a pointer says {}",
                    birth.get(),
                    missing.birth.get()
                )));
            }
            self.release(slot);
        }
        self.trim_to(self.capacity - 1);
        let slot = self.claim(missing.block, missing.birth, missing.level);
        self.node_mut(slot).as_mut_bytes().copy_from_slice(node.as_bytes());
        Ok(())
    }

    /// Blocks of the dirty nodes with birth up to `seal`, sorted: what the checkpoint sealed there
    /// has to write.
    #[must_use]
    pub fn dirty_blocks_sealed(&self, seal: Seqno) -> Vec<BlockNo> {
        let sealed = |slot: &&Slot| self.about[slot.at()].birth <= seal;
        let of = |slot: &Slot| self.about[slot.at()].block;
        let mut blocks: Vec<BlockNo> = self.dirty.iter().filter(sealed).map(of).collect();
        blocks.sort_unstable();
        blocks
    }

    /// Copies the node at `block` to `out` (4096 bytes) with its crc; false if it is not here.
    #[must_use]
    pub fn copy_out(&self, block: BlockNo, out: &mut [u8]) -> bool {
        let Some(node) = self.get(block) else { return false };
        out.copy_from_slice(node.as_bytes());
        seal_crc(out);
        true
    }

    /// The node at `block` has been written, and the checkpoint that refers to it is durable.
    pub fn mark_clean(&mut self, block: BlockNo) {
        if let Some(slot) = self.find(block) {
            self.set_clean(slot);
        }
    }

    /// Drops the node at `block`: the checkpoint that frees the block is done.
    pub fn forget(&mut self, block: BlockNo) {
        if let Some(slot) = self.find(block) {
            self.release(slot);
        }
    }

    /// Entries in a full node.
    #[must_use]
    pub const fn fanout(&self) -> Fanout {
        self.fanout
    }

    /// The slot of the node that a pointer describes.
    pub(super) fn resident(&self, wanted: &Missing) -> std::result::Result<Slot, Missing> {
        let slot = self.find(wanted.block).ok_or(*wanted)?;
        if !self.holds(slot, wanted) {
            return Err(*wanted);
        }
        self.refer_to(slot);
        Ok(slot)
    }

    /// As [`Self::resident`], for the child that the entry `at` of the inner node in `parent` names.
    pub(super) fn child(
        &self,
        parent: Slot,
        at: usize,
        wanted: &Missing,
    ) -> std::result::Result<Slot, Missing> {
        let row = to_usize(u64::from(self.about[parent.at()].row));
        let Some(hint) = self.hints.get(row).and_then(|row| row.0.get(at)) else {
            return self.resident(wanted);
        };
        let slot = Slot(hint.load(Ordering::Relaxed));
        if slot.at() < self.about.len() && self.holds(slot, wanted) {
            self.refer_to(slot);
            return Ok(slot);
        }
        let slot = self.resident(wanted)?;
        hint.store(slot.0, Ordering::Relaxed);
        Ok(slot)
    }

    fn holds(&self, slot: Slot, wanted: &Missing) -> bool {
        let About { block, birth, level, .. } = self.about[slot.at()];
        block == wanted.block && birth == wanted.birth && level == wanted.level
    }

    fn refer_to(&self, slot: Slot) {
        let referenced = &self.about[slot.at()].referenced;
        // Readers share the cache: no store to a line that is already as it should be.
        if !referenced.load(Ordering::Relaxed) {
            referenced.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn node(&self, slot: Slot) -> &Node {
        &self.chunks[slot.at() / CHUNK_NODES].nodes()[slot.at() % CHUNK_NODES].0
    }

    pub(super) fn node_mut(&mut self, slot: Slot) -> &mut Node {
        &mut self.chunks[slot.at() / CHUNK_NODES].nodes_mut()[slot.at() % CHUNK_NODES].0
    }

    pub(super) fn is_dirty(&self, slot: Slot) -> bool {
        self.about[slot.at()].dirty_at != CLEAN
    }

    /// A new, empty, dirty node. Evicts nothing.
    pub(super) fn create(&mut self, block: BlockNo, birth: Seqno, level: u8) -> Slot {
        // What was cached of an earlier life of the block is out of date.
        self.forget(block);
        let slot = self.claim(block, birth, level);
        let pool = self.pool;
        let node = self.node_mut(slot);
        node.reset(&pool, level);
        node.place(block, birth);
        self.set_dirty(slot);
        slot
    }

    /// A dirty copy of the node in `from`. Evicts nothing.
    pub(super) fn duplicate(&mut self, from: Slot, block: BlockNo, birth: Seqno) -> Slot {
        self.forget(block);
        let slot = self.claim(block, birth, self.about[from.at()].level);
        let (source, target) = (from.at(), slot.at());
        let [source_chunk, target_chunk] = [source / CHUNK_NODES, target / CHUNK_NODES];
        if source_chunk == target_chunk {
            let bytes = self.chunks[source_chunk].nodes_mut().as_mut_bytes();
            let start = (source % CHUNK_NODES) * BLOCK_SIZE;
            bytes.copy_within(start..start + BLOCK_SIZE, (target % CHUNK_NODES) * BLOCK_SIZE);
        } else if let Ok([source_chunk, target_chunk]) =
            self.chunks.get_disjoint_mut([source_chunk, target_chunk])
        {
            let copied = &source_chunk.nodes()[source % CHUNK_NODES];
            target_chunk.nodes_mut()[target % CHUNK_NODES].clone_from(copied);
        }
        self.node_mut(slot).place(block, birth);
        self.set_dirty(slot);
        slot
    }

    /// The node in `slot` becomes a dirty one with a new place and birth; its old place is no
    /// longer in the cache. The node must be clean: a dirty one is still to be written.
    pub(super) fn rename(&mut self, slot: Slot, block: BlockNo, birth: Seqno) {
        assert!(!self.is_dirty(slot), "a dirty node was renamed");
        self.forget(block);
        self.unlist(slot);
        self.index.insert(block, slot.0);
        let about = &mut self.about[slot.at()];
        about.block = block;
        about.birth = birth;
        self.node_mut(slot).place(block, birth);
        self.set_dirty(slot);
    }

    /// Drops the node in `slot`, which no pointer names any more.
    pub(super) fn release(&mut self, slot: Slot) {
        self.set_clean(slot);
        self.unlist(slot);
        let about = &mut self.about[slot.at()];
        about.block = NO_BLOCK;
        let row = std::mem::replace(&mut about.row, NO_ROW);
        self.free_rows.extend((row != NO_ROW).then_some(row));
        self.free.push(slot);
    }

    /// Gives back what edits have added beyond the capacity, as far as it is clean. Not between the
    /// edits of one record: the later ones need what was found to be here before the first.
    pub fn trim(&mut self) {
        self.trim_to(self.capacity);
    }

    fn trim_to(&mut self, len: usize) {
        let len = len.max(self.dirty.len() + CLEAN_MIN);
        while self.len() > len && self.evict_one() {}
    }

    fn find(&self, block: BlockNo) -> Option<Slot> {
        self.index.find(block, |slot| self.about[Slot(slot).at()].block == block).map(Slot)
    }

    fn unlist(&mut self, slot: Slot) {
        let (index, about) = (&mut self.index, &self.about);
        let block = about[slot.at()].block;
        index.remove(block, |slot| about[Slot(slot).at()].block == block);
    }

    fn claim(&mut self, block: BlockNo, birth: Seqno, level: u8) -> Slot {
        let slot = self.free.pop().unwrap_or_else(|| self.add_slot());
        let row = if level == 0 { NO_ROW } else { self.claim_row() };
        let referenced = AtomicBool::new(true);
        self.about[slot.at()] = About { block, birth, dirty_at: CLEAN, row, level, referenced };
        self.index.insert(block, slot.0);
        slot
    }

    /// A row of hints, which may hold those of the node that had it before.
    fn claim_row(&mut self) -> u32 {
        self.free_rows.pop().unwrap_or_else(|| {
            self.hints.push(Hints([const { AtomicU32::new(0) }; INNER_ENTRIES_MAX]));
            to_u32(to_u64(self.hints.len() - 1))
        })
    }

    fn add_slot(&mut self) -> Slot {
        let slot = Slot(to_u32(to_u64(self.about.len())));
        if self.about.len() == self.chunks.len() * CHUNK_NODES {
            // All of a huge page is made, and zeroed, at the first touch: not for a few nodes.
            self.chunks.push(Chunk::new(self.capacity >= CHUNK_NODES));
        }
        let birth = Seqno::new(0);
        let referenced = AtomicBool::new(false);
        let (block, dirty_at, row, level) = (NO_BLOCK, CLEAN, NO_ROW, 0);
        self.about.push(About { block, birth, dirty_at, row, level, referenced });
        slot
    }

    fn set_dirty(&mut self, slot: Slot) {
        debug_assert!(!self.is_dirty(slot));
        self.about[slot.at()].dirty_at = to_u32(to_u64(self.dirty.len()));
        self.dirty.push(slot);
    }

    fn set_clean(&mut self, slot: Slot) {
        if !self.is_dirty(slot) {
            return;
        }
        let at = std::mem::replace(&mut self.about[slot.at()].dirty_at, CLEAN);
        self.dirty.swap_remove(to_usize(u64::from(at)));
        if let Some(moved) = self.dirty.get(to_usize(u64::from(at))) {
            self.about[moved.at()].dirty_at = at;
        }
    }

    /// Evicts one clean node that was not used since the hand last passed; false if the search
    /// found none.
    fn evict_one(&mut self) -> bool {
        for _ in 0..SCAN_MAX.min(2 * self.about.len()) {
            let at = self.hand;
            self.hand = if at + 1 < self.about.len() { at + 1 } else { 0 };
            let about = &mut self.about[at];
            if about.block == NO_BLOCK || about.dirty_at != CLEAN {
                continue;
            }
            if std::mem::replace(about.referenced.get_mut(), false) {
                continue;
            }
            self.release(Slot(to_u32(to_u64(at))));
            return true;
        }
        false
    }
}
