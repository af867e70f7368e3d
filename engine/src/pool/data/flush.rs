//! Group commit: one leader pads the journal, writes the part of it that is only in memory, and
//! syncs the pool; the others wait for their sequence number. A flush covers everything
//! acknowledged before it, on any handle.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::journal::Position;
use crate::limits::UNSYNCED_BLOCKS_WANTED;
use crate::pool::core::{Core, Pool, count};
use crate::runtime::executor::spawn_local;
use crate::runtime::sync::atomic::Ordering;
use crate::units::{Seqno, to_u64};

/// Ends a sync, also one whose future was dropped halfway, so that another leader can start.
struct Leading(Arc<Core>);

impl Drop for Leading {
    fn drop(&mut self) {
        self.0.lock().syncing = false;
        self.0.durable_event.notify_waiters();
    }
}

impl Pool {
    /// Makes everything durable that was acknowledged before the call.
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
                    Some((inner.state.seqno, inner.journal.pad()))
                }
            };
            match target {
                Some((target, end)) => self.lead(target, end).await?,
                None => changed.await,
            }
        }
    }

    /// Syncs when too much was written since the last sync: recovery must read all data that is not
    /// known to be durable to find out which of it reached the disk.
    pub(in crate::pool) async fn sync_if_overdue(&self) {
        if self.core.unsynced_blocks.load(Ordering::Relaxed) < UNSYNCED_BLOCKS_WANTED {
            return;
        }
        let seqno = self.core.lock().state.seqno;
        // An error has poisoned the pool; the next request returns it.
        let _ignored = self.commit(seqno).await;
    }

    /// Makes everything so far durable and always issues a sync: the barrier of a checkpoint. Only
    /// one sync runs at a time in the whole pool, because the device reports an error to one caller
    /// only: a second, concurrent sync would succeed although the writes that it covers are lost.
    pub(crate) async fn barrier(&self) -> Result<()> {
        let (target, end) = loop {
            let changed = self.core.durable_event.notified();
            {
                let mut inner = self.core.lock();
                inner.check_not_poisoned()?;
                if !inner.syncing {
                    inner.syncing = true;
                    break (inner.state.seqno, inner.journal.pad());
                }
            }
            changed.await;
        };
        self.lead(target, end).await
    }

    /// Flushes in a task of its own, which a dropped caller does not cancel. If a block write were
    /// abandoned halfway, the next leader would write the block a second time while the first write
    /// is still under way (I6).
    async fn lead(&self, target: Seqno, end: Position) -> Result<()> {
        let leading = Leading(Arc::clone(&self.core));
        let (done, answer) = tokio::sync::oneshot::channel();
        let pool = self.clone();
        spawn_local(async move {
            let result = pool.write_and_sync(end).await;
            match &result {
                Ok(()) => {
                    let mut inner = pool.core.lock();
                    inner.durable = inner.durable.max(target);
                    inner.journal.set_synced(end);
                }
                Err(error) => pool.core.poison(error),
            }
            drop(leading);
            // If the receiver is gone, nothing waits for the answer.
            drop(done.send(result));
        });
        answer.await.map_err(|_| Error::new(ErrorKind::Shutdown, "the flush was given up"))?
    }

    /// Writes the journal up to `end`, then syncs. The sync starts after every write has completed,
    /// so that it covers them.
    async fn write_and_sync(&self, end: Position) -> Result<()> {
        count(&self.core.counters.syncs, 1);
        self.core.unsynced_blocks.store(0, Ordering::Relaxed);
        let (start, mut from) = {
            let inner = self.core.lock();
            (inner.state.geometry.journal_start(), inner.journal.synced())
        };
        while from < end {
            let (block, buf) = self.core.lock().journal.piece(from, end);
            from += to_u64(buf.len_bytes());
            self.disk().write(start.plus(block), vec![buf]).await?;
        }
        self.disk().sync().await
    }
}
