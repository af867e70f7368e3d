//! The inside of an open pool, for the crate `pando-sim` and for nothing else: what the oracles of
//! campaigns and fuzz targets compare with their models. Built with the feature `testing`.

use std::rc::Rc;
use std::sync::{Arc, Weak};

use super::core::{Core, Inner, Pool};
use crate::disk::Disk;
use crate::error::Result;
pub use crate::pool::checkpoint::load::{catalogue, superblock, superblock_at};
use crate::space::MissingTable;
use crate::state::State;

/// The state behind the lock, and figures beside it. Holds the lock as long as the closure runs that
/// it is handed to.
pub struct Inside<'a> {
    /// The state of the pool.
    pub state: &'a mut State,
    /// Blocks that the catalogue takes.
    pub catalogue_blocks: u64,
    /// Roots and nodes that wait to give up their children.
    pub drops_pending: u64,
    /// Free blocks that growth must leave, in blocks.
    pub growth_reserve: u64,
    /// Free blocks that every write must leave, in blocks.
    pub hard_reserve: u64,
    /// Bytes appended to the journal since the pool was opened.
    pub journal_appended: u64,
    /// Bytes of the journal.
    pub journal_ring: u64,
}

impl<'a> Inside<'a> {
    fn of(inner: &'a mut Inner) -> Self {
        Self {
            catalogue_blocks: inner.catalogue_blocks,
            drops_pending: inner.drops_pending,
            growth_reserve: inner.growth_reserve(),
            hard_reserve: inner.hard_reserve(),
            journal_appended: inner.journal.appended_bytes(),
            journal_ring: inner.journal.ring_bytes(),
            state: &mut inner.state,
        }
    }
}

/// Looks at a pool without keeping it open.
#[derive(Clone)]
pub struct Probe(Weak<Core>);

impl Probe {
    /// Looks at a pool that is open.
    ///
    /// # Panics
    /// When the pool was dropped, or its state is locked.
    pub fn look_unlocked<R>(&self, look: impl FnOnce(Inside<'_>) -> R) -> R {
        let core = self.0.upgrade().expect("an open pool");
        let mut inner = core.try_lock().expect("the state is not locked here");
        look(Inside::of(&mut inner))
    }
}

impl Pool {
    /// A probe of this pool.
    #[must_use]
    pub fn probe(&self) -> Probe {
        Probe(Arc::downgrade(&self.core))
    }

    /// Looks at the inside under the lock, or changes it.
    pub fn look<R>(&self, look: impl FnOnce(Inside<'_>) -> R) -> R {
        look(Inside::of(&mut self.core.lock()))
    }

    /// As [`Self::look`], if no checkpoint is being written.
    pub fn look_between_checkpoints<R>(&self, look: impl FnOnce(Inside<'_>) -> R) -> Option<R> {
        let _no_checkpoint = self.core.checkpointer.try_lock().ok()?;
        Some(self.look(look))
    }

    /// How often the lock of the state was taken since the pool was opened.
    #[must_use]
    pub fn locks_taken(&self) -> u64 {
        self.core.counters.locks.get()
    }

    /// The disk of this thread.
    #[must_use]
    pub fn probe_disk(&self) -> Rc<dyn Disk> {
        Rc::clone(self.disk())
    }

    /// Brings the free blocks of a group into memory.
    ///
    /// # Errors
    /// The device's.
    pub async fn probe_group(&self, group: u32) -> Result<()> {
        self.load_group(group).await
    }

    /// Brings a header or table page into memory.
    ///
    /// # Errors
    /// The device's.
    pub async fn probe_table(&self, missing: MissingTable) -> Result<()> {
        self.load_table(missing).await
    }
}
