//! The requests of one file, on the shard that serves it. Each is a task of its own, and replies
//! from there: the order among requests that are under way together is nobody's promise, as with
//! any disk.

use std::rc::Rc;
use std::sync::Arc;

use fuser::{Errno, ReplyData, ReplyEmpty, ReplyWrite};
use tokio::sync::mpsc;

use crate::device::{BlockDevice, ZeroFlags};
use crate::error::{Error, Result};
use crate::export::ExportSource;
use crate::runtime::Buf;
use crate::runtime::executor::spawn_local;
use crate::runtime::shard::ShardHandle;

/// Requests that wait for the shard. The kernel has no more than [`super::mount::REQUESTS_MAX`]
/// under way, so the thread that reads them does not wait for long, if ever.
const QUEUE: usize = super::mount::REQUESTS_MAX as usize;

/// What the kernel asks of a file.
pub(super) enum Request {
    Read {
        offset: u64,
        len: u32,
        reply: ReplyData,
    },
    /// The data lies in `buf` as [`BlockDevice::write`] wants it.
    Write {
        offset: u64,
        len: u32,
        buf: Buf,
        reply: ReplyWrite,
    },
    /// Shall read as zeros; the blocks are given back.
    Zero {
        offset: u64,
        len: u64,
        reply: ReplyEmpty,
    },
    /// What was answered before is durable when this is.
    Flush {
        reply: ReplyEmpty,
    },
}

/// Opens the volume on its shard. Requests that are sent to the queue are answered there, until
/// the last sender is gone.
///
/// # Errors
/// The volume cannot be opened.
pub(super) async fn start(
    shard: &ShardHandle,
    source: Arc<dyn ExportSource>,
) -> Result<mpsc::Sender<Request>> {
    let (queue, mut requests) = mpsc::channel(QUEUE);
    let opened = shard.call(move || async move {
        let device = source.open("").await?.device;
        spawn_local(async move {
            while let Some(request) = requests.recv().await {
                spawn_local(answer(Rc::clone(&device), request));
            }
        });
        Ok(())
    });
    opened.await.and_then(|opened: Result<()>| opened)?;
    Ok(queue)
}

async fn answer(device: Rc<dyn BlockDevice>, request: Request) {
    match request {
        Request::Read { offset, len, reply } => match device.read(offset, len).await {
            Ok(data) => reply.data(data.bytes()),
            Err(error) => reply.error(errno(&error)),
        },
        Request::Write { offset, len, buf, reply } => {
            match device.write(offset, len, buf, false).await {
                Ok(()) => reply.written(len),
                Err(error) => reply.error(errno(&error)),
            }
        }
        Request::Zero { offset, len, reply } => {
            done(reply, device.write_zeroes(offset, len, ZeroFlags::default()).await);
        }
        Request::Flush { reply } => done(reply, device.flush().await),
    }
}

fn done(reply: ReplyEmpty, outcome: Result<()>) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

fn errno(error: &Error) -> Errno {
    Errno::from_i32(error.errno())
}
