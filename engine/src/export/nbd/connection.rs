//! One connection from its first byte to its last.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use rustix::net::sockopt::set_socket_send_buffer_size;

use super::handshake::{self, Action, Facts, Handshake, INPUT_BYTES_MAX, Negotiated, Opened, Tls};
use super::stream::Stream;
use super::transmit::{Limits, STREAM_BYTES, transmit};
use crate::device::BlockDevice;
use crate::export::{Export, ExportSource};
use crate::runtime::reactor::{SendPart, send, sleep};

/// A client that has not chosen an export by then is let go.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(60);
/// Names that leave in one piece when exports are listed.
const LIST_PIECE: usize = 256;
/// Bytes of replies that the kernel holds for a client that is busy.
const SEND_BUFFER_BYTES: usize = 2 << 20;

/// Where a connection stands when it is handed over.
pub enum Entry {
    /// At its first byte.
    Fresh(Tls),
    /// Behind the TLS handshake that [`Action::StartTls`] asked for; the peer is the relay that
    /// holds the session.
    InsideTls(Handshake),
}

/// Serves the client on `socket`, a stream socket of any kind, until it leaves. Runs on a shard.
///
/// # Errors
/// The client left without saying so, broke the protocol or took too long.
pub async fn serve(
    socket: Arc<OwnedFd>,
    source: &dyn ExportSource,
    entry: Entry,
    limits: Limits,
) -> io::Result<()> {
    let mut stream = Stream::new(Arc::clone(&socket), INPUT_BYTES_MAX);
    let negotiation = Box::pin(negotiate(&socket, &mut stream, source, entry));
    match within(HANDSHAKE_TIME_MAX, negotiation).await? {
        None => Ok(()),
        Some((export, negotiated)) => {
            stream.grow(STREAM_BYTES);
            // Large replies leave in fewer pieces. It is a wish: the kernel grants no more than
            // net.core.wmem_max, and a relay's socket may know no such thing.
            let _ignored = set_socket_send_buffer_size(&socket, SEND_BUFFER_BYTES);
            transmit(socket, stream, export.device, negotiated, limits).await
        }
    }
}

/// Serves a client that needs no handshake: the kernel's, which was told everything when its
/// device was made. Runs on a shard; ends when everything that was asked for is done.
///
/// # Errors
/// The client left without saying so, or broke the protocol.
pub async fn serve_transmission(
    socket: Arc<OwnedFd>,
    device: Rc<dyn BlockDevice>,
) -> io::Result<()> {
    let stream = Stream::new(Arc::clone(&socket), STREAM_BYTES);
    // A wish, as above.
    let _ignored = set_socket_send_buffer_size(&socket, SEND_BUFFER_BYTES);
    transmit(socket, stream, device, Negotiated::default(), Limits::default()).await
}

/// Brings the handshake to its end; `None` when that is the end of the connection.
async fn negotiate(
    socket: &Arc<OwnedFd>,
    stream: &mut Stream,
    source: &dyn ExportSource,
    entry: Entry,
) -> io::Result<Option<(Export, Negotiated)>> {
    let mut out = Vec::new();
    let mut handshake = match entry {
        Entry::Fresh(tls) => Handshake::start(tls, &mut out),
        Entry::InsideTls(handshake) => handshake.after_tls(),
    };
    loop {
        let (taken, action) = handshake.step(stream.unread(), &mut out);
        stream.take(taken);
        match action {
            Action::Read => {
                send_all(socket, &mut out).await?;
                stream.fill().await?;
            }
            Action::List => list(socket, source, &mut out).await?,
            Action::Open(name) => {
                let export = source.open(&name).await.ok();
                let facts = export.as_ref().map(|export| Facts {
                    name: &export.name,
                    description: &export.description,
                    size_bytes: export.device.size_bytes(),
                    read_only: export.device.read_only(),
                });
                match (handshake.opened(facts.as_ref(), &mut out), export) {
                    (Opened::Transmit(negotiated), Some(export)) => {
                        send_all(socket, &mut out).await?;
                        return Ok(Some((export, negotiated)));
                    }
                    (Opened::Continue, _) => {}
                    (Opened::Transmit(_) | Opened::Close, _) => return Ok(None),
                }
            }
            // Whoever requires TLS runs the handshake up to here himself and then comes in by
            // `Entry::InsideTls`.
            Action::StartTls | Action::Close => {
                send_all(socket, &mut out).await?;
                return Ok(None);
            }
        }
    }
}

/// Sends the names of all exports, in pieces: there may be many.
async fn list(
    socket: &Arc<OwnedFd>,
    source: &dyn ExportSource,
    out: &mut Vec<u8>,
) -> io::Result<()> {
    for names in source.list().chunks(LIST_PIECE) {
        for name in names {
            handshake::put_listed(name, out);
        }
        send_all(socket, out).await?;
    }
    handshake::put_list_end(out);
    Ok(())
}

async fn send_all(socket: &Arc<OwnedFd>, out: &mut Vec<u8>) -> io::Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    let parts = vec![SendPart::Bytes(std::mem::take(out))];
    send(socket, parts).await.1
}

/// The outcome of `work`, unless it takes longer than `limit`.
async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let mut work = pin!(work);
    let mut timer = pin!(sleep(limit));
    poll_fn(|context| {
        if let Poll::Ready(result) = work.as_mut().poll(context) {
            return Poll::Ready(result);
        }
        timer.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    })
    .await
}
