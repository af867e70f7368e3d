//! Opening a pool: load the newest superblock and its catalogue, replay the journal through the
//! same `apply` as the live path, and write a checkpoint, after which the journal continues with a
//! new salt. The time is bounded by the journal, whatever the pool holds. Closing writes a last
//! checkpoint, marked clean.
//!
//! Records that a dead process had not flushed are still in the memory of the journal; recovery
//! writes them to the journal first. It overwrites a torn superblock with zeros. Beyond that it
//! changes the disk only by its checkpoint, so a crash during recovery is harmless: the next
//! recovery starts from the same durable state.
//!
//! **Fresh numbers.** Before a crash the pool may have written a part of its next checkpoint:
//! nodes, table pages, a catalogue. Nothing refers to them, but they carry the numbers that the
//! reopened pool would use next. If a write of the reopened pool were lost, the old block would
//! pass for the new one. So the generation and the sequence number continue beyond all numbers that
//! the dead process can have used.

use std::rc::Rc;

use crate::disk::{Disk, RingMemory};
use crate::error::{Error, Result};
use crate::format::superblock::Superblock;
use crate::journal::write_back;
use crate::limits::{GENERATIONS_SKIPPED, RING_MEMORY_BYTES, SEQNOS_SKIPPED};
use crate::pool::checkpoint::{Checkpointer, Kind, load};
use crate::pool::control::create::core_of;
use crate::pool::core::{OpenOptions, Pool};
use crate::pool::recovery::recover::Survey;
use crate::units::{BLOCK_BYTES, to_usize};

impl Pool {
    /// Opens a pool. `map_ring` gets a proposed length and returns the memory of the journal. The
    /// memory must belong to this pool alone. It must survive the process if unflushed writes are
    /// to survive it.
    ///
    /// # Errors
    /// `NotAPool`, `Unsupported`, `Corrupt` (with the structure and its place), the device's.
    pub async fn open(
        disk: Rc<dyn Disk>,
        map_ring: impl FnOnce(usize) -> Result<Box<dyn RingMemory>>,
        options: OpenOptions,
    ) -> Result<Self> {
        // A killed process may have left a superblock that is not durable yet. It must be durable
        // before anything overwrites the checkpoint before it.
        disk.sync().await?;
        let superblock = load::superblock(&disk).await?;
        load::forget_torn(&disk, &superblock).await?;
        let ring_bytes = superblock.geometry.journal_blocks * BLOCK_BYTES;
        let ring = map_ring(RING_MEMORY_BYTES.min(to_usize(ring_bytes)))?;
        let kept = write_back(&disk, &superblock, &*ring).await?;
        let found = load::catalogue(&disk, &superblock).await?;
        let survey = Survey::of(&disk, &superblock).await?;
        if superblock.clean && survey.last > superblock.seal {
            return Err(Error::corrupt(
                "the pool was closed cleanly, but its journal holds records",
            ));
        }
        let checkpointer = Checkpointer {
            superblock: Superblock {
                generation: superblock.generation.plus(GENERATIONS_SKIPPED),
                seal: superblock.seal.plus(SEQNOS_SKIPPED),
                ..superblock.clone()
            },
            catalogue_blocks: found.catalogue_blocks,
            drops: found.catalogue.drops.clone(),
        };
        let core = core_of(checkpointer, found.catalogue, ring, options);
        let pool = Self::attach(core, disk);
        let last = pool.replay(&superblock, survey).await?;
        pool.checkpoint_of(Kind { new_salt: true, ..Kind::default() }).await?;
        let (generation, salt) = {
            let checkpointer = pool.core.checkpointer.lock().await;
            (checkpointer.superblock.generation, checkpointer.superblock.salt)
        };
        pool.core.lock().journal.begin(superblock.uuid, generation, salt);
        let replayed = last.get() - superblock.seal.get();
        tracing::info!(replayed, kept, generation = generation.get(), "pool opened");
        Ok(pool)
    }

    /// Stops the background tasks and writes a last checkpoint, so that the next start has nothing
    /// to replay. The caller must have stopped everything that uses the pool.
    ///
    /// # Errors
    /// The device's.
    pub async fn close(&self) -> Result<()> {
        self.core.lock().closing = true;
        self.core.end_walks();
        self.core.wanted_event.notify_one();
        self.core.published_event.notify_waiters();
        // No I/O may be under way when another process takes the pool over.
        self.until_discarded().await;
        self.checkpoint_of(Kind { clean: true, ..Kind::default() }).await
    }
}
