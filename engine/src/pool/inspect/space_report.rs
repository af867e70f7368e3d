//! The exact space of one volume, from a walk of the part of its map that no other volume shares.
//!
//! ```text
//!      root, count 1        exclusive: continue below
//!       /        \
//!   count 1    count 2      shared, like everything below it, whatever the counts there are:
//!    /    \      |          a block below a shared node is referenced once, by that node
//!   1 1 2 1    1 1 1
//! ```

use crate::error::{Error, ErrorKind, Result};
use crate::format::geometry::Table;
use crate::format::group::COUNT_MASK;
use crate::format::node::NodeRef;
use crate::map::{NodeChild, children};
use crate::pool::core::Pool;
use crate::pool::inspect::durable::{Durable, PARALLEL};
use crate::pool::types::SpaceReport;
use crate::units::{BLOCK_BYTES, BlockNo, VolumeId, to_u64};

impl Pool {
    /// Exact space of a volume. Writes a checkpoint first and delays further ones during the walk:
    /// writers are not blocked until the journal is full. A deleted map whose blocks are not freed
    /// yet counts like another volume.
    ///
    /// # Errors
    /// `NotFound`, damage that was found, or the pool's.
    pub async fn space(&self, id: VolumeId) -> Result<SpaceReport> {
        let not_found = || Error::new(ErrorKind::NotFound, format!("no {id}"));
        self.core.lock().state.volume(id).ok_or_else(not_found)?;
        self.checkpoint().await?;
        let checkpointer = self.core.checkpointer.lock().await;
        let durable = Durable::load(self.disk(), checkpointer.superblock.clone()).await?;
        let volume = durable.found.catalogue.volumes.iter().find(|volume| volume.id == id);
        let root = volume.ok_or_else(not_found)?.root;
        let mut walk = Walk { durable: &durable, stack: Vec::new(), data: 0, nodes: 0 };
        if let Some(root) = &root {
            walk.push(root.node_ref()).await?;
        }
        while !walk.stack.is_empty() {
            self.core.check_walking()?;
            walk.step().await?;
        }
        let mapped = root.map_or(0, |root| root.mapped());
        Ok(SpaceReport {
            mapped_bytes: mapped * BLOCK_BYTES,
            exclusive_bytes: walk.data * BLOCK_BYTES,
            shared_bytes: mapped.saturating_sub(walk.data) * BLOCK_BYTES,
            freed_if_deleted_bytes: (walk.data + walk.nodes) * BLOCK_BYTES,
        })
    }
}

struct Walk<'a> {
    durable: &'a Durable,
    /// Exclusive nodes still to be read: at most a few batches of children per level.
    stack: Vec<NodeRef>,
    data: u64,
    nodes: u64,
}

impl Walk<'_> {
    /// Reads a batch of nodes and counts what they refer to.
    async fn step(&mut self) -> Result<()> {
        let some = self.stack.split_off(self.stack.len().saturating_sub(PARALLEL));
        self.nodes += to_u64(some.len());
        let read = self.durable.read_all(some.iter().map(|node| node.block)).await;
        for (wanted, buf) in some.iter().zip(read) {
            let buf = buf?;
            let node = self.durable.verify(buf.as_bytes(), wanted)?;
            for child in node.child_refs(wanted.end) {
                self.push(child).await?;
            }
            for child in children(node) {
                if let NodeChild::Data(extent) = child {
                    self.data += self.count_single(extent.block, extent.len).await?;
                }
            }
        }
        Ok(())
    }

    /// Pushes a node on the stack, unless it is shared.
    async fn push(&mut self, node: NodeRef) -> Result<()> {
        if self.count_single(node.block, 1).await? == 1 {
            self.stack.push(node);
        }
        Ok(())
    }

    /// Number of the `len` blocks that have exactly one reference.
    async fn count_single(&self, block: BlockNo, len: u64) -> Result<u64> {
        if !self.durable.superblock.geometry.holds_run(block, len) {
            return Err(Error::corrupt(format!("{len} blocks at {block} are out of bounds")));
        }
        let entries = self.durable.entries(Table::Refs, block, len).await?;
        Ok(to_u64(entries.iter().filter(|&&entry| entry & COUNT_MASK == 1).count()))
    }
}
