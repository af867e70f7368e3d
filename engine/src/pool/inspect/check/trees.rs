//! The walk of all maps. It reads each node once, verifies it in stages so that it can classify the
//! damage, and counts every reference.
//!
//! An unreadable node hides its subtree. The walk then continues elsewhere and is marked as
//! incomplete: stored counts that are higher than those found prove no damage any more.

use crate::error::Error;
use crate::format::catalogue::{NodeDrop, VolumeEntry};
use crate::format::group::BlockType;
use crate::format::node::{Entry, Extent, InnerEntry, LBA_END, LeafEntry, Node, NodeRef, sums};
use crate::runtime::executor::end_of_turn;
use crate::units::{BlockNo, Lba, Seqno, blocks_for};

use super::count::{Added, Recount, UNKNOWN, Visited};
use super::findings::{FindingKind as Kind, Findings};
use crate::pool::inspect::durable::{Durable, PARALLEL};

/// Blocks counted before other tasks get a turn.
const BUSY_MAX: u64 = 1 << 14;

/// Called with the number of blocks counted; an error ends the walk.
type Progress<'a> = dyn Fn(u64) -> Result<(), Error> + 'a;

/// A pointer to follow.
#[derive(Clone, Copy)]
struct Step {
    node: NodeRef,
    own: u64,
    /// Whether the node comes from the list of drops: only its block and birth are known.
    orphan: bool,
}

/// The owner of the map being walked.
#[derive(Clone, Copy)]
struct Owner<'a> {
    name: &'a str,
    lbas: u64,
    /// Own blocks are not counted below a drop, so this is the maximum then.
    shared_at: Seqno,
}

impl std::fmt::Display for Owner<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.name.is_empty() {
            f.write_str("deletion under way")
        } else {
            write!(f, "volume {}", self.name)
        }
    }
}

/// A walk of all maps of a checkpoint.
pub(super) struct Walk<'a> {
    durable: &'a Durable,
    pub(super) counts: Recount,
    pub(super) findings: &'a mut Findings,
    /// Whether to report damaged structures: only the first of several walks does.
    report: bool,
    pub(super) complete: bool,
    visited: Visited,
    pub(super) data_blocks: u64,
    stack: Vec<Step>,
    /// Blocks counted since other tasks had their turn.
    busy: u64,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        durable: &'a Durable,
        counts: Recount,
        findings: &'a mut Findings,
        report: bool,
    ) -> Self {
        let (visited, stack) = (Visited::default(), Vec::new());
        Self {
            durable,
            counts,
            findings,
            report,
            complete: true,
            visited,
            data_blocks: 0,
            stack,
            busy: 0,
        }
    }

    pub(super) fn nodes(&self) -> u64 {
        self.visited.len()
    }

    /// Counts everything that the catalogue refers to. Calls `progress` for each batch of nodes;
    /// its error ends the walk.
    pub(super) async fn all(&mut self, progress: &Progress<'_>) -> Result<(), Error> {
        for block in &self.durable.found.catalogue_blocks {
            self.count(*block, BlockType::Catalogue, "catalogue");
        }
        // Small volumes first: then an extent beyond the end of one is found even if a larger clone
        // shares it.
        let mut volumes: Vec<&VolumeEntry> = self.durable.found.catalogue.volumes.iter().collect();
        volumes.sort_by_key(|volume| volume.size_bytes);
        for volume in volumes {
            let lbas = blocks_for(volume.size_bytes);
            let owner = Owner { name: &volume.name, lbas, shared_at: volume.shared_at };
            if let Some(root) = &volume.root {
                self.follow(root.node_ref(), root.ptr.own, &owner);
                self.drain(&owner, progress).await?;
            }
        }
        for drop in &self.durable.found.catalogue.drops {
            let owner = Owner { name: "", lbas: LBA_END, shared_at: Seqno::new(u64::MAX) };
            self.follow_drop(drop, &owner);
            self.drain(&owner, progress).await?;
        }
        Ok(())
    }

    fn follow_drop(&mut self, drop: &NodeDrop, owner: &Owner<'_>) {
        let (lba, end) = (Lba::new(0), Lba::new(LBA_END));
        let NodeDrop { block, birth } = *drop;
        let node = NodeRef { block, birth, level: 0, lba, end, mapped: 0 };
        if !self.count(block, BlockType::Node, owner) {
            return;
        }
        // If a volume still refers to the node, its pointer verifies it. Of this pointer only the
        // birth is known.
        if self.visited.meet(block, UNKNOWN).is_none() {
            self.stack.push(Step { node, own: 0, orphan: true });
        }
    }

    /// Counts a reference to a node and pushes the node on the stack if it was not visited yet.
    fn follow(&mut self, node: NodeRef, own: u64, owner: &Owner<'_>) {
        if !self.count(node.block, BlockType::Node, owner) {
            return;
        }
        match self.visited.meet(node.block, fingerprint(&node)) {
            None => self.stack.push(Step { node, own, orphan: false }),
            Some(true) => {}
            Some(false) => {
                let what = "two pointers to it do not agree";
                self.found(Kind::Birth, owner, node.block, what);
            }
        }
    }

    /// Counts a reference to a block. Returns false if the block is out of bounds.
    fn count(&mut self, block: BlockNo, kind: BlockType, owner: impl std::fmt::Display) -> bool {
        if self.durable.superblock.geometry.locate(block).is_none() {
            self.found(Kind::Bounds, owner, block, "no block for nodes or data");
            self.complete = false;
            return false;
        }
        match self.counts.add(block, kind) {
            Added::First if kind == BlockType::Data => self.data_blocks += 1,
            Added::First | Added::Again | Added::Elsewhere => {}
            Added::Otherwise(known) => {
                // Only the pass of this window finds it.
                let what = format!("{owner}: {block}: used as {kind:?} and as {known:?}");
                self.findings.add(Kind::Type, what);
                return false;
            }
        }
        true
    }

    async fn drain(&mut self, owner: &Owner<'_>, progress: &Progress<'_>) -> Result<(), Error> {
        while !self.stack.is_empty() {
            let some = self.stack.split_off(self.stack.len().saturating_sub(PARALLEL));
            let read = self.durable.read_all(some.iter().map(|step| step.node.block)).await;
            for (step, buf) in some.iter().zip(read) {
                match buf {
                    Ok(buf) => {
                        for extent in self.look_at(step, buf.as_bytes(), owner) {
                            self.count_extent(&extent, step.node.block, owner).await;
                        }
                    }
                    Err(error) => {
                        self.found(Kind::Node, owner, step.node.block, error);
                        self.complete = false;
                    }
                }
            }
            progress(self.nodes() + self.data_blocks)?;
        }
        Ok(())
    }

    /// Verifies a node and follows its pointers; returns its extents.
    fn look_at(&mut self, step: &Step, bytes: &[u8], owner: &Owner<'_>) -> Vec<Extent> {
        let Some((node, wanted)) = self.header(step, bytes, owner) else {
            self.complete = false;
            return Vec::new();
        };
        let (mapped, own) = if wanted.level == 0 { sums(node.leaf()) } else { sums(node.inner()) };
        let block = wanted.block;
        let as_found = NodeRef { mapped, ..wanted };
        if let Err(error) = self.verify(bytes, &as_found, step.orphan) {
            self.found_error(Kind::Shape, owner, error);
        }
        if !step.orphan {
            if mapped != wanted.mapped {
                let what = format!("maps {mapped} blocks, its pointer says {}", wanted.mapped);
                self.found(Kind::Sum, owner, block, what);
            }
            if wanted.birth > owner.shared_at && own != step.own {
                let what = format!("{own} blocks are its own, its pointer says {}", step.own);
                self.found(Kind::Sum, owner, block, what);
            }
        }
        for (child, entry) in node.child_refs(wanted.end).zip(node_pointers(node)) {
            self.follow(child, entry.own(), owner);
        }
        node_extents(node).collect()
    }

    /// The first stages: the block holds a node, the expected one, of the expected kind. After that
    /// its entries can be read one by one, whatever they contain.
    fn header<'n>(
        &mut self,
        step: &Step,
        bytes: &'n [u8],
        owner: &Owner<'_>,
    ) -> Option<(&'n Node, NodeRef)> {
        let mut wanted = step.node;
        let superblock = &self.durable.superblock;
        let kind = |usual| if step.orphan { Kind::Drop } else { usual };
        let node = match Node::identify(bytes, wanted.block, &superblock.uuid) {
            Ok(node) => node,
            Err(error) => {
                self.found_error(kind(Kind::Node), owner, error);
                return None;
            }
        };
        let birth = node.birth();
        if birth > superblock.seal {
            let what = format!("born at {birth}, behind the last record {}", superblock.seal);
            self.found(kind(Kind::Node), owner, wanted.block, what);
            return None;
        }
        if birth != wanted.birth {
            let what = format!("born at {birth}, its pointer says {}", wanted.birth);
            self.found(kind(Kind::Birth), owner, wanted.block, what);
            return None;
        }
        if step.orphan {
            wanted.level = node.level();
        }
        let max = if wanted.level == 0 { LeafEntry::MAX } else { InnerEntry::MAX };
        if node.level() != wanted.level || !(1..=max).contains(&node.count()) {
            let (level, count) = (node.level(), node.count());
            let what = format!("level {level} with {count} entries, its pointer says {wanted:?}");
            self.found(kind(Kind::Shape), owner, wanted.block, what);
            return None;
        }
        Some((node, wanted))
    }

    fn verify(&self, bytes: &[u8], wanted: &NodeRef, orphan: bool) -> Result<(), Error> {
        let uuid = &self.durable.superblock.uuid;
        if orphan {
            Node::verify_orphan(bytes, wanted.block, wanted.birth, uuid).map(|_| ())
        } else {
            self.durable.verify(bytes, wanted).map(|_| ())
        }
    }

    async fn count_extent(&mut self, extent: &Extent, node: BlockNo, owner: &Owner<'_>) {
        let Extent { lba, block, len, .. } = *extent;
        if lba.get() + len > owner.lbas {
            let what = format!("{len} blocks at {lba} are beyond its {} blocks", owner.lbas);
            self.found(Kind::Bounds, owner, node, what);
        }
        if !self.durable.superblock.geometry.holds_run(block, len) {
            let what = format!("{len} blocks at {lba} on {block} are not in one group");
            self.found(Kind::Bounds, owner, node, what);
            self.complete = false;
            return;
        }
        for offset in 0..len {
            self.count(block.plus(offset), BlockType::Data, owner);
        }
        self.busy += len;
        if self.busy >= BUSY_MAX {
            self.busy = 0;
            end_of_turn().await;
        }
    }

    fn found(
        &mut self,
        kind: Kind,
        owner: impl std::fmt::Display,
        block: BlockNo,
        what: impl std::fmt::Display,
    ) {
        if self.report {
            self.findings.add(kind, format_args!("{owner}: map node at {block}: {what}"));
        }
    }

    /// As [`Self::found`], for an error that names the node itself.
    fn found_error(&mut self, kind: Kind, owner: &Owner<'_>, error: Error) {
        if self.report {
            self.findings.add(kind, error.context(owner));
        }
    }
}

fn node_pointers(node: &Node) -> &[InnerEntry] {
    if node.level() == 0 { &[] } else { node.inner() }
}

fn node_extents(node: &Node) -> impl Iterator<Item = Extent> {
    let leaf = if node.level() == 0 { node.leaf() } else { &[] };
    leaf.iter().map(LeafEntry::extent)
}

/// Hash of the facts in which all pointers to a node must agree; not 0.
fn fingerprint(node: &NodeRef) -> u32 {
    let words = [node.birth.get(), node.lba.get(), node.mapped, u64::from(node.level)];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    crate::crc::crc32(&bytes) | 1
}
