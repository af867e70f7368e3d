//! A small blocking NBD client, written against the protocol's document and sharing nothing with
//! the server, so that both cannot be wrong in the same way.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISCONNECT: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const BLOCK_STATUS: u16 = 7;

pub(crate) const FUA: u16 = 1;
pub(crate) const NO_HOLE: u16 = 2;
pub(crate) const REQ_ONE: u16 = 8;
pub(crate) const FAST_ZERO: u16 = 16;

/// What a request was answered with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    Data(Vec<u8>),
    /// Length and state.
    Extents(Vec<(u32, u32)>),
    Error(u32),
}

pub(crate) struct Client {
    pub(crate) socket: UnixStream,
    pub(crate) structured: bool,
    pub(crate) size: u64,
    pub(crate) flags: u16,
}

impl Client {
    /// A connection behind the flags, before any option.
    pub(crate) fn connect(path: &Path) -> Self {
        let mut socket = UnixStream::connect(path).unwrap();
        // A server that hangs fails the test.
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut hello = [0; 18];
        socket.read_exact(&mut hello).unwrap();
        assert_eq!(hello, *b"NBDMAGICIHAVEOPT\0\x03");
        socket.write_all(&3_u32.to_be_bytes()).unwrap();
        Self { socket, structured: false, size: 0, flags: 0 }
    }

    /// A connection in transmission.
    pub(crate) fn open(path: &Path, name: &str, structured: bool) -> Self {
        let mut client = Self::connect(path);
        let mut named = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
        named.extend_from_slice(name.as_bytes());
        if structured {
            assert_eq!(client.option(8, &[]).last().unwrap().0, 1);
            client.structured = true;
            let queries = [&named[..], &[0, 0, 0, 1, 0, 0, 0, 15], b"base:allocation"].concat();
            assert_eq!(client.option(10, &queries).last().unwrap().0, 1);
        }
        let answers = client.option(7, &[&named[..], &[0, 0]].concat());
        assert_eq!(answers.last().unwrap().0, 1);
        let export = &answers[0].1;
        client.size = u64::from_be_bytes(export[2..10].try_into().unwrap());
        client.flags = u16::from_be_bytes(export[10..12].try_into().unwrap());
        client
    }

    /// Sends an option; its replies up to the last.
    pub(crate) fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut message = b"IHAVEOPT".to_vec();
        message.extend(option.to_be_bytes());
        message.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        message.extend_from_slice(data);
        self.socket.write_all(&message).unwrap();
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.u64(), 0x0003_e889_0455_65a9);
            assert_eq!(self.u32(), option);
            let reply = self.u32();
            let length = self.u32();
            replies.push((reply, self.bytes(length)));
            if reply == 1 || reply >> 31 == 1 {
                return replies;
            }
        }
    }

    /// The bytes of a request without payload.
    pub(crate) fn header(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
        let mut header = 0x2560_9513_u32.to_be_bytes().to_vec();
        header.extend(flags.to_be_bytes());
        header.extend(command.to_be_bytes());
        header.extend(cookie.to_be_bytes());
        header.extend(offset.to_be_bytes());
        header.extend(len.to_be_bytes());
        header
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// One request and its outcome.
    pub(crate) fn ask(&mut self, command: u16, flags: u16, offset: u64, len: u32) -> Outcome {
        self.send(&Self::header(command, flags, 77, offset, len));
        let (cookie, outcome) = self.reply(if command == READ { len } else { 0 });
        assert_eq!(cookie, 77);
        outcome
    }

    pub(crate) fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> Outcome {
        let len = u32::try_from(data.len()).unwrap();
        self.send(&Self::header(WRITE, flags, 78, offset, len));
        self.send(data);
        let (cookie, outcome) = self.reply(0);
        assert_eq!(cookie, 78);
        outcome
    }

    pub(crate) fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        match self.ask(READ, 0, offset, len) {
            Outcome::Data(data) => data,
            other => panic!("read of {len} at {offset}: {other:?}"),
        }
    }

    /// The next reply: its cookie and outcome. `read_len` is what a simple reply carries.
    pub(crate) fn reply(&mut self, read_len: u32) -> (u64, Outcome) {
        match self.u32() {
            0x6744_6698 => {
                let error = self.u32();
                let cookie = self.u64();
                let outcome = match (error, read_len) {
                    (0, 0) => Outcome::Done,
                    (0, _) => Outcome::Data(self.bytes(read_len)),
                    (error, _) => Outcome::Error(error),
                };
                (cookie, outcome)
            }
            0x668e_33ef => {
                assert!(self.structured, "structured replies were not asked for");
                self.chunk()
            }
            magic => panic!("a reply begins with {magic:#x}"),
        }
    }

    fn chunk(&mut self) -> (u64, Outcome) {
        let (flags, kind) = (self.u16(), self.u16());
        assert_eq!(flags, 1, "every reply is one chunk");
        let cookie = self.u64();
        let length = self.u32();
        let outcome = match kind {
            0 => {
                assert_eq!(length, 0);
                Outcome::Done
            }
            1 => {
                self.u64();
                Outcome::Data(self.bytes(length - 8))
            }
            5 => {
                assert_eq!(self.u32(), 1, "the context's id");
                assert!(length >= 12 && (length - 4).is_multiple_of(8));
                let count = (length - 4) / 8;
                Outcome::Extents((0..count).map(|_| (self.u32(), self.u32())).collect())
            }
            0x8001 => {
                let error = self.u32();
                let text = self.u16();
                assert_eq!(u32::from(text), length - 6);
                str::from_utf8(&self.bytes(text.into())).unwrap();
                Outcome::Error(error)
            }
            kind => panic!("a chunk of type {kind}"),
        };
        (cookie, outcome)
    }

    /// Asserts that the server has closed the connection without another word.
    pub(crate) fn expect_closed(&mut self) {
        match self.socket.read(&mut [0; 1]) {
            Ok(0) => {}
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("the connection is not closed: {other:?}"),
        }
    }

    fn bytes(&mut self, count: u32) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(count).unwrap()];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.bytes(2).try_into().unwrap())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.bytes(8).try_into().unwrap())
    }
}
