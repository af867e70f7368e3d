//! A map of many extents by itself, without disk or journal.

use pando_engine::map::{
    EditContext, Extent, Fanout, FreshNodes, NodeCache, RefDelta, Root, edit, lookup, prepare_edit,
};
use pando_engine::units::{BlockNo, Lba, Seqno};

struct Counter(u64);

impl FreshNodes for Counter {
    fn take(&mut self) -> BlockNo {
        self.0 += 1;
        BlockNo::new(self.0)
    }
}

/// A map of one volume, all of its nodes in memory.
pub struct Map {
    cache: NodeCache,
    root: Option<Root>,
    nodes: Counter,
    log: Vec<RefDelta>,
    seq: u64,
    next_block: u64,
}

impl Map {
    /// `extents` extents of one block each, on every other LBA, so that none can be joined.
    #[must_use]
    pub fn fragmented(extents: u64) -> Self {
        let nodes = usize::try_from(extents / 100).unwrap_or(0) + 100_000;
        let mut map = Self {
            cache: NodeCache::new(nodes, [1; 16], Fanout::FULL),
            root: None,
            nodes: Counter(1 << 32),
            log: Vec::new(),
            seq: 1,
            next_block: 1,
        };
        for index in 0..extents {
            map.write(Lba::new(index * 2));
        }
        map
    }

    /// Maps one block, as `apply` does it.
    pub fn write(&mut self, lba: Lba) {
        self.seq += 1;
        self.next_block += 2;
        prepare_edit(&self.cache, self.root.as_ref(), lba, 1, |_| ())
            .expect("all nodes are in memory");
        let mut context = EditContext {
            cache: &mut self.cache,
            fresh: &mut self.nodes,
            log: &mut self.log,
            seq: Seqno::new(self.seq),
            seal: Seqno::new(0),
            shared_at: Seqno::new(0),
        };
        edit(&mut context, &mut self.root, lba, 1, Some(BlockNo::new(self.next_block)));
        if self.log.len() > 1 << 20 {
            self.log.clear();
        }
    }

    /// Looks one block up.
    pub fn look_up(&self, lba: Lba, out: &mut Vec<Extent>) -> u64 {
        out.clear();
        lookup(&self.cache, self.root.as_ref(), lba, 1, 1, out).expect("all nodes are in memory")
    }
}
