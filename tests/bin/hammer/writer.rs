//! A connection that asks for writes, zeros, discards and flushes at random until the daemon is
//! gone, and writes down what was acknowledged.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use pando_tests::Nbd;
use pando_tests::nbd::{FUA, command};
use pando_tests::noise::Noise;

use crate::log::{BLOCK_SECTORS, Content, Log, SECTOR, bytes};

/// Requests under way on each connection.
const DEPTH: usize = 16;
/// Longest request in sectors.
const SECTORS_MAX: u64 = 64;
/// What a server that is told to end may answer: ESHUTDOWN.
const SHUTDOWN: u32 = 108;

/// A request under way.
struct Flying {
    start: u64,
    len: u64,
    /// Its number in the log; a flush has none.
    request: Option<usize>,
}

/// What a connection has done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Load {
    pub(crate) acknowledged: u64,
    pub(crate) under_way: u64,
}

/// Writes at random into a part of a volume that is its own.
pub(crate) struct Writer {
    log: Arc<Log>,
    /// First sector and number of sectors.
    part: (u64, u64),
    noise: Noise,
    stamp: u64,
    flying: HashMap<u64, Flying>,
    load: Load,
}

impl Writer {
    /// `stamp` is what the stamps of its writes begin with.
    pub(crate) fn new(log: Arc<Log>, part: (u64, u64), seed: u64, stamp: u64) -> Self {
        let noise = Noise::new(seed);
        Self { log, part, noise, stamp, flying: HashMap::new(), load: Load::default() }
    }

    /// Until the connection ends. An errno is a failure, except that of a server that `may_end`.
    pub(crate) fn run(mut self, socket: &Path, name: &str, may_end: bool) -> Result<Load, String> {
        let Ok(mut nbd) = Nbd::open(socket, name) else { return Ok(self.load) };
        loop {
            while self.flying.len() < DEPTH {
                if self.send(&mut nbd).is_err() {
                    return Ok(self.end());
                }
            }
            match nbd.receive() {
                Ok((cookie, Ok(()))) => self.acknowledged(cookie)?,
                Ok((_, Err(SHUTDOWN))) if may_end => return Ok(self.end()),
                Ok((_, Err(errno))) => return Err(format!("{name}: errno {errno}")),
                Err(_) => return Ok(self.end()),
            }
        }
    }

    fn end(&self) -> Load {
        let under_way = self.flying.len().try_into().expect("few");
        Load { under_way, ..self.load }
    }

    /// Sends one request, or none if what was chosen is busy.
    fn send(&mut self, nbd: &mut Nbd) -> io::Result<()> {
        self.stamp += 1;
        let cookie = self.stamp;
        let kind = self.noise.below(24);
        if kind == 0 {
            self.flying.insert(cookie, Flying { start: 0, len: 0, request: None });
            return nbd.send((command::FLUSH, 0), cookie, (0, 0), &[]);
        }
        let (asked, content) = match kind {
            1 | 2 => (command::WRITE_ZEROES, Content::Zeros),
            3 | 4 => (command::TRIM, Content::Zeros),
            _ => (command::WRITE, Content::Stamp(self.stamp)),
        };
        // What is discarded is zeros block by block: of a part of a block nothing is promised.
        let Some((start, len)) = self.choose(asked == command::TRIM) else { return Ok(()) };
        let request = Some(self.log.send((start, len), content));
        self.flying.insert(cookie, Flying { start, len, request });
        let data = match content {
            Content::Zeros => Vec::new(),
            Content::Stamp(_) => bytes(self.log.volume, start, len, content),
        };
        let flags = if kind % 2 == 1 && kind < 10 { FUA } else { 0 };
        let range = (start * SECTOR, u32::try_from(len * SECTOR).expect("short"));
        nbd.send((asked, flags), cookie, range, &data)
    }

    /// A range in which nothing is under way, so that the order of events is known: often whole
    /// blocks, sometimes parts of them.
    fn choose(&mut self, whole: bool) -> Option<(u64, u64)> {
        let mut len = match self.noise.below(4) {
            0 => 1 + self.noise.below(SECTORS_MAX),
            1 => SECTORS_MAX,
            _ => BLOCK_SECTORS,
        };
        if whole {
            len = len.next_multiple_of(BLOCK_SECTORS);
        }
        let mut start = self.noise.below(self.part.1 - len);
        if len.is_multiple_of(BLOCK_SECTORS) {
            start -= start % BLOCK_SECTORS;
        }
        let start = self.part.0 + start;
        let overlaps =
            |other: &Flying| start < other.start + other.len && other.start < start + len;
        (!self.flying.values().any(overlaps)).then_some((start, len))
    }

    fn acknowledged(&mut self, cookie: u64) -> Result<(), String> {
        let Some(done) = self.flying.remove(&cookie) else {
            return Err(format!("an answer to {cookie:#x}, which is not under way"));
        };
        self.load.acknowledged += 1;
        if let Some(request) = done.request {
            self.log.acknowledged(request);
        }
        Ok(())
    }
}
