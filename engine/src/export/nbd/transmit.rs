//! The transmission phase of one connection.
//!
//! ```text
//!            +-- read_requests --+                       +-- write_replies --+
//! socket --> | Stream: parse,    | --spawn--> answer --> | all replies of a  | --> socket
//!            | validate, payload |  one task each        | turn, one sendmsg |
//!            +---------+---------+   BlockDevice         +---------+---------+
//!                      |  waits when too much is in flight         |
//!                      +<----------- room, once sent --------------+
//! ```
//!
//! Invariants:
//! * A request is in flight from before its payload is read until its reply has been sent, so a
//!   client that does not take its replies stops being read.
//! * Whatever the client sends, the worst that happens is the end of this connection. Requests
//!   that are under way then are finished, their replies dropped.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use rustix::net::{Shutdown, shutdown};

use super::handshake::Negotiated;
use super::proto::{RequestHeader, WireError, command};
use super::reply::Replies;
use super::request::{Operation, Request, Target};
use super::stream::Stream;
use crate::device::{BlockDevice, ReadData};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::Buf;
use crate::runtime::executor::spawn_local;
use crate::runtime::reactor::send;
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, to_usize};

/// Bytes received at a time: some sixty writes of 4 KiB.
pub(super) const STREAM_BYTES: usize = 256 << 10;
/// Extents in an answer to one `BLOCK_STATUS`; the client asks again for the rest.
const EXTENTS_MAX: usize = 1024;

/// What one connection may hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests in flight.
    pub requests: usize,
    /// Bytes of data of the requests in flight; a single request may always be as large as the
    /// protocol's maximum.
    pub bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { requests: 128, bytes: 64 << 20 }
    }
}

/// Requests and their bytes of data.
#[derive(Clone, Copy, Default)]
struct Charge {
    requests: usize,
    bytes: usize,
}

struct State {
    /// Taken from the socket and not yet answered on it.
    in_flight: Charge,
    /// Replies that wait to be sent, and what sending them gives back.
    replies: Replies,
    answered: Charge,
    /// The reading half waits for room.
    starved: bool,
    /// No more requests will come.
    ended: bool,
    /// The socket takes no more replies.
    broken: bool,
    /// The task of the connection: both halves of it.
    task: Waker,
}

/// A connection in transmission, shared by the tasks of its requests.
struct Connection {
    socket: Arc<OwnedFd>,
    device: Rc<dyn BlockDevice>,
    negotiated: Negotiated,
    limits: Limits,
    state: RefCell<State>,
}

/// Serves requests until the client leaves or breaks the protocol, and every request in flight
/// has been answered.
///
/// # Errors
/// Why the stream of requests ended, unless by `DISCONNECT`.
pub(super) async fn transmit(
    socket: Arc<OwnedFd>,
    stream: Stream,
    device: Rc<dyn BlockDevice>,
    negotiated: Negotiated,
    limits: Limits,
) -> io::Result<()> {
    let state = State {
        in_flight: Charge::default(),
        replies: Replies::new(negotiated),
        answered: Charge::default(),
        starved: false,
        ended: false,
        broken: false,
        task: poll_fn(|context| Poll::Ready(context.waker().clone())).await,
    };
    let state = RefCell::new(state);
    let connection = Rc::new(Connection { socket, device, negotiated, limits, state });
    let mut reading = pin!(connection.read_requests(stream));
    let mut writing = pin!(connection.write_replies());
    let mut outcome = None;
    poll_fn(|context| {
        if outcome.is_none()
            && let Poll::Ready(result) = reading.as_mut().poll(context)
        {
            outcome = Some(result);
            connection.state.borrow_mut().ended = true;
        }
        writing.as_mut().poll(context)
    })
    .await;
    outcome.unwrap_or(Ok(()))
}

impl Connection {
    /// Reads requests and starts a task for each.
    async fn read_requests(self: &Rc<Self>, mut stream: Stream) -> io::Result<()> {
        loop {
            match Request::parse(stream.unread()) {
                Ok(None) => stream.fill().await?,
                Ok(Some(request)) => {
                    stream.take(size_of::<RequestHeader>());
                    if request.command == command::DISCONNECT {
                        return Ok(());
                    }
                    self.read_request(request, &mut stream).await?;
                }
                Err(broken) => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, broken.what()));
                }
            }
        }
    }

    async fn read_request(
        self: &Rc<Self>,
        request: Request,
        stream: &mut Stream,
    ) -> io::Result<()> {
        let verdict = request.validate(&Target {
            size_bytes: self.device.size_bytes(),
            read_only: self.device.read_only(),
            negotiated: self.negotiated,
        });
        let len = to_usize(request.len.into());
        let carries_data = matches!(verdict, Ok(Operation::Read | Operation::Write { .. }));
        let ticket = self.admit(if carries_data { len } else { 0 }).await;
        let mut payload = None;
        if let Ok(Operation::Write { .. }) = verdict {
            let at = to_usize(request.offset % BLOCK_BYTES);
            let buf = Buf::new((at + len).div_ceil(BLOCK_SIZE));
            payload = Some(stream.payload(buf, at, len).await?);
        } else {
            stream.drain(to_usize(request.payload_bytes().into())).await?;
        }
        match verdict {
            Ok(operation) => spawn_local(ticket.answer(request, operation, payload)),
            Err(error) => ticket.reply(|replies| replies.error(request.cookie, error, "refused")),
        }
        Ok(())
    }

    /// Waits until one request more, with `bytes` of data, may be in flight.
    async fn admit(self: &Rc<Self>, bytes: usize) -> Ticket {
        poll_fn(|_| {
            let state = &mut *self.state.borrow_mut();
            let held = state.in_flight;
            let fits = held.bytes == 0 || held.bytes + bytes <= self.limits.bytes;
            state.starved = held.requests >= self.limits.requests || !fits;
            if state.starved {
                return Poll::Pending;
            }
            state.in_flight.requests += 1;
            state.in_flight.bytes += bytes;
            Poll::Ready(())
        })
        .await;
        Ticket { connection: Rc::clone(self), bytes: Some(bytes) }
    }

    /// Sends replies, all that there are at a time, until the last request is answered.
    async fn write_replies(&self) {
        loop {
            poll_fn(|_| {
                let state = self.state.borrow();
                let over = state.ended && state.in_flight.requests == 0;
                if over || !state.replies.is_empty() { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            let (parts, answered) = {
                let state = &mut *self.state.borrow_mut();
                (state.replies.take(), std::mem::take(&mut state.answered))
            };
            if parts.is_empty() {
                return;
            }
            let (_, result) = send(&self.socket, parts).await;
            let state = &mut *self.state.borrow_mut();
            if result.is_err() {
                state.broken = true;
                // Ends the reading half as well. The socket may be down already.
                let _ignored = shutdown(&self.socket, Shutdown::Both);
            }
            state.release(answered);
        }
    }
}

impl State {
    fn release(&mut self, charge: Charge) {
        self.in_flight.requests -= charge.requests;
        self.in_flight.bytes -= charge.bytes;
        if self.starved || self.ended {
            self.task.wake_by_ref();
        }
    }
}

/// The right of one request to be in flight. Given back when its reply has been sent, or when it
/// is dropped without one.
struct Ticket {
    connection: Rc<Connection>,
    /// What it is charged; `None` once it has been replied to.
    bytes: Option<usize>,
}

impl Ticket {
    /// Does a request that was found valid, and replies to it.
    async fn answer(self, request: Request, operation: Operation, payload: Option<Buf>) {
        let device = Rc::clone(&self.connection.device);
        let Request { cookie, offset, len, .. } = request;
        let outcome = match (operation, payload) {
            (Operation::Read, _) => {
                let result = device.read(offset, len).await.and_then(|data| whole(data, len));
                match result {
                    Ok(data) => return self.reply(|replies| replies.data(cookie, offset, data)),
                    Err(error) => Err(error),
                }
            }
            (Operation::BlockStatus { one }, _) => {
                let max_runs = if one { 1 } else { EXTENTS_MAX };
                match device.mapped_runs(offset, len.into(), max_runs).await {
                    Ok(runs) => {
                        return self.reply(|replies| replies.extents(cookie, offset, len, &runs));
                    }
                    Err(error) => Err(error),
                }
            }
            (Operation::Nothing, _) if request.command == command::READ => {
                return self.reply(|replies| replies.no_data(cookie));
            }
            (Operation::Write { fua }, Some(buf)) => device.write(offset, len, buf, fua).await,
            (Operation::Flush, _) => device.flush().await,
            (Operation::Trim { fua }, _) => device.discard(offset, len.into(), fua).await,
            (Operation::WriteZeroes(flags), _) => {
                device.write_zeroes(offset, len.into(), flags).await
            }
            (Operation::Nothing | Operation::Write { .. }, _) => Ok(()),
        };
        self.reply(|replies| match outcome {
            Ok(()) => replies.done(cookie),
            Err(error) => {
                let code = WireError::from_errno(error.errno());
                replies.error(cookie, code, &error.to_string());
            }
        });
    }

    /// Queues the reply that `put` writes.
    fn reply(mut self, put: impl FnOnce(&mut Replies)) {
        let state = &mut *self.connection.state.borrow_mut();
        if state.broken {
            return;
        }
        put(&mut state.replies);
        state.answered.requests += 1;
        state.answered.bytes += self.bytes.take().unwrap_or_default();
        state.task.wake_by_ref();
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(bytes) = self.bytes {
            self.connection.state.borrow_mut().release(Charge { requests: 1, bytes });
        }
    }
}

/// A reply of another length than was asked for would put the stream out of step.
fn whole(data: ReadData, len: u32) -> Result<ReadData> {
    if data.len == to_usize(len.into()) {
        return Ok(data);
    }
    let what = format!("read of {len} bytes gave {}", data.len);
    Err(Error::new(ErrorKind::Corrupt, what))
}
