//! The internals of an open pool, only for the crate `pando-sim`: oracles of campaigns and fuzz
//! targets compare them with their models. Built with the feature `testing`.

use std::rc::Rc;
use std::sync::{Arc, Weak};

use super::core::{Core, Inner, Pool};
use crate::disk::Disk;
use crate::error::Result;
pub use crate::pool::checkpoint::load::{catalogue, superblock, superblock_at};
use crate::space::MissingTable;
use crate::state::State;

/// The state behind the lock, and figures about it. The lock is held while the closure runs that
/// gets this.
pub struct Inside<'a> {
    /// The state of the pool.
    pub state: &'a mut State,
    /// Blocks of the last catalogue.
    pub catalogue_blocks: u64,
    /// Dropped roots and nodes whose children are not released yet.
    pub drops_pending: u64,
    /// The growth reserve: blocks that growth must leave free.
    pub growth_reserve: u64,
    /// The hard reserve: blocks that every write must leave free.
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

/// Access to a pool that does not keep it open.
#[derive(Clone)]
pub struct Probe(Weak<Core>);

impl Probe {
    /// Calls `look` with the internals of the open pool.
    ///
    /// # Panics
    /// If the pool was dropped or its state is locked.
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

    /// Calls `look` with the internals, which it may change, under the lock.
    pub fn look<R>(&self, look: impl FnOnce(Inside<'_>) -> R) -> R {
        look(Inside::of(&mut self.core.lock()))
    }

    /// As [`Self::look`]; `None` while a checkpoint is being written.
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

    /// Loads the free blocks of a group.
    ///
    /// # Errors
    /// The device's.
    pub async fn probe_group(&self, group: u32) -> Result<()> {
        self.load_group(group).await
    }

    /// Loads a group header or table page.
    ///
    /// # Errors
    /// The device's.
    pub async fn probe_table(&self, missing: MissingTable) -> Result<()> {
        self.load_table(missing).await
    }
}
