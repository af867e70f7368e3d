//! Repairs the `:authority` of HTTP/2 requests. Clients in Go may send the path of the socket as
//! `:authority`; kubelet does when it asks a plugin for its name. Such a path is not a valid
//! authority, and h2, which tonic uses, ends the call with PROTOCOL_ERROR. So the bytes of each
//! incoming `:authority` are replaced by as many bytes of a valid one. The adapter does not use it.
//!
//! ```text
//! preface | frame: length type flags stream, payload | frame ...
//!   HEADERS, CONTINUATION    the payload is part of a field block (HPACK, RFC 7541)
//!   others                   skipped
//! field: an index | index of the name, text of the value | text of the name, text of the value
//! text:  length, bytes: plain or Huffman-coded
//! ```
//!
//! Lengths do not change, so no byte has to be buffered, and the client's dynamic table keeps its
//! sizes. Input that is not HTTP/2 passes unchanged; h2 reports the error.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::Connected;

/// Length of the connection preface.
const PREFACE_BYTES: usize = 24;
const FRAME_HEAD_BYTES: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const PADDED: u8 = 0x08;
const PRIORITY: u8 = 0x20;
const PRIORITY_BYTES: usize = 5;
/// Index of the name `:authority` in the static table.
const AUTHORITY: u8 = 1;
/// Bits of the digit 0 in the Huffman code; all of them are 0.
const ZERO_BITS: usize = 5;
/// Longer texts, and lengths of more bytes, pass unchanged: h2 refuses such a block.
const TEXT_BYTES_MAX: usize = 1 << 24;
const SHIFT_MAX: u32 = 28;

/// A connection whose client may send anything as `:authority`.
pub(crate) struct Lenient {
    stream: UnixStream,
    filter: Filter,
}

impl Lenient {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, filter: Filter::default() }
    }
}

impl Connected for Lenient {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Lenient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        waking: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(waking, buffer))?;
        self.filter.pass(&mut buffer.filled_mut()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Lenient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        waking: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(waking, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, waking: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(waking)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, waking: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(waking)
    }
}

/// Replaces each `:authority` in a stream of bytes that arrives in pieces of any size.
#[derive(Debug)]
struct Filter {
    /// The head of the next frame, of which `at` bytes have arrived.
    head: [u8; FRAME_HEAD_BYTES],
    at: usize,
    /// Whether the next byte is the length of the padding.
    padded: bool,
    /// Bytes left of this frame: before the fields, of the fields, of the padding.
    skip: usize,
    fields: usize,
    pad: usize,
    /// Bytes of the priority, which come after the length of the padding.
    priority: usize,
    field: Field,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            head: [0; FRAME_HEAD_BYTES],
            at: 0,
            padded: false,
            skip: PREFACE_BYTES,
            fields: 0,
            pad: 0,
            priority: 0,
            field: Field::Begin,
        }
    }
}

impl Filter {
    fn pass(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            self.take(byte);
        }
    }

    fn take(&mut self, byte: &mut u8) {
        if self.skip > 0 {
            self.skip -= 1;
        } else if self.padded {
            self.padded = false;
            self.pad = self.fields.min(usize::from(*byte));
            self.fields -= self.pad;
            self.skip_priority();
        } else if self.fields > 0 {
            self.fields -= 1;
            self.field = self.field.next(byte);
        } else if self.pad > 0 {
            self.pad -= 1;
        } else {
            self.head[self.at] = *byte;
            self.at += 1;
            if self.at == FRAME_HEAD_BYTES {
                self.at = 0;
                self.frame();
            }
        }
    }

    /// Begins a frame whose head is complete.
    fn frame(&mut self) {
        let [high, middle, low, kind, flags, ..] = self.head;
        let bytes = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        match kind {
            HEADERS => {
                self.field = Field::Begin;
                self.padded = flags & PADDED != 0 && bytes > 0;
                self.fields = bytes - usize::from(self.padded);
                self.priority = if flags & PRIORITY == 0 { 0 } else { PRIORITY_BYTES };
                if !self.padded {
                    self.skip_priority();
                }
            }
            CONTINUATION => self.fields = bytes,
            _ => self.skip = bytes,
        }
    }

    fn skip_priority(&mut self) {
        self.skip = self.fields.min(self.priority);
        self.fields -= self.skip;
    }
}

/// The position of the next byte in a field block.
#[derive(Clone, Copy, Debug)]
enum Field {
    Begin,
    /// In an index that does not matter; the text that follows it, if any.
    Index(Option<Text>),
    Length(Text),
    /// In a length of several bytes: its value so far, and the shift of the next byte.
    Longer {
        text: Text,
        huffman: bool,
        bytes: usize,
        shift: u32,
    },
    Bytes {
        text: Text,
        huffman: bool,
        bytes: usize,
        at: usize,
    },
    /// The block is invalid.
    Invalid,
}

/// What a text stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Text {
    Name,
    Value,
    Authority,
}

impl Field {
    /// Takes a byte, and replaces it if it belongs to an authority.
    fn next(self, byte: &mut u8) -> Self {
        match self {
            Self::Begin => Self::begin(*byte),
            Self::Index(_) if *byte & 0x80 != 0 => self,
            Self::Index(then) => then.map_or(Self::Begin, Self::Length),
            Self::Length(text) => {
                let (huffman, bytes) = (*byte & 0x80 != 0, usize::from(*byte & 0x7f));
                match bytes {
                    0x7f => Self::Longer { text, huffman, bytes, shift: 0 },
                    _ => Self::text(text, huffman, bytes),
                }
            }
            Self::Longer { text, huffman, bytes, shift } => {
                let bytes = bytes + (usize::from(*byte & 0x7f) << shift);
                if bytes > TEXT_BYTES_MAX || shift > SHIFT_MAX {
                    Self::Invalid
                } else if *byte & 0x80 != 0 {
                    Self::Longer { text, huffman, bytes, shift: shift + 7 }
                } else {
                    Self::text(text, huffman, bytes)
                }
            }
            Self::Bytes { text, huffman, bytes, at } => {
                if text == Text::Authority {
                    *byte = zero_digits(huffman, bytes, at);
                }
                match at + 1 < bytes {
                    true => Self::Bytes { text, huffman, bytes, at: at + 1 },
                    false => Self::after(text),
                }
            }
            Self::Invalid => Self::Invalid,
        }
    }

    /// Decodes the first byte of a field: which parts are indexed, and which follow as texts.
    const fn begin(byte: u8) -> Self {
        let (index, max, by_index) = match byte {
            0x80.. => (byte & 0x7f, 0x7f, true),
            0x40.. => (byte & 0x3f, 0x3f, false),
            // A new size of the dynamic table.
            0x20.. => (byte & 0x1f, 0x1f, true),
            _ => (byte & 0x0f, 0x0f, false),
        };
        match (by_index, index) {
            (true, index) if index == max => Self::Index(None),
            (true, _) => Self::Begin,
            (false, 0) => Self::Length(Text::Name),
            (false, AUTHORITY) => Self::Length(Text::Authority),
            (false, index) if index == max => Self::Index(Some(Text::Value)),
            (false, _) => Self::Length(Text::Value),
        }
    }

    /// Begins a text whose length is known.
    const fn text(text: Text, huffman: bool, bytes: usize) -> Self {
        match bytes {
            0 => Self::after(text),
            _ => Self::Bytes { text, huffman, bytes, at: 0 },
        }
    }

    const fn after(text: Text) -> Self {
        match text {
            Text::Name => Self::Length(Text::Value),
            Text::Value | Text::Authority => Self::Begin,
        }
    }
}

/// Byte `at` of a text of zero digits that has `bytes` bytes. In the Huffman code the bits after
/// the last digit are 1.
const fn zero_digits(huffman: bool, bytes: usize, at: usize) -> u8 {
    match (huffman, at + 1 == bytes) {
        (false, _) => b'0',
        (true, false) => 0,
        (true, true) => (1 << (bytes * 8 % ZERO_BITS)) - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &[u8] = b"%2Fvar%2Flib%2Fkubelet%2Fplugins_registry%2Fcsi.sock";

    /// A frame of one stream.
    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, 1][..], payload].concat()
    }

    fn connection(frames: &[Vec<u8>]) -> Vec<u8> {
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frames.concat()].concat()
    }

    /// A text as a field contains it.
    fn text(huffman: bool, text: &[u8]) -> Vec<u8> {
        let length = u8::try_from(text.len()).unwrap() | if huffman { 0x80 } else { 0 };
        [&[length][..], text].concat()
    }

    /// Fields of every form, including an authority whose first byte is `first`.
    fn block(first: u8, huffman: bool, authority: &[u8]) -> Vec<u8> {
        [
            // Indexed, one of them in three bytes; a size of the table.
            vec![0x83, 0xff, 0x80, 0x01, 0x3f, 0x61],
            // A name by index, in one byte and in two.
            [&[0x44][..], &text(false, b"/a.B/C")].concat(),
            [&[0x7f, 0x05][..], &text(true, b"\x1c\x64")].concat(),
            [&[first][..], &text(huffman, authority)].concat(),
            // Name and value as texts, empty and not.
            [&[0x00][..], &text(false, b""), &text(false, b"")].concat(),
            [&[0x40][..], &text(false, b"x-a"), &text(false, b":authority")].concat(),
            vec![0x86],
        ]
        .concat()
    }

    /// The same fields in frames of all forms, with frames of other kinds between them.
    fn connections(block: &[u8]) -> Vec<Vec<u8>> {
        let padded = [&[3, 0, 0, 0, 0, 9][..], block, &[0x41, 0x01, 0x41]].concat();
        let (begin, end) = block.split_at(block.len() / 2);
        let settings = frame(4, 0, &[0; 12]);
        let data = frame(0, 1, &[0x41, 0x02, b'/', b'/']);
        vec![
            connection(&[settings.clone(), frame(HEADERS, 4, block)]),
            connection(&[frame(HEADERS, 4 | PADDED | PRIORITY, &padded), data.clone()]),
            connection(&[frame(HEADERS, PRIORITY, &padded[1..6]), frame(CONTINUATION, 4, block)]),
            connection(&[frame(HEADERS, 0, begin), frame(CONTINUATION, 4, end), settings]),
            connection(&[frame(HEADERS, 4, block), data, frame(HEADERS, 4, block)]),
        ]
    }

    /// The output of the filter, which gets the input in pieces of a size.
    fn passed(bytes: &[u8], piece: usize) -> Vec<u8> {
        let (mut filter, mut bytes) = (Filter::default(), bytes.to_vec());
        for piece in bytes.chunks_mut(piece) {
            filter.pass(piece);
        }
        bytes
    }

    #[test]
    fn the_authority_is_replaced_and_nothing_else() {
        let zeros = [b'0'; PATH.len()];
        let cases: [(bool, &[u8], &[u8]); 5] = [
            (false, PATH, &zeros),
            (false, b"", b""),
            // Huffman-coded: 8 zeros; 4 zeros and four bits of 1; 1 zero and three bits of 1.
            (true, &[0x9a; 5], &[0; 5]),
            (true, &[0x9a; 3], &[0, 0, 0x0f]),
            (true, &[0x9a], &[0x07]),
        ];
        for (huffman, authority, expected) in cases {
            // With indexing, without it, never indexed.
            for first in [0x41, 0x01, 0x11] {
                let input = connections(&block(first, huffman, authority));
                let expected = connections(&block(first, huffman, expected));
                for (input, expected) in input.iter().zip(&expected) {
                    for piece in [1, 7, input.len()] {
                        assert_eq!(passed(input, piece), *expected, "{first:#x} {huffman}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_long_authority_has_its_length_in_several_bytes() {
        // 127 + 0x49 = 200 bytes, of a block in two frames.
        let begin = [&[0x41, 0x7f, 0x49][..], &[b'/'; 100]].concat();
        let end = [&[b'/'; 100][..], &[0x82]].concat();
        let input = connection(&[frame(HEADERS, 0, &begin), frame(CONTINUATION, 4, &end)]);
        let expected: Vec<u8> = input[PREFACE_BYTES..]
            .iter()
            .map(|byte| if *byte == b'/' { b'0' } else { *byte })
            .collect();
        assert_eq!(passed(&input, 1)[PREFACE_BYTES..], expected);
    }

    #[test]
    fn invalid_input_passes_unchanged() {
        // A length without an end.
        let endless = [&[0x41, 0x7f][..], &[0xff; 12], PATH].concat();
        let input = connection(&[frame(HEADERS, 4, &endless)]);
        assert_eq!(passed(&input, 3), input);
        // The frame after it is filtered again.
        let next = |authority: &[u8]| {
            let good = frame(HEADERS, 4, &block(0x41, false, authority));
            connection(&[frame(HEADERS, 4, &endless), good])
        };
        assert_eq!(passed(&next(b"/"), 5), next(b"0"));
        // Padding longer than its frame.
        let input = connection(&[frame(HEADERS, PADDED, &[9, 0x41, 1, b'/'])]);
        assert_eq!(passed(&input, 1), input);
        let mut seed = 1_u32;
        let noise = |_| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed.to_be_bytes()[0]
        };
        let noise: Vec<u8> = (0..100_000).map(noise).collect();
        assert_eq!(passed(&noise, 1), passed(&noise, noise.len()));
    }
}
