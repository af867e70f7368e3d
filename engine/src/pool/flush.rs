//! Group commit: one leader pads the journal and syncs the pool; the others wait for their
//! sequence number. A flush covers everything acknowledged before it, on any handle.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::core::{Core, Pool, count};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::UNSYNCED_BLOCKS_WANTED;
use crate::units::Seqno;

/// Ends a sync that was given up halfway (its future was dropped): somebody else may lead.
struct Leading(Arc<Core>);

impl Drop for Leading {
    fn drop(&mut self) {
        self.0.lock().syncing = false;
        self.0.durable_event.notify_waiters();
    }
}

impl Pool {
    /// Everything that was acknowledged before the call is durable when this returns.
    ///
    /// # Errors
    /// The device's, after which the pool is poisoned.
    pub async fn flush(&self) -> Result<()> {
        count(&self.core.counters.flushes, 1);
        let target = self.core.lock().state.seqno;
        self.commit(target).await
    }

    /// One bare sync of the device: the barrier that durable operations are measured against.
    ///
    /// # Errors
    /// The device's.
    #[cfg(any(test, feature = "testing"))]
    pub async fn disk_sync_for_bench(&self) -> Result<()> {
        self.disk().sync().await
    }

    /// Makes all records up to `seqno` durable.
    pub(crate) async fn commit(&self, seqno: Seqno) -> Result<()> {
        loop {
            let changed = self.core.durable_event.notified();
            let target = {
                let mut inner = self.core.lock();
                if let Some(reason) = &inner.poisoned {
                    return Err(Error::new(ErrorKind::Poisoned, reason.clone()));
                }
                if inner.durable >= seqno {
                    return Ok(());
                }
                if inner.syncing {
                    None
                } else {
                    inner.syncing = true;
                    inner.journal.pad();
                    Some(inner.state.seqno)
                }
            };
            match target {
                Some(target) => self.lead(target).await?,
                None => changed.await,
            }
        }
    }

    /// A sync that nobody asked for, when too much was written without one. Recovery has to read
    /// all of that to see what of it is there.
    pub(super) async fn sync_if_overdue(&self) {
        if self.core.unsynced_blocks.load(Ordering::Relaxed) < UNSYNCED_BLOCKS_WANTED {
            return;
        }
        let seqno = self.core.lock().state.seqno;
        // An error has poisoned the pool, which the next request will say.
        let _ignored = self.commit(seqno).await;
    }

    /// Makes everything so far durable, whether it was before or not: the barrier of a checkpoint.
    /// One sync at a time in the whole pool, because the device tells an error to one caller: a
    /// second sync under way would be called good though what it was to cover is lost.
    pub(crate) async fn barrier(&self) -> Result<()> {
        let target = loop {
            let changed = self.core.durable_event.notified();
            {
                let mut inner = self.core.lock();
                inner.check_not_poisoned()?;
                if !inner.syncing {
                    inner.syncing = true;
                    inner.journal.pad();
                    break inner.state.seqno;
                }
            }
            changed.await;
        };
        self.lead(target).await
    }

    async fn lead(&self, target: Seqno) -> Result<()> {
        let leading = Leading(Arc::clone(&self.core));
        count(&self.core.counters.syncs, 1);
        self.core.unsynced_blocks.store(0, Ordering::Relaxed);
        match self.disk().sync().await {
            Ok(()) => {
                let mut inner = self.core.lock();
                inner.durable = inner.durable.max(target);
                drop(inner);
                drop(leading);
                Ok(())
            }
            Err(error) => {
                self.core.poison(&error);
                Err(error)
            }
        }
    }
}
