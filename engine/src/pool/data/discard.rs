//! The background task that discards free blocks (trim, punch hole), so that a device or a host's
//! file system below gets back what the pool does not use.
//!
//! A discard is a hint, and it is slow where many are made: none is on the way of a write, a
//! checkpoint or a freed block. Blocks are free before they are discarded. The task takes whole units
//! of [`OpenOptions::discard_unit`] out of the free blocks, so that nobody writes them meanwhile (I4),
//! discards them while no lock is held, and gives them back. It rests most of the time, leaves a pool
//! that is short of space alone, and what it has not come to when the pool is closed is given up.
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
    /// Discards what becomes free, if the pool was opened so, until it is closed or poisoned:
    /// spawned once, on a thread that serves nobody, because a discard of a block device holds its
    /// thread up. After an error, or damage met, nothing is discarded any more.
    pub async fn run_discards(&self) {
        if !self.core.options.discard {
            return;
        }
        loop {
            // From before the look: what is freed after it ends the wait.
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

    /// Discards a run that was claimed, gives it back and rests.
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

    /// Waits until no discard is under way. The pool is being closed, so there will be no other.
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

/// How long the task does nothing after a discard that took so long.
fn rest_after(took: Duration) -> Duration {
    (took * DISCARD_REST).max(DISCARD_PAUSE_MIN)
}

impl Inner {
    /// Takes the next blocks to discard out of the free ones. They cannot be allocated for the time
    /// of a discard, so growth must have room without them.
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
