//! The one operation that changes a map: a range of LBAs gets new blocks, or none.
//!
//! The edit goes down to the leaves at the two edges of the range and comes back up, so that a
//! node is copied only when something below it did change. What lies between the edges is
//! dropped by its pointer, one reference each, whatever hangs below.

use std::ops::Range;

use super::cache::Slot;
use super::lookup::{Span, child_ref, clip, covered, first_overlap};
use super::{EditContext, NODES_PER_EDIT_MAX, RefChange, RefDelta, Root};
use crate::format::node::{
    Entry, Extent, InnerEntry, LBA_END, LeafEntry, Node, NodeChild, NodePtr, NodeRef, children,
    sums,
};
use crate::limits::{EXTENT_BLOCKS_MAX, MAP_LEVELS_MAX};
use crate::units::{BlockNo, Lba, Seqno, to_u32};

/// Maps the `len` blocks from `lba` on to as many consecutive blocks from `target` on, or unmaps
/// them (`None`). Cannot fail after [`super::prepare_edit`] of the same range, and evicts nothing:
/// [`super::NodeCache::trim`] is for when all edits of a record are done.
///
/// # Panics
/// If a node is not in the cache (the caller did not prepare), or if a mapping is longer than an
/// extent can be (65535 blocks).
pub fn edit(
    ctx: &mut EditContext<'_>,
    root: &mut Option<Root>,
    lba: Lba,
    len: u64,
    target: Option<BlockNo>,
) {
    assert!(len > 0, "an edit of no blocks");
    assert!(target.is_none() || len <= EXTENT_BLOCKS_MAX, "a mapping of {len} blocks");
    let insert = target.map(|block| Extent { lba, block, len, own: true });
    let mut editor = Editor { ctx, taken: 0, start: lba.get(), end: lba.get() + len };
    *root = editor.edit_root(root.as_ref(), insert);
}

/// The pointers that take the place of one: none if nothing is left below, two after a split.
#[derive(Default)]
struct Pointers {
    first: Option<NodePtr>,
    second: Option<NodePtr>,
}

impl Pointers {
    fn iter(&self) -> impl Iterator<Item = &NodePtr> {
        self.first.iter().chain(&self.second)
    }
}

/// Entries that take the place of others: at most the two neighbours, what is left of an extent
/// on both sides, and the new one.
struct Pieces<E> {
    entries: [E; 5],
    len: usize,
}

impl<E: Entry> Pieces<E> {
    fn new() -> Self {
        Self { entries: [E::new_zeroed(); 5], len: 0 }
    }

    fn push(&mut self, entry: E) {
        self.entries[self.len] = entry;
        self.len += 1;
    }

    fn as_slice(&self) -> &[E] {
        &self.entries[..self.len]
    }
}

impl Pieces<LeafEntry> {
    /// Adds `extent`, as a part of the last piece if it goes on where that ends.
    fn join(&mut self, extent: &Extent) {
        if let Some(last) = self.entries[..self.len].last_mut() {
            let before = last.extent();
            let goes_on = before.lba.get() + before.len == extent.lba.get()
                && before.block.get() + before.len == extent.block.get()
                && before.own == extent.own;
            if goes_on && before.len + extent.len <= EXTENT_BLOCKS_MAX {
                *last = LeafEntry::new(&Extent { len: before.len + extent.len, ..before });
                return;
            }
        }
        self.push(LeafEntry::new(extent));
    }
}

struct Editor<'a, 'b> {
    ctx: &'a mut EditContext<'b>,
    /// Blocks taken for new nodes so far.
    taken: usize,
    start: u64,
    end: u64,
}

impl Editor<'_, '_> {
    fn edit_root(&mut self, root: Option<&Root>, insert: Option<Extent>) -> Option<Root> {
        let Some(root) = root else {
            return insert.map(|extent| self.first_leaf(&extent));
        };
        let Some(pointers) = self.edit_node(&root.node_ref(), &root.ptr, insert) else {
            return Some(*root);
        };
        let level = root.level;
        match (pointers.first, pointers.second) {
            (Some(left), Some(right)) => Some(self.grow(&left, &right, level + 1)),
            (Some(ptr), None) => Some(self.collapse(Root { ptr, level })),
            (None, _) => None,
        }
    }

    /// Changes what is below `ptr`, which is described by `node`. `None` if nothing changed.
    fn edit_node(
        &mut self,
        node: &NodeRef,
        ptr: &NodePtr,
        insert: Option<Extent>,
    ) -> Option<Pointers> {
        if node.level == 0 {
            self.edit_leaf(node, ptr, insert)
        } else {
            self.edit_inner(node, ptr, insert)
        }
    }

    fn edit_leaf(
        &mut self,
        node: &NodeRef,
        ptr: &NodePtr,
        insert: Option<Extent>,
    ) -> Option<Pointers> {
        let slot = self.resident(node);
        let leaf = self.node(slot).leaf();
        let from = first_overlap(leaf, node, self.start);
        let overlapping = leaf[from..].iter().take_while(|entry| entry.key() < self.end);
        let to = from + overlapping.count();
        if insert.is_none() {
            if from == to {
                return None;
            }
            let all = from == 0 && to == leaf.len();
            if all && leaf[0].key() >= self.start && leaf[to - 1].end() <= self.end {
                self.log(ptr, RefChange::NodeDown);
                return Some(Pointers::default());
            }
        }
        let (slot, ptr) = self.make_own(slot, ptr);
        self.log_removed(slot, from..to);
        let (range, pieces) = self.leaf_pieces(slot, from..to, insert);
        if let Some(extent) = insert {
            self.log_data(&extent, RefChange::DataUp);
        }
        Some(self.replace(slot, &ptr, node.end, range, pieces.as_slice()))
    }

    /// What takes the place of which entries of the leaf in `slot`, of which the range of this
    /// edit overlaps `cut`.
    fn leaf_pieces(
        &self,
        slot: Slot,
        cut: Range<usize>,
        insert: Option<Extent>,
    ) -> (Range<usize>, Pieces<LeafEntry>) {
        let leaf = self.node(slot).leaf();
        let mut pieces = Pieces::new();
        let mut range = cut.clone();
        let neighbours = insert.is_some();
        if neighbours && cut.start > 0 {
            range.start -= 1;
            pieces.push(leaf[range.start]);
        }
        if let Some(head) = leaf[cut.clone()].first().and_then(|e| clip(e, 0, self.start)) {
            pieces.join(&head);
        }
        if let Some(extent) = insert {
            pieces.join(&extent);
        }
        if let Some(tail) = leaf[cut].last().and_then(|e| clip(e, self.end, u64::MAX)) {
            pieces.join(&tail);
        }
        if neighbours && let Some(right) = leaf.get(range.end) {
            range.end += 1;
            pieces.join(&right.extent());
        }
        (range, pieces)
    }

    fn edit_inner(
        &mut self,
        node: &NodeRef,
        ptr: &NodePtr,
        insert: Option<Extent>,
    ) -> Option<Pointers> {
        let slot = self.resident(node);
        let span = Span::of(self.node(slot), node, self.start, self.end);
        let mut pieces = Pieces::new();
        let mut changed = false;
        for at in span.first..=span.last {
            let child = child_ref(self.node(slot), at, node.end);
            let child_ptr = self.effective(self.node(slot).inner()[at].ptr());
            let insert = insert.filter(|_| at == span.first);
            if insert.is_none() && covered(&child, self.start, self.end) {
                self.log(&child_ptr, RefChange::NodeDown);
                changed = true;
            } else if let Some(pointers) = self.edit_node(&child, &child_ptr, insert) {
                pointers.iter().for_each(|ptr| pieces.push(InnerEntry::new(ptr)));
                changed = true;
            } else {
                pieces.push(InnerEntry::new(&child_ptr));
            }
        }
        if !changed {
            return None;
        }
        let range = span.first..span.last + 1;
        if pieces.as_slice().is_empty() && range.len() == self.node(slot).count() {
            self.drop_emptied(slot, ptr);
            return Some(Pointers::default());
        }
        let (slot, ptr) = self.make_own(slot, ptr);
        Some(self.replace(slot, &ptr, node.end, range, pieces.as_slice()))
    }

    /// The pointer as this volume has to see it: below a shared node nothing is its own.
    fn effective(&self, ptr: NodePtr) -> NodePtr {
        if ptr.birth > self.ctx.shared_at { ptr } else { NodePtr { own: 0, ..ptr } }
    }

    /// The node at `ptr` has lost its last child, and each of them is accounted for in the log. A
    /// shared node keeps them for its other parents: then the log must take nothing from them.
    fn drop_emptied(&mut self, slot: Slot, ptr: &NodePtr) {
        if ptr.birth <= self.ctx.shared_at {
            self.log_children_up(slot);
            self.log(ptr, RefChange::NodeDown);
            return;
        }
        self.log(ptr, RefChange::NodeMoved);
        if ptr.birth > self.ctx.seal {
            self.ctx.cache.release(slot);
        }
    }

    /// Makes the node at `ptr`, which is in `slot`, one that may be changed in memory; says where
    /// it is now.
    fn make_own(&mut self, slot: Slot, ptr: &NodePtr) -> (Slot, NodePtr) {
        let (seq, owned) = (self.ctx.seq, ptr.birth > self.ctx.shared_at);
        if owned && ptr.birth > self.ctx.seal {
            debug_assert!(self.ctx.cache.is_dirty(slot));
            return (slot, *ptr);
        }
        let block = self.take();
        let moved = NodePtr { block, birth: seq, ..*ptr };
        if owned {
            self.log(ptr, RefChange::NodeMoved);
            if self.ctx.cache.is_dirty(slot) {
                // The checkpoint that is under way has still to write it.
                return (self.ctx.cache.duplicate(slot, block, seq), moved);
            }
            self.ctx.cache.rename(slot, block, seq);
            return (slot, moved);
        }
        self.log_children_up(slot);
        self.log(ptr, RefChange::NodeDown);
        let slot = self.ctx.cache.duplicate(slot, block, seq);
        let copy = self.ctx.cache.node_mut(slot);
        if copy.level() == 0 {
            copy.clear_own::<LeafEntry>();
        } else {
            copy.clear_own::<InnerEntry>();
        }
        (slot, NodePtr { own: 0, ..moved })
    }

    /// Puts `pieces` in the place of the entries `range` of the node in `slot`, which is at `ptr`,
    /// ends before `end` and may be changed. Splits it if they do not fit.
    fn replace<E: Entry>(
        &mut self,
        slot: Slot,
        ptr: &NodePtr,
        end: Lba,
        range: Range<usize>,
        pieces: &[E],
    ) -> Pointers {
        let entries = self.node(slot).entries::<E>();
        if entries.len() - range.len() + pieces.len() > self.entries_max::<E>() {
            return self.split(slot, ptr, end, range, pieces);
        }
        let (mapped_before, own_before) = sums(&entries[range.clone()]);
        let (mapped, own) = sums(pieces);
        let mapped = ptr.mapped.saturating_sub(mapped_before).saturating_add(mapped);
        // In a damaged map the sum of the node may be wrong. It must not come to what no reader takes.
        let own = ptr.own.saturating_sub(own_before).saturating_add(own).min(mapped);
        let node = self.ctx.cache.node_mut(slot);
        node.splice(range, pieces);
        let lba = Lba::new(node.entries::<E>()[0].key());
        let first = Some(NodePtr { lba, mapped, own, ..*ptr });
        Pointers { first, second: None }
    }

    /// Like [`Self::replace`], into this node and a new one on its right. In the middle; but what
    /// is appended to the map goes to the new node alone, so that sequential writes leave full nodes.
    /// Only there: before other nodes, writes that go backwards would make a node of each block.
    fn split<E: Entry>(
        &mut self,
        slot: Slot,
        ptr: &NodePtr,
        end: Lba,
        range: Range<usize>,
        pieces: &[E],
    ) -> Pointers {
        let old = self.node(slot).entries::<E>();
        let append = range.end == old.len() && end.get() == LBA_END;
        let all = [&old[..range.start], pieces, &old[range.end..]].concat();
        let at = if append { self.entries_max::<E>() } else { all.len() / 2 };
        let (left, right) = all.split_at(at);
        let count = old.len();
        self.ctx.cache.node_mut(slot).splice(0..count, left);
        let first = Some(pointer_to(left, ptr));
        let second = Some(self.new_node(self.node(slot).level(), right));
        Pointers { first, second }
    }

    fn entries_max<E: Entry>(&self) -> usize {
        let fanout = self.ctx.cache.fanout();
        if E::MAX == LeafEntry::MAX { fanout.leaf_max } else { fanout.inner_max }
    }

    fn new_node<E: Entry>(&mut self, level: u8, entries: &[E]) -> NodePtr {
        let (block, birth) = (self.take(), self.ctx.seq);
        let slot = self.ctx.cache.create(block, birth, level);
        self.ctx.cache.node_mut(slot).splice(0..0, entries);
        let (lba, mapped, own) = (Lba::new(0), 0, 0);
        pointer_to(entries, &NodePtr { lba, block, birth, mapped, own })
    }

    fn first_leaf(&mut self, extent: &Extent) -> Root {
        self.log_data(extent, RefChange::DataUp);
        Root { ptr: self.new_node(0, &[LeafEntry::new(extent)]), level: 0 }
    }

    /// A root above the two halves of the old one. Every level takes at least 50 splits of the
    /// level below, and a leaf 126 edits: ten levels would take 126 * 50^9 edits.
    fn grow(&mut self, left: &NodePtr, right: &NodePtr, level: u8) -> Root {
        assert!(usize::from(level) < MAP_LEVELS_MAX, "a map of more than {MAP_LEVELS_MAX} levels");
        let entries = [InnerEntry::new(left), InnerEntry::new(right)];
        Root { ptr: self.new_node(level, &entries), level }
    }

    /// While the root has a single child, that becomes the root. The child's reference passes
    /// from the old root to the volume. Only roots that this edit could change in memory: any
    /// other was not touched, and its turn comes when it is.
    fn collapse(&mut self, mut root: Root) -> Root {
        while root.level > 0 && root.ptr.birth > self.ctx.seal.max(self.ctx.shared_at) {
            let slot = self.resident(&root.node_ref());
            let &[child] = self.node(slot).inner() else { break };
            self.log(&root.ptr, RefChange::NodeMoved);
            self.ctx.cache.release(slot);
            root = Root { ptr: child.ptr(), level: root.level - 1 };
        }
        root
    }

    fn take(&mut self) -> BlockNo {
        self.taken += 1;
        assert!(self.taken <= NODES_PER_EDIT_MAX, "an edit takes more nodes than were reserved");
        let block = self.ctx.fresh.take();
        self.ctx.log.push(RefDelta::node(block, self.ctx.seq, RefChange::NodeUp));
        block
    }

    fn resident(&self, node: &NodeRef) -> Slot {
        match self.ctx.cache.resident(node) {
            Ok(slot) => slot,
            Err(missing) => panic!("edit without prepare_edit: no node at {}", missing.block),
        }
    }

    fn node(&self, slot: Slot) -> &Node {
        self.ctx.cache.node(slot)
    }

    fn log(&mut self, node: &NodePtr, change: RefChange) {
        self.ctx.log.push(RefDelta::node(node.block, node.birth, change));
    }

    /// Logs a change of data blocks, as one delta with the last one where they are consecutive.
    fn log_data(&mut self, extent: &Extent, change: RefChange) {
        log_data(self.ctx.log, extent, change);
    }

    /// The blocks that the range of this edit takes from the entries `cut` of a leaf.
    fn log_removed(&mut self, slot: Slot, cut: Range<usize>) {
        for entry in &self.ctx.cache.node(slot).leaf()[cut] {
            if let Some(extent) = clip(entry, self.start, self.end) {
                log_data(self.ctx.log, &extent, RefChange::DataDown);
            }
        }
    }

    fn log_children_up(&mut self, slot: Slot) {
        for child in children(self.ctx.cache.node(slot)) {
            match child {
                NodeChild::Node(ptr) => {
                    self.ctx.log.push(RefDelta::node(ptr.block, ptr.birth, RefChange::NodeUp));
                }
                NodeChild::Data(extent) => log_data(self.ctx.log, &extent, RefChange::DataUp),
            }
        }
    }
}

fn log_data(log: &mut Vec<RefDelta>, extent: &Extent, change: RefChange) {
    let count = to_u32(extent.len);
    if let Some(last) = log.last_mut() {
        let goes_on =
            last.change == change && last.block.get() + u64::from(last.count) == extent.block.get();
        if goes_on && let Some(sum) = last.count.checked_add(count) {
            last.count = sum;
            return;
        }
    }
    log.push(RefDelta { block: extent.block, birth: Seqno::new(0), count, change });
}

/// `ptr` with the key and the sums of `entries`.
fn pointer_to<E: Entry>(entries: &[E], ptr: &NodePtr) -> NodePtr {
    let (mapped, own) = sums(entries);
    NodePtr { lba: Lba::new(entries[0].key()), mapped, own, ..*ptr }
}
