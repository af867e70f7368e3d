//! A blocking NBD client, written against the protocol's document. It shares nothing with the
//! server, so that both cannot be wrong in the same way, and it can send what no good client does.
//!
//! Fixed newstyle, simple replies: the part that every server and client has. What the server
//! offers beyond it is tested with the clients of others.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Commands.
pub mod command {
    /// Read data.
    pub const READ: u16 = 0;
    /// Write data.
    pub const WRITE: u16 = 1;
    /// End the connection.
    pub const DISCONNECT: u16 = 2;
    /// Make what was acknowledged durable.
    pub const FLUSH: u16 = 3;
    /// The data of a range is needed no more.
    pub const TRIM: u16 = 4;
    /// Make a range read as zeros.
    pub const WRITE_ZEROES: u16 = 6;
}

/// Flag: durable before it is acknowledged.
pub const FUA: u16 = 1;
/// Option: choose an export and begin.
const OPTION_GO: u32 = 7;
/// A server that hangs fails the test.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to an export.
pub struct Nbd {
    socket: UnixStream,
    /// Bytes of the export.
    pub size: u64,
    /// Its transmission flags.
    pub flags: u16,
}

/// What a request was answered with: `Err` is the server's errno.
pub type Answer<T> = Result<T, u32>;

impl Nbd {
    /// A connection behind the greeting, before any option.
    ///
    /// # Errors
    /// The socket's.
    ///
    /// # Panics
    /// The greeting is not that of an NBD server.
    pub fn greet(path: &Path) -> io::Result<Self> {
        let mut socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let mut hello = [0; 18];
        socket.read_exact(&mut hello)?;
        assert_eq!(hello, *b"NBDMAGICIHAVEOPT\0\x03", "the greeting");
        socket.write_all(&3_u32.to_be_bytes())?;
        Ok(Self { socket, size: 0, flags: 0 })
    }

    /// A connection to the export `name`.
    ///
    /// # Errors
    /// The socket's; `NotFound` when the server refuses.
    ///
    /// # Panics
    /// The server speaks something else.
    pub fn open(path: &Path, name: &str) -> io::Result<Self> {
        let mut nbd = Self::greet(path)?;
        let mut data = u32::try_from(name.len()).expect("short").to_be_bytes().to_vec();
        data.extend_from_slice(name.as_bytes());
        data.extend_from_slice(&0_u16.to_be_bytes());
        nbd.send_option(OPTION_GO, &data)?;
        loop {
            let (kind, data) = nbd.option_reply()?;
            match kind {
                1 => return Ok(nbd),
                3 if data[..2] == [0, 0] => {
                    nbd.size = u64::from_be_bytes(data[2..10].try_into().expect("8 bytes"));
                    nbd.flags = u16::from_be_bytes(data[10..12].try_into().expect("2 bytes"));
                }
                3 => {}
                refused => {
                    let text = String::from_utf8_lossy(&data).into_owned();
                    let what = format!("{refused:#x} {text}");
                    return Err(io::Error::new(io::ErrorKind::NotFound, what));
                }
            }
        }
    }

    /// Sends an option.
    ///
    /// # Errors
    /// The socket's.
    ///
    /// # Panics
    /// The data is longer than 4 GiB.
    pub fn send_option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let length = u32::try_from(data.len()).expect("short");
        self.raw(&[b"IHAVEOPT", &option.to_be_bytes()[..], &length.to_be_bytes(), data].concat())
    }

    /// One reply to an option: kind and data.
    ///
    /// # Errors
    /// The socket's; `InvalidData` for bytes that are no reply.
    ///
    /// # Panics
    /// Never.
    pub fn option_reply(&mut self) -> io::Result<(u32, Vec<u8>)> {
        let mut header = [0; 20];
        self.socket.read_exact(&mut header)?;
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        if header[..8] != 0x0003_e889_0455_65a9_u64.to_be_bytes() || word(16) > 1 << 20 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut data = vec![0; usize::try_from(word(16)).expect("bounded")];
        self.socket.read_exact(&mut data)?;
        Ok((word(12), data))
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The socket's.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Whether the server closes the connection, and sends nothing before that.
    pub fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        !matches!(self.socket.read(&mut byte), Ok(1..))
    }

    /// Sends a request; its answer is fetched by [`Self::receive`].
    ///
    /// # Errors
    /// The socket's.
    pub fn send(
        &mut self,
        (command, flags): (u16, u16),
        cookie: u64,
        (offset, len): (u64, u32),
        payload: &[u8],
    ) -> io::Result<()> {
        let mut request = Vec::with_capacity(28 + payload.len());
        request.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
        request.extend_from_slice(&flags.to_be_bytes());
        request.extend_from_slice(&command.to_be_bytes());
        request.extend_from_slice(&cookie.to_be_bytes());
        request.extend_from_slice(&offset.to_be_bytes());
        request.extend_from_slice(&len.to_be_bytes());
        request.extend_from_slice(payload);
        self.raw(&request)
    }

    /// The next answer: cookie and outcome, without the data of a read.
    ///
    /// # Errors
    /// The socket's; `InvalidData` for bytes that are no answer.
    ///
    /// # Panics
    /// Never.
    pub fn receive(&mut self) -> io::Result<(u64, Answer<()>)> {
        let mut header = [0; 16];
        self.socket.read_exact(&mut header)?;
        if header[..4] != 0x6744_6698_u32.to_be_bytes() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let errno = u32::from_be_bytes(header[4..8].try_into().expect("4 bytes"));
        let cookie = u64::from_be_bytes(header[8..].try_into().expect("8 bytes"));
        Ok((cookie, if errno == 0 { Ok(()) } else { Err(errno) }))
    }

    fn call(
        &mut self,
        command: (u16, u16),
        range: (u64, u32),
        payload: &[u8],
    ) -> io::Result<Answer<()>> {
        let cookie = 0x70 ^ range.0;
        self.send(command, cookie, range, payload)?;
        let (answered, outcome) = self.receive()?;
        assert_eq!(answered, cookie, "the answer to another request");
        Ok(outcome)
    }

    /// Reads; the answer or the server's errno.
    ///
    /// # Errors
    /// The socket's.
    ///
    /// # Panics
    /// Never.
    pub fn try_read(&mut self, offset: u64, len: u32) -> io::Result<Answer<Vec<u8>>> {
        Ok(match self.call((command::READ, 0), (offset, len), &[])? {
            Ok(()) => {
                let mut data = vec![0; usize::try_from(len).expect("64 bits")];
                self.socket.read_exact(&mut data)?;
                Ok(data)
            }
            Err(errno) => Err(errno),
        })
    }

    /// Writes; the server's errno if it refuses.
    ///
    /// # Errors
    /// The socket's.
    ///
    /// # Panics
    /// The data is longer than 4 GiB.
    pub fn try_write(&mut self, offset: u64, data: &[u8], flags: u16) -> io::Result<Answer<()>> {
        let len = u32::try_from(data.len()).expect("short");
        self.call((command::WRITE, flags), (offset, len), data)
    }

    /// A request without data.
    ///
    /// # Errors
    /// The socket's.
    pub fn try_simple(&mut self, command: u16, range: (u64, u32)) -> io::Result<Answer<()>> {
        self.call((command, 0), range, &[])
    }

    /// Reads what must be readable.
    ///
    /// # Panics
    /// It is not.
    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        let answer = self.try_read(offset, len).expect("a connection");
        answer.unwrap_or_else(|errno| panic!("read of {len} at {offset}: errno {errno}"))
    }

    /// Writes what must be writable.
    ///
    /// # Panics
    /// It is not.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let answer = self.try_write(offset, data, 0).expect("a connection");
        answer.unwrap_or_else(|errno| panic!("write at {offset}: errno {errno}"));
    }

    /// Discards, write-zeroes or flushes what must work.
    ///
    /// # Panics
    /// It does not.
    pub fn simple(&mut self, command: u16, range: (u64, u32)) {
        let answer = self.try_simple(command, range).expect("a connection");
        answer.unwrap_or_else(|errno| panic!("command {command} at {range:?}: errno {errno}"));
    }

    /// Makes durable what was written.
    ///
    /// # Panics
    /// It cannot be.
    pub fn flush(&mut self) {
        self.simple(command::FLUSH, (0, 0));
    }

    /// Ends the connection politely.
    pub fn close(mut self) {
        self.send((command::DISCONNECT, 0), 0, (0, 0), &[]).unwrap_or_default();
        while !self.is_closed() {}
    }
}
