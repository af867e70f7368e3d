//! L2: the map of a volume: a copy-on-write B+tree of extents in 4 KiB nodes. No I/O, no clock, no
//! locks; the same calls give the same tree.
//!
//! ```text
//! volume A: root --+                 A and B share everything below the old root. The first
//!                  v                 change of A copies the nodes on its way (*) and gives one
//!               [ inner* ]           reference more to each of their children: lazy sharing.
//!               /   |    \
//!        [leaf*] [leaf] [leaf]       [ inner ] <-- root of volume B
//!                   ^      ^          /  |  \
//!                   +------+---------+---+   [leaf]
//! ```
//!
//! Who owns a node is a comparison. With `birth > shared_at` (the last clone or snapshot that the
//! volume took part in) a node is reachable from this volume alone, and so is every node above
//! it. What an edit does with a node that it must change:
//!
//! | birth                      | the node is  | references                                      |
//! |----------------------------|--------------|-------------------------------------------------|
//! | `> shared_at` and `> seal` | changed      | none                                            |
//! | `> shared_at`, `<= seal`   | moved        | new node +1; old -1, no cascade: children stay  |
//! | `<= shared_at`             | copied       | new node +1, each of its children +1; old -1    |
//!
//! Reference counts are not known here: an edit only appends to a log of deltas. The checkpoint
//! nets them and hands -1 to the children ([`children`]) of every node that falls to 0 by a
//! [`RefChange::NodeDown`]; the order within the log says nothing.
//!
//! Invariants: a pointer's `lba` and `mapped` are exact, and so is `own` while it counts; no node
//! is empty; all leaves are at level 0; an inner root has at least two children unless it is older
//! than the last edit. Sparse nodes are not merged.

mod cache;
mod claims;
mod diff;
mod edit;
mod index;
mod lookup;
mod search;

use crate::units::{BlockNo, Seqno, to_u64};

pub use crate::format::node::{Extent, Node, NodeChild, NodePtr, Root, children};
pub use cache::NodeCache;
pub use claims::Claims;
pub use diff::{DiffRun, diff};
pub use edit::edit;
pub use lookup::{is_own, lookup, missing_for, missing_for_edit, prepare_edit};

use crate::format::node::{INNER_ENTRIES_MAX, LEAF_ENTRIES_MAX};
use crate::limits::MAP_LEVELS_MAX;

/// A node that is not in the cache. The caller reads its block, gives the bytes to
/// [`NodeCache::insert_loaded`] and calls again.
pub type Missing = crate::format::node::NodeRef;

/// Nodes that one edit takes at most: on each level the node on the left edge of the range, its
/// other half if it splits, and the node on the right edge; and one new root.
pub const NODES_PER_EDIT_MAX: usize = 3 * MAP_LEVELS_MAX + 1;

/// Entries in a full node. Less than the format allows makes deep trees of few extents, for tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fanout {
    /// Extents in a leaf, 4 to 252.
    pub leaf_max: usize,
    /// Pointers in an inner node, 4 to 100.
    pub inner_max: usize,
}

impl Fanout {
    /// As much as a node holds.
    pub const FULL: Self = Self { leaf_max: LEAF_ENTRIES_MAX, inner_max: INNER_ENTRIES_MAX };

    /// Nodes of a map of so many LBAs that was never discarded from, at most: then nodes are half
    /// full but the last of each level, and an entry has an LBA of its own.
    #[must_use]
    pub const fn nodes_max(self, lbas: u64) -> u64 {
        let mut level = lbas / to_u64(self.leaf_max.div_ceil(2)) + 1;
        let mut nodes = level;
        while level > 1 {
            level = level.div_ceil(to_u64(self.inner_max.div_ceil(2)));
            nodes += level;
        }
        nodes
    }

    fn assert_valid(self) {
        assert!((4..=LEAF_ENTRIES_MAX).contains(&self.leaf_max), "leaf_max {}", self.leaf_max);
        assert!((4..=INNER_ENTRIES_MAX).contains(&self.inner_max), "inner_max {}", self.inner_max);
    }
}

/// Where an edit takes blocks for new nodes from.
pub trait FreshNodes {
    /// A free block. Cannot fail: the caller of [`edit`] has [`NODES_PER_EDIT_MAX`] at hand.
    fn take(&mut self) -> BlockNo;
}

/// How the reference count of blocks changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefChange {
    /// One reference more to data.
    DataUp,
    /// One reference less to data.
    DataDown,
    /// One reference more to a node.
    NodeUp,
    /// One reference less to a node; at 0 its children lose a reference each.
    NodeDown,
    /// The last reference to a node goes and its children keep theirs: another node took them
    /// over, or they were accounted for one by one.
    NodeMoved,
    /// A block of the new catalogue.
    CatalogueUp,
    /// A block of the old catalogue.
    CatalogueDown,
}

/// A change of the reference counts of `count` consecutive blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefDelta {
    /// First block.
    pub block: BlockNo,
    /// Birth of a node; 0 for anything else.
    pub birth: Seqno,
    /// Blocks; 1 for nodes.
    pub count: u32,
    /// What happens to each of them.
    pub change: RefChange,
}

const _: () = assert!(size_of::<RefDelta>() == 24);

impl RefDelta {
    /// A change for a node.
    #[must_use]
    pub const fn node(block: BlockNo, birth: Seqno, change: RefChange) -> Self {
        Self { block, birth, count: 1, change }
    }

    /// One reference less to the blocks of an extent.
    #[must_use]
    pub fn data_down(extent: &Extent) -> Self {
        let count = crate::units::to_u32(extent.len);
        Self { block: extent.block, birth: Seqno::new(0), count, change: RefChange::DataDown }
    }
}

/// What an edit works with and on.
pub struct EditContext<'a> {
    /// The nodes.
    pub cache: &'a mut NodeCache,
    /// Blocks for new nodes.
    pub fresh: &'a mut dyn FreshNodes,
    /// The changes of reference counts are appended here.
    pub log: &'a mut Vec<RefDelta>,
    /// Sequence number of the record that is applied: the birth of new nodes.
    pub seq: Seqno,
    /// Sequence number up to which the last sealed checkpoint covers everything.
    pub seal: Seqno,
    /// Sequence number of the last clone or snapshot that the volume took part in.
    pub shared_at: Seqno,
}

#[cfg(test)]
mod tests;
