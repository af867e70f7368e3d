//! Group commit: one leader pads the journal, writes what of it is only in memory, and syncs the
//! pool; the others wait for their sequence number. A flush covers everything acknowledged before
//! it, on any handle.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::journal::Position;
use crate::limits::UNSYNCED_BLOCKS_WANTED;
use crate::pool::core::{Core, Pool, count};
use crate::runtime::executor::spawn_local;
use crate::runtime::sync::atomic::Ordering;
use crate::units::{Seqno, to_u64};

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
                    Some((inner.state.seqno, inner.journal.pad()))
                }
            };
            match target {
                Some((target, end)) => self.lead(target, end).await?,
                None => changed.await,
            }
        }
    }

    /// A sync that nobody asked for, when too much was written without one. Recovery has to read
    /// all of that to see what of it is there.
    pub(in crate::pool) async fn sync_if_overdue(&self) {
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

    /// Flushes in a task of its own: were the write of a block given up halfway, the next leader
    /// would write it a second time while the first is still under way (I6).
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
            // Nobody may wait for the answer any more.
            drop(done.send(result));
        });
        answer.await.map_err(|_| Error::new(ErrorKind::Shutdown, "the flush was given up"))?
    }

    /// The sync begins when every write has completed, so that it covers them.
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
