//! One client's end of a connection, with a parser of replies of its own.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use futures_util::future::join;
use rustix::net::{Shutdown, shutdown};

use super::Setting;
use super::request::{Expected, Request};
use pando_engine::runtime::reactor::{SendPart, recv, send};
use pando_engine::units::{to_u32, to_u64, to_usize};

/// Bytes received at once.
const PIECE: usize = 1 << 14;

/// What a reply is.
#[derive(Debug)]
pub(super) enum Said {
    Done,
    Data(Vec<u8>),
    Extents(Vec<(u64, u32)>),
    Error(u32),
}

/// One client's end of a connection.
pub(super) struct Near {
    socket: Arc<OwnedFd>,
    received: Vec<u8>,
    structured: bool,
    pub(super) over: bool,
}

/// Replies by their cookies.
pub(super) type Replies = BTreeMap<u64, Said>;

impl Near {
    pub(super) const fn new(socket: Arc<OwnedFd>, structured: bool) -> Self {
        Self { socket, received: Vec::new(), structured, over: false }
    }

    /// More bytes; false at the end of the stream.
    async fn more(&mut self) -> bool {
        let (bytes, result) = recv(&self.socket, vec![0; PIECE], 0..PIECE).await;
        let count = match result {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => panic!("{error}"),
        };
        self.received.extend_from_slice(&bytes[..count]);
        count > 0
    }

    async fn take(&mut self, len: usize) -> Option<Vec<u8>> {
        while self.received.len() < len {
            if !self.more().await {
                return None;
            }
        }
        let rest = self.received.split_off(len);
        Some(std::mem::replace(&mut self.received, rest))
    }

    async fn number(&mut self, len: usize) -> Option<u64> {
        Some(self.take(len).await?.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    }

    pub(super) async fn handshake(&mut self, size: u64) {
        let option = |number: u32, data: &[u8]| {
            let len = to_u32(to_u64(data.len())).to_be_bytes();
            [&b"IHAVEOPT"[..], &number.to_be_bytes(), &len, data].concat()
        };
        let name = [&[0, 0, 0, 4], &b"disk"[..]].concat();
        let mut said = 3_u32.to_be_bytes().to_vec();
        if self.structured {
            let context = [&[0, 0, 0, 1, 0, 0, 0, 15], &b"base:allocation"[..]].concat();
            said.extend(option(8, &[]));
            said.extend(option(10, &[&name[..], &context].concat()));
        }
        said.extend(option(7, &[&name[..], &[0, 0]].concat()));
        send(&self.socket, vec![SendPart::Bytes(said)]).await.1.expect("a server");
        let hello = self.take(18).await.expect("a hello");
        assert_eq!(hello, *b"NBDMAGICIHAVEOPT\0\x03");
        loop {
            assert_eq!(self.number(8).await, Some(0x0003_e889_0455_65a9));
            let mut head = [0; 3];
            for word in &mut head {
                *word = self.number(4).await.expect("a reply");
            }
            let [option, reply, len] = head;
            let data = self.take(to_usize(len)).await.expect("a whole reply");
            assert!(reply < 1 << 31, "option {option} is refused");
            if (option, reply) == (7, 3) && data[..2] == [0, 0] {
                assert_eq!(data[2..10], size.to_be_bytes(), "the size");
            }
            if (option, reply) == (7, 1) {
                return;
            }
        }
    }

    /// Sends the requests of a round and takes a reply for each that is whole.
    pub(super) async fn ask(&mut self, requests: &[Request], setting: &Setting) -> Replies {
        let bytes: Vec<u8> = requests.iter().flat_map(|request| request.sent.clone()).collect();
        let breaks = requests.last().is_some_and(|request| request.breaks);
        let socket = Arc::clone(&self.socket);
        let asking = async move {
            drop(send(&socket, vec![SendPart::Bytes(bytes)]).await);
            if breaks {
                // Nothing comes behind it. The server may be gone by now.
                let _gone = shutdown(&socket, Shutdown::Write);
            }
        };
        let (replies, ()) = join(Box::pin(self.replies(requests, setting)), asking).await;
        if breaks {
            self.end().await;
        }
        replies
    }

    async fn replies(&mut self, requests: &[Request], setting: &Setting) -> Replies {
        let whole: Vec<&Request> = requests.iter().filter(|request| !request.breaks).collect();
        let mut replies = Replies::new();
        while replies.len() < whole.len() {
            let magic = self.number(4).await.expect("a reply to every request that is whole");
            let simple = match magic {
                0x6744_6698 => true,
                0x668e_33ef => false,
                _ => panic!("the magic of a reply is {magic:#x}"),
            };
            // An error, or flags and type.
            let kind = self.number(4).await.expect("a whole head");
            let cookie = self.number(8).await.expect("a cookie");
            let request = whole.iter().find(|request| request.cookie == cookie);
            let request = request.unwrap_or_else(|| panic!("{cookie:#x} was not asked for"));
            let expected = request.expected(setting, self.structured);
            let said = if simple {
                self.simple(request, kind, expected).await
            } else {
                self.chunk(request, kind).await
            };
            match (expected, &said) {
                (Expected::Error(code), Said::Error(is)) => assert_eq!(*is, code, "{request:?}"),
                (Expected::Done, Said::Done)
                | (Expected::Data, Said::Data(_))
                | (Expected::Extents, Said::Extents(_)) => {}
                _ => panic!("{request:?} is answered with {said:?}, not {expected:?}"),
            }
            assert!(replies.insert(cookie, said).is_none(), "{request:?} is answered twice");
        }
        replies
    }

    /// A simple reply. With structured replies on, only a success without data may be one.
    async fn simple(&mut self, request: &Request, error: u64, expected: Expected) -> Said {
        let plain = error == 0 && expected == Expected::Done;
        assert!(!self.structured || plain, "{request:?} has a simple reply");
        if error > 0 {
            return Said::Error(to_u32(error));
        }
        if request.command != 0 {
            return Said::Done;
        }
        let len = to_usize(request.len.into());
        Said::Data(self.take(len).await.expect("the data of a read"))
    }

    /// A structured reply, which has one chunk.
    async fn chunk(&mut self, request: &Request, kind: u64) -> Said {
        assert!(self.structured, "structured replies were not asked for");
        assert_eq!(kind >> 16, 1, "{request:?}: flags of the chunk");
        let len = to_usize(self.number(4).await.expect("a length"));
        let content = self.take(len).await.expect("a whole chunk");
        let number = |at: usize, len: usize| {
            content[at..at + len].iter().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
        };
        match kind & 0xFFFF {
            0 => {
                assert!(content.is_empty() && request.len == 0, "{request:?}");
                Said::Data(vec![])
            }
            1 => {
                assert_eq!(number(0, 8), request.offset, "{request:?}");
                Said::Data(content[8..].to_vec())
            }
            5 => {
                assert!(number(0, 4) == 1 && len % 8 == 4, "{request:?}");
                let starts = (4..len).step_by(8);
                Said::Extents(starts.map(|at| (number(at, 4), to_u32(number(at + 4, 4)))).collect())
            }
            0x8001 => {
                assert_eq!(to_usize(number(4, 2)), len - 6, "{request:?}");
                assert!(len - 6 <= 4096 && str::from_utf8(&content[6..]).is_ok());
                Said::Error(to_u32(number(0, 4)))
            }
            kind => panic!("{request:?}: a chunk of type {kind}"),
        }
    }

    /// Nothing is said any more, by either side.
    pub(super) async fn end(&mut self) {
        if !std::mem::replace(&mut self.over, true) {
            let _gone = shutdown(&self.socket, Shutdown::Write);
            while self.more().await {}
            assert!(self.received.is_empty(), "more than there were requests");
        }
    }
}
