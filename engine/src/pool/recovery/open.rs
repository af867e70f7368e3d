//! Opening a pool: newest superblock, catalogue, replay of the journal through the same `apply`
//! as the live path, and a checkpoint, after which the log goes on with a new salt. The time is
//! bounded by the journal, whatever the pool holds. Closing: a last checkpoint, marked clean.
//!
//! Records that a dead process had not flushed are in the memory of the journal, and are written to
//! the journal first; a torn superblock is overwritten with zeros. Beyond that, recovery changes nothing on the disk but by that checkpoint, so
//! it can be cut and begun again; and what it begins with is durable, so that it is the same then.
//!
//! **Fresh numbers.** A life of the pool that has died may have written a part of its next
//! checkpoint: nodes, table pages, a catalogue. None of that is referred to, but it bears the numbers
//! that this life would use next, and would pass for this life's work if a write of that were lost.
//! So the generation and the sequence number go on behind all that the dead life can have used.

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
    /// Opens a pool. `map_ring` gets the memory of the journal, for which a length is proposed. It
    /// is this pool's alone, and survives the process if unflushed writes are to survive it.
    ///
    /// # Errors
    /// `NotAPool`, `Unsupported`, `Corrupt` (naming the structure and its place), the device's.
    pub async fn open(
        disk: Rc<dyn Disk>,
        map_ring: impl FnOnce(usize) -> Result<Box<dyn RingMemory>>,
        options: OpenOptions,
    ) -> Result<Self> {
        // A killed process may have left a superblock that is not durable yet. What replaces the
        // checkpoint before it must not be on its way before this one is safe.
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

    /// Stops the background tasks and writes a last checkpoint, after which there is nothing to
    /// replay. The caller has stopped everything that uses the pool.
    ///
    /// # Errors
    /// The device's.
    pub async fn close(&self) -> Result<()> {
        self.core.lock().closing = true;
        self.core.end_walks();
        self.core.wanted_event.notify_one();
        self.core.published_event.notify_waiters();
        // Nothing may be under way when the pool is another's.
        self.until_discarded().await;
        self.checkpoint_of(Kind { clean: true, ..Kind::default() }).await
    }
}
