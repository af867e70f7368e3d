//! Calls that answer with a stream: check, scrub, dump, extents, differences.
//!
//! Each runs as a task of its own that fills a short channel; when the client goes away the
//! channel closes and the task ends at its next step.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::mpsc::{self, Sender};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::daemon::engine::Engine;
use crate::daemon::rpc::Answers;
use crate::error::{Error, ErrorKind, Result};
use crate::pool::ChangedRun;
use crate::units::VolumeId;

/// Messages between a task and its client.
const MESSAGES_AHEAD: usize = 8;
/// Runs in one message.
const RUNS_MAX: usize = 4096;

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

/// A stream that ends with the news that this pandod cannot do what was asked for.
pub(super) fn unsupported<T: Send + 'static>(what: &'static str) -> Answers<T> {
    answers(move |_| async move {
        Err(Error::new(ErrorKind::Unsupported, format!("{what}: not in this version of pandod")))
    })
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
