//! L4: checkpoints. A checkpoint makes the pool's state durable; the journal before it is no longer
//! needed.
//!
//! ```text
//! 1 seal     under the lock, short: take the log of reference changes, the fresh checksums, the
//!            list of dirty nodes and the table of volumes; the journal continues in a new block
//! 2 nodes    write back the sealed nodes; nothing changes them any more
//! 3 net      add the log up block by block, page by page; a block whose count drops to 0 is
//!            freed, but a node is put on the list of drops first
//! 4 drop     release the children of a bounded number of dropped nodes
//! 5 sums     merge the fresh checksums into their tables
//! 6 catalogue, group headers
//! 7 flush, superblock at both ends, flush
//! 8 publish  under the lock, short: the tail of the journal moves, freed blocks become allocatable
//!            when no reader pins them (`Reuse`), readers see the new tables
//! ```
//! Tables, headers and superblock are written to the slots that the last checkpoint does not use,
//! nodes and catalogue to fresh blocks. So one whole checkpoint is on the disk at every instant
//! (I6). Any error poisons the pool; the last checkpoint and the journal remain valid.

mod changes;
mod drops;
pub(crate) mod load;
mod net;
mod tables;
mod write;

use crate::error::Result;
use crate::format::catalogue::NodeDrop;
use crate::format::superblock::Superblock;
use crate::pool::Pool;
use crate::units::BlockNo;

/// What only checkpoints access.
pub(crate) struct Checkpointer {
    /// The last durable superblock.
    pub superblock: Superblock,
    /// The blocks of its catalogue.
    pub catalogue_blocks: Vec<BlockNo>,
    /// Dropped nodes whose children are not released yet.
    pub drops: Vec<NodeDrop>,
}

/// Variant of a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kind {
    /// The pool is closed after this checkpoint.
    pub clean: bool,
    /// Records after this checkpoint carry a new salt: the end of a recovery.
    pub new_salt: bool,
    /// The length of the pool from this checkpoint on, if it changes.
    pub pool_blocks: Option<u64>,
}

impl Pool {
    /// Writes a checkpoint: the journal before it is no longer needed, and the blocks that it frees
    /// become allocatable.
    ///
    /// # Errors
    /// The device's, or damage that was found; the pool is poisoned then.
    pub async fn checkpoint(&self) -> Result<()> {
        self.checkpoint_of(Kind::default()).await
    }

    pub(crate) async fn checkpoint_of(&self, kind: Kind) -> Result<()> {
        let mut checkpointer = self.core.checkpointer.lock().await;
        {
            let inner = self.core.lock();
            inner.check_not_poisoned()?;
            // Nothing is written after the closing checkpoint: another process may use the pool.
            if !kind.clean {
                inner.check_alive()?;
            }
        }
        let mut result = write::run(self, &mut checkpointer, kind).await;
        if result.is_ok() && kind.pool_blocks.is_some() {
            // Until a second checkpoint, only one of the two slots at the new end has a superblock.
            result = write::run(self, &mut checkpointer, Kind::default()).await;
        }
        if let Err(error) = &result {
            self.core.poison(error);
        }
        result
    }

    /// Writes checkpoints on request until the pool is closed. Spawn it once.
    pub async fn run_background(&self) {
        loop {
            self.core.wanted_event.notified().await;
            if self.core.lock().check_alive().is_err() {
                return;
            }
            if self.checkpoint().await.is_err() {
                return;
            }
            if self.core.lock().drops_pending > 0 {
                self.core.want_checkpoint();
            }
        }
    }
}
