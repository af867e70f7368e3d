//! The background task that discards free blocks (trim, punch hole): the device, or the file system
//! of the host below, gets back the space that the pool does not use.
//!
//! A discard is a hint, and many discards are slow. So no write, checkpoint or release of a block
//! waits for one: blocks are free before they are discarded. The task claims whole units of
//! [`OpenOptions::discard_unit`] from the free blocks, so that nothing writes to them meanwhile
//! (I4), discards them without holding a lock, and gives them back. It rests most of the time and
//! pauses while the pool is short of space. Closing the pool abandons what is not discarded yet.
//!
//! [`OpenOptions::discard_unit`]: crate::pool::OpenOptions::discard_unit

use std::time::Duration;

use futures_util::future::select;

use crate::error::{ErrorKind, Result};
use crate::limits::{DISCARD_BLOCKS_MAX, DISCARD_PAUSE_MIN, DISCARD_REST};
use crate::pool::core::{Inner, Pool, count};
use crate::runtime::executor::end_of_turn;
use crate::space::{Claim, Run};
use crate::units::BLOCK_BYTES;

impl Pool {
    /// Discards blocks that become free, if the pool was opened with `discard`, until the pool is
    /// closed or poisoned. Spawn it once, on a thread that serves no requests, because a discard of
    /// a block device blocks its thread. After an error or found damage it discards nothing more.
    pub async fn run_discards(&self) {
        if !self.core.options.discard {
            return;
        }
        loop {
            // Registered before the look, so that blocks freed after it end the wait.
            let published = self.core.published_event.notified();
            let released = self.core.reader_event.notified();
            let claim = {
                let mut inner = self.core.lock();
                if inner.check_alive().is_err() {
                    return;
                }
                inner.claim_discard()
            };
            let done = match claim {
                Claim::Run(run) => self.discard_run(run).await,
                Claim::Load(group) => match self.load_group(group).await {
                    Err(error) if error.kind() == ErrorKind::Busy => {
                        self.disk().sleep(DISCARD_PAUSE_MIN).await;
                        Ok(())
                    }
                    loaded => loaded,
                },
                Claim::Again => {
                    end_of_turn().await;
                    Ok(())
                }
                Claim::Nothing => {
                    select(Box::pin(published), Box::pin(released)).await;
                    Ok(())
                }
            };
            if let Err(error) = done {
                tracing::warn!(%error, "free blocks are not discarded until the pool is opened again");
                return;
            }
        }
    }

    /// Discards a claimed run, gives it back and rests.
    async fn discard_run(&self, run: Run) -> Result<()> {
        let start = self.disk().now();
        let discarded = self.disk().discard(run.block, run.len).await;
        let took = self.disk().now().saturating_sub(start);
        let given_back = {
            let mut inner = self.core.lock();
            let claimed = inner.state.reuse.end_discard();
            assert_eq!(claimed, Some(run), "this task alone discards");
            inner.state.space.unclaim(run)
        };
        self.core.poison_on(&given_back);
        self.core.reader_event.notify_waiters();
        discarded?;
        count(&self.core.counters.discarded_bytes, run.len * BLOCK_BYTES);
        self.disk().sleep(rest_after(took)).await;
        Ok(())
    }

    /// Waits until no discard is under way. The pool is being closed, so no other one starts.
    pub(in crate::pool) async fn until_discarded(&self) {
        loop {
            let released = self.core.reader_event.notified();
            if self.core.lock().state.reuse.discarding().is_none() {
                return;
            }
            released.await;
        }
    }
}

/// The rest after a discard that took `took`.
fn rest_after(took: Duration) -> Duration {
    (took * DISCARD_REST).max(DISCARD_PAUSE_MIN)
}

impl Inner {
    /// Claims the next free blocks to discard. They cannot be allocated during the discard, so
    /// growth must have room without them.
    fn claim_discard(&mut self) -> Claim {
        let kept = self.growth_reserve() + self.state.promises_max;
        let spare = self.state.space.free().saturating_sub(kept);
        let claim = self.state.space.claim((spare / 2).min(DISCARD_BLOCKS_MAX));
        if let Claim::Run(run) = claim {
            self.state.reuse.begin_discard(run);
        }
        claim
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_most_a_tenth_of_the_time_is_spent_on_discards() {
        assert_eq!(rest_after(Duration::from_micros(3)), DISCARD_PAUSE_MIN);
        assert_eq!(rest_after(Duration::from_millis(200)), Duration::from_millis(1800));
    }
}
