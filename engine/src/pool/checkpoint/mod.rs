//! L4: checkpoints. A checkpoint makes the journal before it needless.
//!
//! ```text
//! 1 seal     under the lock, short: take the log of reference changes, the fresh checksums, the
//!            list of dirty nodes and the table of volumes; the journal goes on on a new block
//! 2 nodes    write the sealed nodes; nobody changes them any more
//! 3 net      add the log up block by block, page by page; what fell to 0 is freed, a node that
//!            fell to 0 is put on the list of drops
//! 4 drop     a bounded number of dropped nodes give up their children
//! 5 sums     merge the fresh checksums into their tables
//! 6 catalogue, group headers
//! 7 flush, superblock at both ends, flush
//! 8 publish  under the lock, short: the tail of the journal moves, freed blocks start their way
//!            back (`Reuse`), readers see the new tables
//! ```
//! Tables, headers and superblock go to the slots of which the last checkpoint has no need, nodes
//! and catalogue to fresh blocks: at every instant one whole checkpoint is on the disk (I6).
//! Any error poisons the pool; the last checkpoint and the journal are what is left.

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

/// What only checkpoints touch.
pub(crate) struct Checkpointer {
    /// The last durable superblock.
    pub superblock: Superblock,
    /// The blocks of its catalogue.
    pub catalogue_blocks: Vec<BlockNo>,
    /// Nodes that wait to give up their children.
    pub drops: Vec<NodeDrop>,
}

/// What kind of checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kind {
    /// The pool is closed after it.
    pub clean: bool,
    /// Records after it carry a new salt: the end of a recovery.
    pub new_salt: bool,
    /// The pool's length from now on.
    pub pool_blocks: Option<u64>,
}

impl Pool {
    /// Makes the journal so far needless; what it frees can be used again.
    ///
    /// # Errors
    /// The device's, or damage met; the pool is poisoned then.
    pub async fn checkpoint(&self) -> Result<()> {
        self.checkpoint_of(Kind::default()).await
    }

    pub(crate) async fn checkpoint_of(&self, kind: Kind) -> Result<()> {
        let mut checkpointer = self.core.checkpointer.lock().await;
        {
            let inner = self.core.lock();
            inner.check_not_poisoned()?;
            // Behind the one that closes the pool nothing is written: another process may have it.
            if !kind.clean {
                inner.check_alive()?;
            }
        }
        let mut result = write::run(self, &mut checkpointer, kind).await;
        if result.is_ok() && kind.pool_blocks.is_some() {
            // The new end has a superblock in one of its two slots until the next checkpoint.
            result = write::run(self, &mut checkpointer, Kind::default()).await;
        }
        if let Err(error) = &result {
            self.core.poison(error);
        }
        result
    }

    /// Writes checkpoints when they are wanted, until the pool is closed: spawned once.
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
