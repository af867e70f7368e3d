//! The bytes that come in: one large receive brings as many requests as the client has sent, and
//! only the payload of a large write is received straight to where it is needed.
//!
//! ```text
//! 0        start              end         capacity
//! [ taken  |  not looked at   |  free     ]  <- recv
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::runtime::Buf;
use crate::runtime::reactor::{recv, recv_buf};

/// A missing piece of a payload that is larger than this is received in place: to gather a
/// smaller one with the requests behind it costs a copy, but saves a system call.
const DIRECT_BYTES_MIN: usize = 64 << 10;

/// Incoming bytes of a socket.
pub(super) struct Stream {
    socket: Arc<OwnedFd>,
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Stream {
    /// Reads from `socket`, `capacity` bytes at a time.
    pub(super) fn new(socket: Arc<OwnedFd>, capacity: usize) -> Self {
        Self { socket, bytes: vec![0; capacity], start: 0, end: 0 }
    }

    /// Makes room for `capacity` bytes at a time.
    pub(super) fn grow(&mut self, capacity: usize) {
        let mut bytes = vec![0; capacity.max(self.bytes.len())];
        let held = self.end - self.start;
        bytes[..held].copy_from_slice(self.unread());
        (self.bytes, self.start, self.end) = (bytes, 0, held);
    }

    /// What has come in and was not taken yet.
    pub(super) fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// The first `count` unread bytes are done with.
    pub(super) fn take(&mut self, count: usize) {
        self.start += count;
        debug_assert!(self.start <= self.end, "only what is there can be taken");
    }

    /// Waits for more bytes. An unread rest must be smaller than the capacity.
    ///
    /// # Errors
    /// `UnexpectedEof` at the end of the stream, or the socket's error.
    pub(super) async fn fill(&mut self) -> io::Result<()> {
        if self.start > 0 {
            // What is moved is a part of a header at most: payloads are taken piece by piece.
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let range = self.end..self.bytes.len();
        let (bytes, result) = recv(&self.socket, std::mem::take(&mut self.bytes), range).await;
        self.bytes = bytes;
        match result? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.end += count;
                Ok(())
            }
        }
    }

    /// Fills `len` bytes of `buf` from `at` on.
    ///
    /// # Errors
    /// The stream ended or failed before the payload was whole.
    pub(super) async fn payload(&mut self, mut buf: Buf, at: usize, len: usize) -> io::Result<Buf> {
        let mut filled = 0;
        while filled < len {
            let ready = self.unread().len().min(len - filled);
            buf.as_mut_bytes()[at + filled..][..ready].copy_from_slice(&self.unread()[..ready]);
            self.take(ready);
            filled += ready;
            let missing = len - filled;
            if missing >= DIRECT_BYTES_MIN {
                let range = at + filled..at + len;
                let (back, result) = recv_buf(&self.socket, buf, range).await;
                buf = back;
                match result? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    count => filled += count,
                }
            } else if missing > 0 {
                self.fill().await?;
            }
        }
        Ok(buf)
    }

    /// Drops `len` bytes of the stream.
    ///
    /// # Errors
    /// The stream ended or failed before.
    pub(super) async fn drain(&mut self, mut len: usize) -> io::Result<()> {
        loop {
            let ready = self.unread().len().min(len);
            self.take(ready);
            len -= ready;
            if len == 0 {
                return Ok(());
            }
            self.fill().await?;
        }
    }
}
