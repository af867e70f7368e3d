//! Reading a map: the extents of a range, and which nodes an edit will need.

use super::cache::Slot;
use super::search::upper_bound;
use super::{Missing, NodeCache, Root};
use crate::format::node::{Entry, Extent, LeafEntry, Node, NodeRef};
use crate::units::{BlockNo, Lba, Seqno};

/// The children of an inner node that a range concerns.
pub(super) struct Span {
    /// The child that holds, or would hold, the first LBA of the range.
    pub(super) first: usize,
    /// The last child that begins before the end of the range; not less than `first`.
    pub(super) last: usize,
}

impl Span {
    pub(super) fn of(node: &Node, of: &NodeRef, start: u64, end: u64) -> Self {
        let inner = node.inner();
        let first = upper_bound(inner, of, start).saturating_sub(1);
        // Most ranges end in the child in which they begin.
        let last = match inner.get(first + 1) {
            Some(next) if next.key() < end => upper_bound(inner, of, end - 1).saturating_sub(1),
            _ => first,
        };
        Self { first, last: last.max(first) }
    }
}

/// The child at `at` of an inner node whose own keys end before `end`.
pub(super) fn child_ref(node: &Node, at: usize, end: Lba) -> NodeRef {
    let inner = node.inner();
    let end = inner.get(at + 1).map_or(end, |next| Lba::new(next.key()));
    NodeRef::new(&inner[at].ptr(), node.level() - 1, end)
}

/// Whether everything below `child` lies in `start..end`.
pub(super) fn covered(child: &NodeRef, start: u64, end: u64) -> bool {
    child.lba.get() >= start && child.end.get() <= end
}

/// The leaf that holds `lba` if any does, and what its pointer says of it.
fn leaf_of(cache: &NodeCache, root: &Root, lba: Lba) -> Result<(Slot, NodeRef), Missing> {
    let mut wanted = root.node_ref();
    let mut slot = cache.resident(&wanted)?;
    while wanted.level > 0 {
        let node = cache.node(slot);
        let at = upper_bound(node.inner(), &wanted, lba.get()).saturating_sub(1);
        wanted = child_ref(node, at, wanted.end);
        slot = cache.child(slot, at, &wanted)?;
    }
    Ok((slot, wanted))
}

/// The first entry of a leaf, the node `of`, that ends after `lba`.
pub(super) fn first_overlap(leaf: &[LeafEntry], of: &NodeRef, lba: u64) -> usize {
    let after = upper_bound(leaf, of, lba);
    if after > 0 && leaf[after - 1].end() > lba { after - 1 } else { after }
}

/// The part of `entry` in `start..end`, if there is one.
pub(super) fn clip(entry: &LeafEntry, start: u64, end: u64) -> Option<Extent> {
    let from = entry.key().max(start);
    let to = entry.end().min(end);
    if from >= to {
        return None;
    }
    let whole = entry.extent();
    let block = BlockNo::new(whole.block.get() + (from - entry.key()));
    Some(Extent { lba: Lba::new(from), block, len: to - from, ..whole })
}

/// Appends to `out` the extents that overlap the `len` blocks from `lba` on, clipped, in order,
/// at most `extents_max` of them. Says how many of the blocks are answered: what `out` does not
/// name among those is not mapped. At least one is answered (if `len` and `extents_max` are not
/// 0), so the caller goes on from there. The own flags are as the leaves have them.
///
/// # Errors
/// `Missing` if not even the first block can be answered without reading that node.
pub fn lookup(
    cache: &NodeCache,
    root: Option<&Root>,
    lba: Lba,
    len: u64,
    extents_max: usize,
    out: &mut Vec<Extent>,
) -> Result<u64, Missing> {
    let Some(root) = root else { return Ok(len) };
    let (start, end) = (lba.get(), lba.get().saturating_add(len));
    let mut at = start;
    let mut room = extents_max;
    while at < end {
        let (slot, of) = match leaf_of(cache, root, Lba::new(at)) {
            Ok(found) => found,
            Err(missing) if at == start => return Err(missing),
            Err(_) => break,
        };
        let leaf = cache.node(slot).leaf();
        for entry in &leaf[first_overlap(leaf, &of, at)..] {
            let Some(extent) = clip(entry, at, end) else { break };
            if room == 0 {
                return Ok(at - start);
            }
            room -= 1;
            at = extent.lba.get() + extent.len;
            out.push(extent);
        }
        at = at.max(of.end.get().min(end));
    }
    Ok(at.min(end) - start)
}

/// Looks for every node that [`super::edit`] of the same range will touch, and changes nothing.
/// After `Ok` that edit cannot miss, as long as nothing is loaded into the cache in between, and no
/// edit before it moves a node away from under a pointer of a damaged map: see [`super::Claims`],
/// for which `meet` is called with each of the nodes.
///
/// # Errors
/// `Missing`: the first node that has to be read.
pub fn prepare_edit(
    cache: &NodeCache,
    root: Option<&Root>,
    lba: Lba,
    len: u64,
    mut meet: impl FnMut(&NodeRef),
) -> Result<(), Missing> {
    let Some(root) = root else { return Ok(()) };
    let wanted = root.node_ref();
    let slot = cache.resident(&wanted)?;
    prepare_below(cache, slot, &wanted, lba.get(), lba.get() + len, &mut meet)
}

/// The first node that [`super::edit`] of a range will touch and that has to be read.
#[must_use]
pub fn missing_for_edit(
    cache: &NodeCache,
    root: Option<&Root>,
    lba: Lba,
    len: u64,
) -> Option<Missing> {
    prepare_edit(cache, root, lba, len, |_| ()).err()
}

/// As [`prepare_edit`], below the node `of`, which is in `slot`.
fn prepare_below(
    cache: &NodeCache,
    slot: Slot,
    of: &NodeRef,
    start: u64,
    end: u64,
    meet: &mut impl FnMut(&NodeRef),
) -> Result<(), Missing> {
    meet(of);
    if of.level == 0 {
        return Ok(());
    }
    let node = cache.node(slot);
    let span = Span::of(node, of, start, end);
    let first = child_ref(node, span.first, of.end);
    prepare_below(cache, cache.child(slot, span.first, &first)?, &first, start, end, meet)?;
    let last = child_ref(node, span.last, of.end);
    if span.last != span.first && !covered(&last, start, end) {
        prepare_below(cache, cache.child(slot, span.last, &last)?, &last, start, end, meet)?;
    }
    Ok(())
}

/// The nodes that stand between the cache and the leaves of `lbas`, each once, in the order of
/// their blocks: to be read together. Calling again after that finds those one level below.
pub fn missing_for(
    cache: &NodeCache,
    root: Option<&Root>,
    lbas: impl IntoIterator<Item = Lba>,
) -> Vec<Missing> {
    let Some(root) = root else { return Vec::new() };
    let missed = |lba| leaf_of(cache, root, lba).err();
    let mut missing: Vec<Missing> = lbas.into_iter().filter_map(missed).collect();
    missing.sort_unstable_by_key(|node| node.block);
    missing.dedup_by_key(|node| node.block);
    missing
}

/// Whether the volume maps every one of the `len` blocks from `lba` on and has written each since it
/// last took part in a clone or snapshot (`shared_at`; `None` if it shares nothing, so that all it
/// maps is its own).
///
/// # Errors
/// The node that must be read first.
pub fn is_own(
    cache: &NodeCache,
    root: &Root,
    shared_at: Option<Seqno>,
    lba: Lba,
    len: u64,
) -> Result<bool, Missing> {
    let (mut at, end) = (lba.get(), lba.get().saturating_add(len));
    while at < end {
        let (slot, of) = leaf_of(cache, root, Lba::new(at))?;
        let node = cache.node(slot);
        let entry = node.leaf().get(first_overlap(node.leaf(), &of, at));
        let Some(extent) = entry.and_then(|entry| clip(entry, at, end)) else { return Ok(false) };
        let own = shared_at.is_none_or(|shared_at| node.birth() > shared_at && extent.own);
        if !own || extent.lba.get() != at {
            return Ok(false);
        }
        at += extent.len;
    }
    Ok(true)
}
