//! Calls that answer with a stream: check, scrub, dump, extents, differences.
//!
//! Each runs as a task of its own that fills a short channel; when the client goes away the
//! channel closes and the task ends at its next step.

use std::future::Future;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use pando_proto::v1::{
    CheckFinding, CheckSummary, PoolCheckResponse, PoolDumpResponse, PoolScrubResponse, Progress,
    ScrubError, ScrubSummary, pool_check_response, pool_scrub_response,
};
use tokio::sync::mpsc::{self, Sender};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::daemon::engine::Engine;
use crate::daemon::rpc::Answers;
use crate::error::{Error, ErrorKind, Result};
use crate::pool::{ChangedRun, CheckReport, DumpForm, ScrubStep};
use crate::units::{BLOCK_BYTES, VolumeId, to_u64};

/// Messages between a task and its client.
const MESSAGES_AHEAD: usize = 8;
/// Runs in one message.
const RUNS_MAX: usize = 4096;
/// Rate of a scrub if the client names none.
const SCRUB_RATE_BYTES: u64 = 64 << 20;
/// Blocks of one step of a scrub, at most: 4 MiB.
const SCRUB_STEP_BLOCKS: u64 = 1024;
/// Steps of a slow scrub in a second, so that it ends soon when it is to.
const SCRUB_STEPS: u64 = 4;
/// Bytes of text of a dump.
const DUMP_BYTES_MAX: usize = 256 << 20;
/// Bytes of text in one message of a dump.
const DUMP_PIECE_BYTES: usize = 256 << 10;

/// Where a task's messages go.
pub(super) type Out<T> = Sender<std::result::Result<T, Status>>;

/// Sends a message; false if the client is gone.
pub(super) async fn send<T>(out: &Out<T>, message: T) -> bool {
    out.send(Ok(message)).await.is_ok()
}

/// Runs `task` with the sending end of a stream. Its error becomes the end of the stream.
pub(super) fn answers<T, F, Fut>(task: F) -> Answers<T>
where
    F: FnOnce(Out<T>) -> Fut,
    Fut: Future<Output = Result<()>> + Send + 'static,
    T: Send + 'static,
{
    let (out, answers) = mpsc::channel(MESSAGES_AHEAD);
    let work = task(out.clone());
    tokio::spawn(async move {
        if let Err(error) = work.await {
            // If the client is gone, nobody wants to know.
            out.send(Err(error.into())).await.unwrap_or_default();
        }
    });
    ReceiverStream::new(answers)
}

/// Checks the pool from its last checkpoint.
pub(super) fn check(engine: Arc<Engine>) -> Answers<PoolCheckResponse> {
    use pool_check_response::Event;
    let message = |event| PoolCheckResponse { event: Some(event) };
    answers(move |out| async move {
        let progress = out.clone();
        let report = engine.control(move |pool| async move {
            let show = move |done, total| {
                // Progress that the client is too slow for is not worth waiting for.
                let event = Event::Progress(Progress { done, total });
                progress.try_send(Ok(message(event))).unwrap_or_default();
            };
            pool.check(&show).await
        });
        let CheckReport { generation, findings, more, nodes, data_blocks } = report.await?;
        let count = to_u64(findings.len()) + more;
        for finding in findings {
            let finding =
                CheckFinding { code: finding.code, kind: finding.kind, what: finding.what };
            if !send(&out, message(Event::Finding(finding))).await {
                return Ok(());
            }
        }
        let summary = CheckSummary { generation, findings: count, nodes, data_blocks };
        send(&out, message(Event::Summary(summary))).await;
        Ok(())
    })
}

/// Verifies all data at `rate_bytes` a second.
pub(super) fn scrub(engine: Arc<Engine>, rate_bytes: u64) -> Answers<PoolScrubResponse> {
    use pool_scrub_response::Event;
    let message = |event| PoolScrubResponse { event: Some(event) };
    let rate = if rate_bytes == 0 { SCRUB_RATE_BYTES } else { rate_bytes };
    let step_blocks = (rate / BLOCK_BYTES / SCRUB_STEPS).clamp(1, SCRUB_STEP_BLOCKS);
    answers(move |out| async move {
        // The scrub goes by the tables of the last checkpoint: make them name all data there is.
        let begin = engine.control(|pool| async move {
            pool.checkpoint().await?;
            Ok(pool.status())
        });
        let status = begin.await?;
        let used = status.usable_bytes.saturating_sub(status.free_bytes + status.pending_bytes);
        let mut total = used / BLOCK_BYTES;
        let (mut next, mut blocks, mut errors) = (Some(0), 0, 0);
        let mut due = Instant::now();
        while let Some(from) = next {
            let step =
                engine.control(move |pool| async move { pool.scrub(from, step_blocks).await });
            let ScrubStep { next_block, blocks: read, errors: found } = step.await?;
            blocks += read;
            for error in found {
                errors += 1;
                let error = ScrubError { block: error.block, what: error.what };
                send(&out, message(Event::Error(error))).await;
            }
            // Blocks come into use and are freed meanwhile.
            total = if next_block.is_some() { total.max(blocks) } else { blocks };
            let progress = Progress { done: blocks, total };
            if !send(&out, message(Event::Progress(progress))).await {
                return Ok(());
            }
            next = next_block;
            // Time that was lost is not made up for: the rate is a bound.
            due = due.max(Instant::now() - STEP_SLACK) + time_for(read * BLOCK_BYTES, rate);
            tokio::time::sleep_until(due).await;
        }
        send(&out, message(Event::Summary(ScrubSummary { blocks, errors }))).await;
        Ok(())
    })
}

/// How far a paced loop may be behind before it stops catching up.
const STEP_SLACK: Duration = Duration::from_millis(100);

/// The time that `bytes` take at `rate` bytes a second.
fn time_for(bytes: u64, rate: u64) -> Duration {
    Duration::from_micros(bytes.saturating_mul(1_000_000) / rate.max(1))
}

/// The structures of the pool.
pub(super) fn dump(engine: Arc<Engine>, form: DumpForm) -> Answers<PoolDumpResponse> {
    answers(move |out| async move {
        let text = engine.control(move |pool| async move {
            let mut text = Bounded(Vec::new());
            pool.dump(form, &mut text).await?;
            Ok(text.0)
        });
        let text = String::from_utf8(text.await?)
            .map_err(|_| Error::new(ErrorKind::Corrupt, "dump of the pool is not text"))?;
        let mut piece = String::new();
        for line in text.split_inclusive('\n') {
            piece.push_str(line);
            if piece.len() >= DUMP_PIECE_BYTES
                && !send(&out, PoolDumpResponse { text: std::mem::take(&mut piece) }).await
            {
                return Ok(());
            }
        }
        send(&out, PoolDumpResponse { text: piece }).await;
        Ok(())
    })
}

/// Text that is kept in memory, because a shard cannot wait for a client in the middle of a dump.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > DUMP_BYTES_MAX {
            return Err(io::Error::other(
                "the dump is too long for the daemon; stop it and use `pando pool dump --offline`",
            ));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The runs in which `new` differs from `old`, or which it maps if there is no `old`.
pub(super) fn changed<T: Send + 'static>(
    engine: Arc<Engine>,
    old: Option<VolumeId>,
    new: VolumeId,
    message: impl Fn(&[ChangedRun]) -> T + Send + 'static,
) -> Answers<T> {
    answers(move |out| async move {
        let mut next = Some(0);
        while let Some(offset) = next {
            let step = engine
                .control(move |pool| async move { pool.changed(old, new, offset, RUNS_MAX).await });
            let (runs, after) = step.await?;
            if !runs.is_empty() && !send(&out, message(&runs)).await {
                return Ok(());
            }
            next = after;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_kept() {
        assert_eq!(time_for(64 << 20, 64 << 20), Duration::from_secs(1));
        assert_eq!(time_for(4 << 20, 64 << 20), Duration::from_micros(62_500));
        assert_eq!(time_for(0, 1), Duration::ZERO);
        assert!(time_for(u64::MAX, 0) > Duration::ZERO, "no division by zero");
    }
}
