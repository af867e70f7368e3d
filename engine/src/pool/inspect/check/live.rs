//! Checks that need an open pool: whether a block that is in use or waits now is allocatable, and
//! whether the sums in memory are right.

use super::findings::{FindingKind as Kind, Findings};
use crate::pool::core::Pool;
use crate::runtime::executor::end_of_turn;
use crate::units::BlockNo;

/// Reference changes checked per turn.
const CHUNK: usize = 4096;

/// The caller must hold the checkpointer's lock.
pub(super) async fn all(pool: &Pool, findings: &mut Findings) {
    in_use(pool, findings).await;
    let inner = pool.core.lock();
    for run in inner.state.reuse.waiting() {
        // K18. Runs are added and removed as a whole, so checking their ends is enough.
        let ends = [run.block, run.block.plus(run.len - 1)];
        if ends.iter().any(|end| inner.state.space.is_free(*end)) {
            let what = format!("{} ({} blocks) waits and may be allocated", run.block, run.len);
            findings.add(Kind::Waiting, what);
        }
    }
    for what in inner.state.wrong_sums() {
        findings.add(Kind::Sum, what); // K14
    }
}

/// K7: checks blocks written since the last checkpoint, and blocks set aside for nodes. (Blocks
/// that the last checkpoint needs are checked with the tables.) A block that was written and
/// released since must not be free either, until a checkpoint frees it.
async fn in_use(pool: &Pool, findings: &mut Findings) {
    let mut done = 0;
    loop {
        {
            let inner = pool.core.lock();
            let state = &inner.state;
            let mut judge = |block: BlockNo, what: &str| {
                if state.space.is_free(block) {
                    let what = format!("{block} is {what} and may be allocated");
                    findings.add(Kind::Allocatable, what);
                }
            };
            if done == 0 {
                state.node_blocks.iter().for_each(|block| judge(*block, "set aside for a node"));
            }
            let some = state.log.get(done..).unwrap_or_default();
            let some = &some[..some.len().min(CHUNK)];
            if some.is_empty() {
                return;
            }
            for delta in some {
                let blocks = (0..u64::from(delta.count)).map(|offset| delta.block.plus(offset));
                blocks.for_each(|block| judge(block, "in use since the last checkpoint"));
            }
            done += some.len();
        }
        end_of_turn().await;
    }
}
