//! A small world around the map: volumes that share nodes, a disk, reference counts and a
//! checkpoint as the engine does it, all checked against plain models.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    EditContext, Extent, Fanout, FreshNodes, Missing, NODES_PER_EDIT_MAX, Node, NodeCache,
    NodeChild, RefChange, RefDelta, Root, children, edit, is_own, lookup, missing_for,
    prepare_edit,
};
use crate::format::node::NodeRef;
use crate::units::{BLOCK_SIZE, BlockNo, Lba, Seqno, to_u64, to_usize};

mod diffs;
mod edits;
mod model;

pub(super) const POOL: [u8; 16] = *b"test-pool-uuid--";

/// splitmix64: the whole test is a function of its seed.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Blocks that are free: those that a finished checkpoint gave back, else new ones.
#[derive(Default)]
pub(super) struct Space {
    next: u64,
    freed: Vec<u64>,
    taken: usize,
}

impl Space {
    pub(super) fn run(&mut self, len: u64) -> BlockNo {
        if len == 1
            && let Some(block) = self.freed.pop()
        {
            return BlockNo::new(block);
        }
        self.next += len;
        BlockNo::new(self.next - len)
    }
}

impl FreshNodes for Space {
    fn take(&mut self) -> BlockNo {
        self.taken += 1;
        self.run(1)
    }
}

#[derive(Clone, Default)]
pub(super) struct Volume {
    pub(super) root: Option<Root>,
    pub(super) shared_at: u64,
    /// What a lookup has to find.
    pub(super) model: BTreeMap<u64, u64>,
    /// The LBAs written since `shared_at`.
    pub(super) own: BTreeSet<u64>,
}

/// A sealed checkpoint that is not finished.
struct Sealed {
    to_write: Vec<BlockNo>,
    freed: Vec<u64>,
}

pub(super) struct World {
    pub(super) cache: NodeCache,
    pub(super) space: Space,
    pub(super) log: Vec<RefDelta>,
    pub(super) seq: u64,
    pub(super) volumes: Vec<Volume>,
    pub(super) loads: u64,
    seal: u64,
    sealed: Option<Sealed>,
    disk: BTreeMap<u64, Vec<u8>>,
    counts: BTreeMap<u64, u64>,
}

impl World {
    pub(super) fn new(fanout: Fanout, capacity: usize) -> Self {
        Self {
            cache: NodeCache::new(capacity, POOL, fanout),
            space: Space { next: 1000, ..Space::default() },
            log: Vec::new(),
            seq: 1,
            volumes: vec![Volume::default()],
            loads: 0,
            seal: 0,
            sealed: None,
            disk: BTreeMap::new(),
            counts: BTreeMap::new(),
        }
    }

    pub(super) fn load(&mut self, missing: &Missing) {
        self.loads += 1;
        let bytes = self.disk.get(&missing.block.get());
        let bytes = bytes.unwrap_or_else(|| panic!("{missing:?} was never written"));
        self.cache.insert_loaded(missing, bytes).unwrap();
    }

    pub(super) fn prepare(&mut self, at: usize, lba: u64, len: u64) {
        for _ in 0..1000 {
            let root = self.volumes[at].root;
            match prepare_edit(&self.cache, root.as_ref(), Lba::new(lba), len, |_| ()) {
                Ok(()) => return,
                Err(missing) => self.load(&missing),
            }
        }
        panic!("prepare_edit makes no progress");
    }

    /// Maps (`Some`) or unmaps a range of a volume, in the map and in the model.
    pub(super) fn edit(&mut self, at: usize, lba: u64, len: u64, target: Option<BlockNo>) {
        self.prepare(at, lba, len);
        self.seq += 1;
        self.space.taken = 0;
        let loaded = self.cache.len();
        let volume = &mut self.volumes[at];
        let mut ctx = EditContext {
            cache: &mut self.cache,
            fresh: &mut self.space,
            log: &mut self.log,
            seq: Seqno::new(self.seq),
            seal: Seqno::new(self.seal),
            shared_at: Seqno::new(volume.shared_at),
        };
        edit(&mut ctx, &mut volume.root, Lba::new(lba), len, target);
        self.cache.trim();
        assert!(self.space.taken <= NODES_PER_EDIT_MAX);
        assert!(self.cache.len() <= loaded + self.space.taken);
        volume.model.retain(|&at, _| at < lba || at >= lba + len);
        volume.own.retain(|&at| at < lba || at >= lba + len);
        if let Some(target) = target {
            volume.model.extend((0..len).map(|i| (lba + i, target.get() + i)));
            volume.own.extend(lba..lba + len);
        }
    }

    pub(super) fn map(&mut self, at: usize, lba: u64, len: u64) {
        let target = self.space.run(len);
        self.edit(at, lba, len, Some(target));
    }

    pub(super) fn unmap(&mut self, at: usize, lba: u64, len: u64) {
        self.edit(at, lba, len, None);
    }

    pub(super) fn clone_volume(&mut self, at: usize) {
        self.seq += 1;
        let volume = &mut self.volumes[at];
        volume.shared_at = self.seq;
        volume.own.clear();
        if let Some(root) = &volume.root {
            self.log.push(delta(root.ptr.block, RefChange::NodeUp));
        }
        let clone = volume.clone();
        self.volumes.push(clone);
    }

    pub(super) fn delete(&mut self, at: usize) {
        self.seq += 1;
        let volume = self.volumes.swap_remove(at);
        if let Some(root) = volume.root {
            self.log.push(delta(root.ptr.block, RefChange::NodeDown));
        }
    }

    /// Nets the log, decides what fell to 0, hands that on to the children.
    pub(super) fn seal(&mut self) {
        assert!(self.sealed.is_none());
        self.seal = self.seq;
        let mut freed = Vec::new();
        let mut no_cascade = BTreeSet::new();
        let mut log = std::mem::take(&mut self.log);
        let mut nodes_freed = BTreeSet::new();
        while !log.is_empty() {
            let mut net: BTreeMap<u64, (i64, bool)> = BTreeMap::new();
            for RefDelta { block, count, change, .. } in log.drain(..) {
                let (by, node) = match change {
                    RefChange::DataUp | RefChange::CatalogueUp => (1, false),
                    RefChange::DataDown | RefChange::CatalogueDown => (-1, false),
                    RefChange::NodeUp => (1, true),
                    RefChange::NodeDown => (-1, true),
                    RefChange::NodeMoved => {
                        assert!(no_cascade.insert(block.get()), "{block} moved twice");
                        (-1, true)
                    }
                };
                for i in 0..u64::from(count) {
                    let entry = net.entry(block.get() + i).or_insert((0, node));
                    assert_eq!(entry.1, node, "block {} of two kinds", block.get() + i);
                    entry.0 += by;
                }
            }
            for (block, (by, node)) in net {
                let before = i64::try_from(self.counts.get(&block).copied().unwrap_or(0)).unwrap();
                let count = u64::try_from(before + by).expect("a count below 0");
                let moved = no_cascade.contains(&block);
                assert!(!moved || count == 0, "block {block} moved, but has {count} references");
                if count > 0 {
                    self.counts.insert(block, count);
                    continue;
                }
                self.counts.remove(&block);
                freed.push(block);
                if node {
                    nodes_freed.insert(block);
                }
                if node && !moved {
                    self.cascade(block, &mut log);
                }
            }
        }
        let mut to_write = self.cache.dirty_blocks_sealed(Seqno::new(self.seal));
        to_write.retain(|block| !nodes_freed.contains(&block.get()));
        self.sealed = Some(Sealed { to_write, freed });
    }

    fn cascade(&self, block: u64, log: &mut Vec<RefDelta>) {
        let bytes = match self.cache.get_bytes(BlockNo::new(block)) {
            Some(bytes) => bytes.to_vec(),
            None => self.disk[&block].clone(),
        };
        let node = <Node as zerocopy::FromBytes>::ref_from_bytes(&bytes).unwrap();
        for child in children(node) {
            log.push(match child {
                NodeChild::Node(ptr) => delta(ptr.block, RefChange::NodeDown),
                NodeChild::Data(Extent { block, len, .. }) => {
                    let count = u32::try_from(len).unwrap();
                    RefDelta { block, birth: Seqno::new(0), count, change: RefChange::DataDown }
                }
            });
        }
    }

    /// Writes what was sealed; from here on the freed blocks may be used again.
    pub(super) fn finish(&mut self) {
        let Some(sealed) = self.sealed.take() else { return };
        for block in sealed.to_write {
            let mut bytes = vec![0; BLOCK_SIZE];
            assert!(self.cache.copy_out(block, &mut bytes), "{block} is pinned while dirty");
            self.disk.insert(block.get(), bytes);
            self.cache.mark_clean(block);
        }
        for block in sealed.freed {
            self.cache.forget(BlockNo::new(block));
            self.disk.remove(&block);
            self.space.freed.push(block);
        }
    }

    pub(super) fn checkpoint(&mut self) {
        self.finish();
        self.seal();
        self.finish();
        assert_eq!(self.cache.dirty_len(), 0);
    }

    /// Every lookup of the volume, in pieces of at most `extents_max`.
    pub(super) fn read_all(&mut self, at: usize, end: u64, extents_max: usize) {
        let mut found = BTreeMap::new();
        let mut lba = 0;
        while lba < end {
            let mut out = Vec::new();
            let root = self.volumes[at].root;
            let asked =
                lookup(&self.cache, root.as_ref(), Lba::new(lba), end - lba, extents_max, &mut out);
            match asked {
                Ok(answered) => {
                    assert!(answered > 0 && out.len() <= extents_max);
                    lba += answered;
                }
                Err(missing) => {
                    assert!(out.is_empty());
                    self.load(&missing);
                }
            }
            for extent in out {
                for i in 0..extent.len {
                    assert!(extent.lba.get() + i < lba, "an extent beyond the answer");
                    found.insert(extent.lba.get() + i, extent.block.get() + i);
                }
            }
        }
        assert_eq!(found, self.volumes[at].model);
    }

    /// What counts as the volume's own is what the model says.
    pub(super) fn check_own(&mut self, at: usize, lba: u64, len: u64) {
        let Volume { root, shared_at, own, .. } = self.volumes[at].clone();
        let Some(root) = root else { return };
        loop {
            let lbas = (lba..lba + len).map(Lba::new);
            let missing = missing_for(&self.cache, Some(&root), lbas);
            if missing.is_empty() {
                break;
            }
            missing.iter().for_each(|node| self.load(node));
        }
        let (lba_from, shared_at) = (Lba::new(lba), Some(Seqno::new(shared_at)));
        let all = is_own(&self.cache, &root, shared_at, lba_from, len).expect("all nodes are here");
        assert_eq!(all, (lba..lba + len).all(|lba| own.contains(&lba)), "{len} from {lba} on");
    }

    /// Right after a seal: stored counts are the pointers from all live roots, sums are exact.
    pub(super) fn check(&mut self) {
        let mut counted = BTreeMap::new();
        for at in 0..self.volumes.len() {
            let volume = self.volumes[at].clone();
            let Some(root) = &volume.root else {
                assert!(volume.model.is_empty());
                continue;
            };
            assert_eq!(root.mapped(), to_u64(volume.model.len()));
            assert_eq!(root.own(Seqno::new(volume.shared_at)), to_u64(volume.own.len()));
            let mut own = BTreeSet::new();
            self.check_node(&volume, &root.node_ref(), true, &mut own, &mut counted);
            assert_eq!(own, volume.own);
        }
        assert_eq!(counted, self.counts);
    }

    fn check_node(
        &mut self,
        volume: &Volume,
        node_ref: &NodeRef,
        owned: bool,
        own: &mut BTreeSet<u64>,
        counted: &mut BTreeMap<u64, u64>,
    ) {
        let owned_here = node_ref.birth.get() > volume.shared_at;
        assert!(owned || !owned_here, "an owned node below a shared one");
        let count = counted.entry(node_ref.block.get()).or_insert(0);
        *count += 1;
        let counted_already = *count > 1;
        assert!(!owned_here || self.counts[&node_ref.block.get()] == 1, "owned, but shared");
        if counted_already {
            return;
        }
        while let Err(missing) = self.cache.resident(node_ref) {
            self.load(&missing);
        }
        let mut bytes = vec![0; BLOCK_SIZE];
        assert!(self.cache.copy_out(node_ref.block, &mut bytes));
        let node = Node::verify(&bytes, node_ref, &POOL).unwrap();
        for extent in children(node) {
            let NodeChild::Data(extent) = extent else { continue };
            for i in 0..extent.len {
                *counted.entry(extent.block.get() + i).or_insert(0) += 1;
                if owned_here && extent.own {
                    own.insert(extent.lba.get() + i);
                }
            }
        }
        for child in node.child_refs(node_ref.end).collect::<Vec<_>>() {
            self.check_node(volume, &child, owned_here, own, counted);
        }
    }

    /// Drops all that is in memory: what is on the disk must do.
    pub(super) fn check_reopened(&mut self) {
        self.cache = NodeCache::new(40, POOL, self.cache.fanout());
        self.check();
    }

    pub(super) fn leaf_fill(&mut self, at: usize) -> Vec<usize> {
        let Some(root) = self.volumes[at].root else { return Vec::new() };
        let mut fill = Vec::new();
        let mut todo = vec![root.node_ref()];
        while let Some(node_ref) = todo.pop() {
            while let Err(missing) = self.cache.resident(&node_ref) {
                self.load(&missing);
            }
            let node = self.cache.get(node_ref.block).unwrap();
            if node.level() == 0 {
                fill.push(node.count());
            }
            let mut below: Vec<NodeRef> = node.child_refs(node_ref.end).collect();
            below.reverse();
            todo.extend(below);
        }
        fill
    }
}

pub(super) fn delta(block: BlockNo, change: RefChange) -> RefDelta {
    RefDelta::node(block, Seqno::new(0), change)
}
