//! What the daemon keeps an eye on: how full the pool is, whether it still takes changes, and
//! whether its shards still turn (the watchdog of systemd).

use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::{error, info, warn};

use crate::daemon::engine::Engine;
use crate::pool::PoolStatus;

/// Marks of the used part of the pool, in percent.
const WATERMARKS: [u64; 3] = [80, 90, 95];
/// The mark from which on a line of the log is an error.
const WATERMARK_ERROR: u64 = 95;
/// How often the pool is looked at.
const PERIOD: Duration = Duration::from_secs(5);

/// The highest watermark that the used part of the pool has passed; 0 if none. What is on its way
/// back counts as free.
pub(super) fn mark(status: &PoolStatus) -> u64 {
    let free = status.free_bytes.saturating_add(status.pending_bytes);
    let used = status.usable_bytes.saturating_sub(free);
    // Multiplied, not divided: 79.9 % are not 80 %.
    let passed = |mark: &u64| {
        u128::from(used) * 100 >= u128::from(*mark) * u128::from(status.usable_bytes)
            && status.usable_bytes > 0
    };
    WATERMARKS.into_iter().filter(passed).max().unwrap_or(0)
}

/// Watches until the task is dropped.
pub(super) async fn run(engine: Arc<Engine>) {
    let mut last_mark = 0;
    let mut poisoned = false;
    loop {
        if let Ok(status) = engine.control(|pool| async move { Ok(pool.status()) }).await {
            let mark = mark(&status);
            tell(last_mark, mark, &status);
            last_mark = mark;
            report_refusals(&engine).await;
            if let (false, Some(reason)) = (poisoned, &status.poisoned) {
                poisoned = true;
                error!(reason, "the pool takes no change any more; restart to recover it");
                notify(&[NotifyState::Status("the pool is poisoned: restart to recover it")]);
            }
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// Names the volumes whose writes were refused since the last look.
async fn report_refusals(engine: &Engine) {
    let refusals = engine.control(|pool| async move { Ok(pool.take_refusals()) }).await;
    for (volume, writes) in refusals.unwrap_or_default() {
        warn!(volume, writes, "writes were refused for lack of space (ENOSPC)");
    }
}

fn tell(last: u64, mark: u64, status: &PoolStatus) {
    let free_bytes = status.free_bytes;
    if mark < last {
        info!(watermark_percent = mark, free_bytes, "the pool has more room again");
    } else if mark > last && mark >= WATERMARK_ERROR {
        error!(watermark_percent = mark, free_bytes, "the pool is nearly full");
    } else if mark > last {
        warn!(watermark_percent = mark, free_bytes, "the pool fills up");
    }
}

/// Feeds the watchdog, if there is one, as long as every shard takes its turn.
pub(super) async fn watchdog(engine: Arc<Engine>) {
    let Some(timeout) = sd_notify::watchdog_enabled() else { return };
    loop {
        for shard in engine.shards() {
            if shard.call(|| async {}).await.is_err() {
                return;
            }
        }
        notify(&[NotifyState::Watchdog]);
        tokio::time::sleep(timeout / 3).await;
    }
}

/// Tells systemd, if it started us.
pub(super) fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "systemd is not told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(usable_bytes: u64, free_bytes: u64, pending_bytes: u64) -> PoolStatus {
        PoolStatus {
            uuid: [0; 16],
            size_bytes: usable_bytes,
            usable_bytes,
            free_bytes,
            pending_bytes,
            reserve_bytes: 0,
            provisioned_bytes: 0,
            reserved_bytes: 0,
            volumes: 0,
            snapshots: 0,
            generation: 0,
            seqno: 0,
            journal_used_bytes: 0,
            journal_bytes: 0,
            deletions_pending: 0,
            poisoned: None,
        }
    }

    #[test]
    fn watermarks() {
        assert_eq!(mark(&status(1000, 1000, 0)), 0);
        assert_eq!(mark(&status(1000, 201, 0)), 0);
        assert_eq!(mark(&status(1000, 200, 0)), 80);
        assert_eq!(mark(&status(1000, 100, 0)), 90);
        assert_eq!(mark(&status(1000, 0, 0)), 95);
        assert_eq!(mark(&status(1000, 0, 150)), 80, "what comes back counts as free");
        assert_eq!(mark(&status(0, 0, 0)), 0);
        assert_eq!(mark(&status(u64::MAX, 0, 0)), 95, "no overflow");
    }
}
