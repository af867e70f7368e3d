//! Replies as they leave: heads gathered in vectors, the data of reads sent from where it lies.
//!
//! ```text
//! simple       [ magic | error | cookie ]                                  [ data ]
//! structured   [ magic | flags | type | cookie | length ][ offset, id .. ] [ data, extents, text ]
//!
//! Replies      Bytes(head head head) Buf(data) Bytes(head head) Buf(data) ..   one sendmsg
//! ```
//!
//! With structured replies on, reads, block status and errors use them; other successes stay
//! simple, as the protocol allows. Every reply is one chunk: the server never fragments a read,
//! so `DF` costs nothing.

use zerocopy::IntoBytes;

use super::handshake::Negotiated;
use super::proto::{
    CHUNK_DONE, CHUNK_MAGIC, CONTEXT_ALLOCATION_ID, ChunkError, ChunkHeader, Extent,
    SIMPLE_REPLY_MAGIC, STATE_HOLE, STATE_ZERO, SimpleReply, WireError, chunk,
};
use crate::device::{MappedRun, ReadData};
use crate::runtime::reactor::SendPart;
use crate::units::{to_u32, to_u64};

/// Bytes of an error's text.
const TEXT_BYTES_MAX: usize = 256;
/// Room for the heads that a batch usually holds.
const HEADS_BYTES: usize = 32 * size_of::<SimpleReply>();

/// Replies that leave together.
pub struct Replies {
    negotiated: Negotiated,
    parts: Vec<SendPart>,
}

impl Replies {
    /// No replies yet.
    #[must_use]
    pub const fn new(negotiated: Negotiated) -> Self {
        Self { negotiated, parts: Vec::new() }
    }

    /// Whether there is nothing to send.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// What there is to send; nothing is left.
    pub fn take(&mut self) -> Vec<SendPart> {
        std::mem::take(&mut self.parts)
    }

    /// Success without data.
    pub fn done(&mut self, cookie: u64) {
        self.simple(cookie, 0);
    }

    /// Failure; the text is for people and only structured replies carry it.
    pub fn error(&mut self, cookie: u64, error: WireError, text: &str) {
        if !self.negotiated.structured {
            return self.simple(cookie, error.code());
        }
        let text = &text.as_bytes()[..text.len().min(TEXT_BYTES_MAX)];
        let text_length = u16::try_from(text.len()).unwrap_or_default();
        let content = ChunkError { error: error.code().into(), text_length: text_length.into() };
        self.chunk(cookie, chunk::ERROR, size_of::<ChunkError>() + text.len());
        self.put(content.as_bytes());
        self.put(text);
    }

    /// The data of a read at `offset`.
    pub fn data(&mut self, cookie: u64, offset: u64, data: ReadData) {
        if self.negotiated.structured {
            self.chunk(cookie, chunk::OFFSET_DATA, size_of::<u64>() + data.len);
            self.put(&offset.to_be_bytes());
        } else {
            self.simple(cookie, 0);
        }
        let range = data.start..data.start + data.len;
        self.parts.push(SendPart::Buf { buf: data.buf, range });
    }

    /// An empty read.
    pub fn no_data(&mut self, cookie: u64) {
        if self.negotiated.structured {
            self.chunk(cookie, chunk::NONE, 0);
        } else {
            self.simple(cookie, 0);
        }
    }

    /// The extents of `[offset, offset + len)`, clipped to it; neighbours of one kind are one.
    pub fn extents(&mut self, cookie: u64, offset: u64, len: u32, runs: &[MappedRun]) {
        let end = offset.saturating_add(len.into());
        let mut extents: Vec<(u64, u32)> = Vec::with_capacity(runs.len());
        for run in runs {
            let from = run.offset.max(offset);
            let to = run.offset.saturating_add(run.len).min(end);
            let state = if run.mapped { 0 } else { STATE_HOLE | STATE_ZERO };
            match extents.last_mut() {
                _ if from >= to => {}
                Some((length, last)) if *last == state => *length += to - from,
                _ => extents.push((to - from, state)),
            }
        }
        let length = size_of::<u32>() + extents.len() * size_of::<Extent>();
        self.chunk(cookie, chunk::BLOCK_STATUS, length);
        self.put(&CONTEXT_ALLOCATION_ID.to_be_bytes());
        for (length, state) in extents {
            let extent = Extent { length: to_u32(length).into(), state: state.into() };
            self.put(extent.as_bytes());
        }
    }

    fn simple(&mut self, cookie: u64, error: u32) {
        let header = SimpleReply {
            magic: SIMPLE_REPLY_MAGIC.into(),
            error: error.into(),
            cookie: cookie.into(),
        };
        self.put(header.as_bytes());
    }

    /// The head of the one and last chunk of a reply.
    fn chunk(&mut self, cookie: u64, kind: u16, length: usize) {
        let header = ChunkHeader {
            magic: CHUNK_MAGIC.into(),
            flags: CHUNK_DONE.into(),
            kind: kind.into(),
            cookie: cookie.into(),
            length: to_u32(to_u64(length)).into(),
        };
        self.put(header.as_bytes());
    }

    fn put(&mut self, bytes: &[u8]) {
        if let Some(SendPart::Bytes(last)) = self.parts.last_mut() {
            return last.extend_from_slice(bytes);
        }
        let mut first = Vec::with_capacity(HEADS_BYTES);
        first.extend_from_slice(bytes);
        self.parts.push(SendPart::Bytes(first));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Buf;

    const STRUCTURED: Negotiated = Negotiated { structured: true, allocation: true };

    fn wire(negotiated: Negotiated, put: impl FnOnce(&mut Replies)) -> Vec<u8> {
        let mut replies = Replies::new(negotiated);
        assert!(replies.is_empty());
        put(&mut replies);
        let parts = replies.take();
        assert!(replies.is_empty());
        parts.iter().flat_map(|part| part.bytes().to_vec()).collect()
    }

    fn run(offset: u64, len: u64, mapped: bool) -> MappedRun {
        MappedRun { offset, len, mapped }
    }

    #[test]
    fn simple_replies() {
        let plain = Negotiated::default();
        let done = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
        assert_eq!(wire(plain, |r| r.done(5)), done);
        assert_eq!(wire(plain, |r| r.no_data(5)), done);
        let refused = wire(plain, |r| r.error(5, WireError::NoSpace, "full"));
        assert_eq!(refused[4..8], [0, 0, 0, 28]);
        assert_eq!(refused.len(), 16, "a simple reply has no text");
    }

    #[test]
    fn heads_are_gathered_and_data_is_not_copied() {
        let mut replies = Replies::new(STRUCTURED);
        let mut buf = Buf::zeroed(1);
        buf.as_mut_bytes()[512..1024].fill(7);
        let address = buf.as_bytes()[512..].as_ptr();
        replies.done(1);
        replies.done(2);
        replies.data(5, 4608, ReadData { buf, start: 512, len: 512 });
        replies.done(3);
        let parts = replies.take();
        assert_eq!(parts.len(), 3);
        let head = &parts[0].bytes()[32..];
        assert_eq!(head[..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1]);
        assert_eq!(head[16..20], 520_u32.to_be_bytes());
        assert_eq!(head[20..], 4608_u64.to_be_bytes());
        assert_eq!(parts[1].bytes(), [7; 512]);
        assert_eq!(parts[1].bytes().as_ptr(), address);
    }

    #[test]
    fn structured_replies() {
        let empty = wire(STRUCTURED, |r| r.no_data(5));
        assert_eq!(empty[4..8], [0, 1, 0, 0]);
        assert_eq!(empty.len(), 20);
        let long = "x".repeat(5000);
        let error = wire(STRUCTURED, |r| r.error(5, WireError::Io, &long));
        assert_eq!(error[4..8], [0, 1, 0x80, 1]);
        assert_eq!(error[20..24], [0, 0, 0, 5]);
        assert_eq!(error.len(), 20 + 6 + TEXT_BYTES_MAX, "the text is bounded");
    }

    #[test]
    fn extents_are_clipped_and_merged() {
        let runs = [run(0, 8192, true), run(8192, 4096, true), run(12288, 1 << 40, false)];
        let bytes = wire(STRUCTURED, |r| r.extents(5, 4096, 16384, &runs));
        assert_eq!(bytes[20..24], CONTEXT_ALLOCATION_ID.to_be_bytes());
        let expected = [[0, 0, 0x20, 0], [0, 0, 0, 0], [0, 0, 0x20, 0], [0, 0, 0, 3]].concat();
        assert_eq!(bytes[24..], expected);
        assert_eq!(bytes[16..20], 20_u32.to_be_bytes());
    }
}
