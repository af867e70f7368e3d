//! Replies as they leave: a small head and a body that is sent from where it lies.
//!
//! ```text
//! simple       [ magic | error | cookie ]                                  [ data ]
//! structured   [ magic | flags | type | cookie | length ][ offset, id .. ] [ data, extents, text ]
//!              '------------------- head ------------------------------'  '-------- body -------'
//! ```
//!
//! With structured replies on, reads, block status and errors use them; other successes stay
//! simple, as the protocol allows. Every reply is one piece: the server never fragments a read,
//! so `DF` costs nothing.

use zerocopy::IntoBytes;

use super::handshake::Negotiated;
use super::proto::{
    CHUNK_DONE, CHUNK_MAGIC, CONTEXT_ALLOCATION_ID, ChunkError, ChunkHeader, Extent,
    SIMPLE_REPLY_MAGIC, STATE_HOLE, STATE_ZERO, SimpleReply, WireError, chunk,
};
use crate::device::{MappedRun, ReadData};
use crate::units::{to_u32, to_u64};

/// Longest head: a chunk header and an offset.
const HEAD_BYTES_MAX: usize = size_of::<ChunkHeader>() + size_of::<u64>();
/// Bytes of an error's text.
const TEXT_BYTES_MAX: usize = 256;

enum Body {
    None,
    Data(ReadData),
    Bytes(Vec<u8>),
}

/// One reply.
pub struct Reply {
    head: [u8; HEAD_BYTES_MAX],
    head_len: usize,
    body: Body,
}

impl Reply {
    fn new(parts: &[&[u8]], body: Body) -> Self {
        let mut head = [0; HEAD_BYTES_MAX];
        let mut head_len = 0;
        for part in parts {
            head[head_len..head_len + part.len()].copy_from_slice(part);
            head_len += part.len();
        }
        Self { head, head_len, body }
    }

    /// Success without data.
    #[must_use]
    pub fn done(cookie: u64) -> Self {
        Self::simple(cookie, 0, Body::None)
    }

    fn simple(cookie: u64, error: u32, body: Body) -> Self {
        let header = SimpleReply {
            magic: SIMPLE_REPLY_MAGIC.into(),
            error: error.into(),
            cookie: cookie.into(),
        };
        Self::new(&[header.as_bytes()], body)
    }

    /// Failure; the text is for people and only structured replies carry it.
    #[must_use]
    pub fn error(negotiated: Negotiated, cookie: u64, error: WireError, text: &str) -> Self {
        if !negotiated.structured {
            return Self::simple(cookie, error.code(), Body::None);
        }
        let text = &text.as_bytes()[..text.len().min(TEXT_BYTES_MAX)];
        let text_length = u16::try_from(text.len()).unwrap_or_default();
        let content = ChunkError { error: error.code().into(), text_length: text_length.into() };
        let header = chunk_header(cookie, chunk::ERROR, size_of::<ChunkError>() + text.len());
        Self::new(&[header.as_bytes(), content.as_bytes()], Body::Bytes(text.to_vec()))
    }

    /// The data of a read at `offset`.
    #[must_use]
    pub fn data(negotiated: Negotiated, cookie: u64, offset: u64, data: ReadData) -> Self {
        if !negotiated.structured {
            return Self::simple(cookie, 0, Body::Data(data));
        }
        let header = chunk_header(cookie, chunk::OFFSET_DATA, size_of::<u64>() + data.len);
        Self::new(&[header.as_bytes(), &offset.to_be_bytes()], Body::Data(data))
    }

    /// An empty read.
    #[must_use]
    pub fn no_data(negotiated: Negotiated, cookie: u64) -> Self {
        if !negotiated.structured {
            return Self::done(cookie);
        }
        Self::new(&[chunk_header(cookie, chunk::NONE, 0).as_bytes()], Body::None)
    }

    /// The extents of `[offset, offset + len)`, clipped to it; neighbours of one kind are one.
    #[must_use]
    pub fn extents(cookie: u64, offset: u64, len: u32, runs: &[MappedRun]) -> Self {
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
        let mut bytes = Vec::with_capacity(extents.len() * size_of::<Extent>());
        for (length, state) in extents {
            let extent = Extent { length: to_u32(length).into(), state: state.into() };
            bytes.extend_from_slice(extent.as_bytes());
        }
        let length = size_of::<u32>() + bytes.len();
        let header = chunk_header(cookie, chunk::BLOCK_STATUS, length);
        let id = CONTEXT_ALLOCATION_ID.to_be_bytes();
        Self::new(&[header.as_bytes(), &id], Body::Bytes(bytes))
    }

    /// Head and body as they go on the wire.
    #[must_use]
    pub fn parts(&self) -> [&[u8]; 2] {
        let body: &[u8] = match &self.body {
            Body::None => &[],
            Body::Data(data) => data.bytes(),
            Body::Bytes(bytes) => bytes,
        };
        [&self.head[..self.head_len], body]
    }

    /// Bytes on the wire.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.parts().iter().map(|part| part.len()).sum()
    }
}

fn chunk_header(cookie: u64, kind: u16, length: usize) -> ChunkHeader {
    ChunkHeader {
        magic: CHUNK_MAGIC.into(),
        flags: CHUNK_DONE.into(),
        kind: kind.into(),
        cookie: cookie.into(),
        length: to_u32(to_u64(length)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Buf;

    const STRUCTURED: Negotiated = Negotiated { structured: true, allocation: true };

    fn wire(reply: &Reply) -> Vec<u8> {
        let bytes = reply.parts().concat();
        assert_eq!(bytes.len(), reply.len_bytes());
        bytes
    }

    fn run(offset: u64, len: u64, mapped: bool) -> MappedRun {
        MappedRun { offset, len, mapped }
    }

    #[test]
    fn simple_replies() {
        let done = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
        assert_eq!(wire(&Reply::done(5)), done);
        let refused = Reply::error(Negotiated::default(), 5, WireError::NoSpace, "full");
        assert_eq!(wire(&refused)[4..8], [0, 0, 0, 28]);
        assert_eq!(wire(&refused).len(), 16, "a simple reply has no text");
        assert_eq!(wire(&Reply::no_data(Negotiated::default(), 5)), done);
    }

    #[test]
    fn data_is_the_part_asked_for() {
        let mut buf = Buf::zeroed(1);
        buf.as_mut_bytes()[512..1024].fill(7);
        let data = ReadData { buf, start: 512, len: 512 };
        let bytes = wire(&Reply::data(STRUCTURED, 5, 4608, data));
        assert_eq!(bytes[..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1]);
        assert_eq!(bytes[16..20], 520_u32.to_be_bytes());
        assert_eq!(bytes[20..28], 4608_u64.to_be_bytes());
        assert_eq!(bytes[28..], [7; 512]);
        let empty = wire(&Reply::no_data(STRUCTURED, 5));
        assert_eq!(empty[4..8], [0, 1, 0, 0]);
        assert_eq!(empty.len(), 20);
    }

    #[test]
    fn errors_carry_a_bounded_text() {
        let long = "x".repeat(5000);
        let bytes = wire(&Reply::error(STRUCTURED, 5, WireError::Io, &long));
        assert_eq!(bytes[4..8], [0, 1, 0x80, 1]);
        assert_eq!(bytes[20..24], [0, 0, 0, 5]);
        assert_eq!(bytes.len(), 20 + 6 + TEXT_BYTES_MAX);
    }

    #[test]
    fn extents_are_clipped_and_merged() {
        let runs = [run(0, 8192, true), run(8192, 4096, true), run(12288, 1 << 40, false)];
        let bytes = wire(&Reply::extents(5, 4096, 16384, &runs));
        assert_eq!(bytes[20..24], CONTEXT_ALLOCATION_ID.to_be_bytes());
        let expected = [[0, 0, 0x20, 0], [0, 0, 0, 0], [0, 0, 0x20, 0], [0, 0, 0, 3]].concat();
        assert_eq!(bytes[24..], expected);
        assert_eq!(bytes[16..20], 20_u32.to_be_bytes());
    }
}
