//! From the bytes of a request to something that may be done: every rule of the protocol about
//! what a client can ask is here, in one pure function, and nothing reaches a
//! [`crate::device::BlockDevice`] that has not passed it.
//!
//! ```text
//! magic wrong                          disconnect: the stream is out of step
//! payload > 64 MiB                     disconnect: not worth draining
//! unknown command or flag              EINVAL
//! write, trim, zeroes on read-only     EPERM
//! read, trim, status beyond the end    EINVAL
//! write, zeroes beyond the end         ENOSPC
//! not a multiple of 512                EINVAL
//! read or write > 32 MiB               EINVAL
//! flush with offset or length          EINVAL
//! fast and allocated zeroes            ENOTSUP
//! ```

use zerocopy::FromBytes;

use super::handshake::Negotiated;
use super::proto::{REQUEST_MAGIC, RequestHeader, WireError, command, command_flag};
use crate::device::{ZeroFlags, check_payload, check_range};
use crate::limits::REQUEST_BYTES_MAX;
use crate::units::SECTOR_BYTES;

/// Bytes of a refused write's payload that are drained; beyond it the connection ends.
pub const PAYLOAD_DRAIN_MAX: u32 = 2 * REQUEST_BYTES_MAX;

/// A request as it came in; not to be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The client's name for it.
    pub cookie: u64,
    /// One of [`command`], or anything else.
    pub command: u16,
    /// Of [`command_flag`], or anything else.
    pub flags: u16,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// The stream cannot be followed any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// The magic of a request is wrong.
    Magic,
    /// The payload of a write is larger than [`PAYLOAD_DRAIN_MAX`].
    Payload,
}

impl Broken {
    /// For the log.
    #[must_use]
    pub const fn what(self) -> &'static str {
        match self {
            Self::Magic => "the magic of a request is wrong",
            Self::Payload => "the payload of a write is beyond all bounds",
        }
    }
}

/// What an export is at the moment of a request.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Bytes; may have grown since the handshake.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// What the handshake agreed on.
    pub negotiated: Negotiated,
}

/// A request that may be done: aligned, inside the export, allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Nothing: an empty range.
    Nothing,
    /// Read data.
    Read,
    /// Write the payload.
    Write {
        /// Durable before it is acknowledged.
        fua: bool,
    },
    /// Make what was acknowledged durable.
    Flush,
    /// Unmap.
    Trim {
        /// Durable before it is acknowledged.
        fua: bool,
    },
    /// Make the range read as zeros.
    WriteZeroes(ZeroFlags),
    /// Report runs of data and holes.
    BlockStatus {
        /// One extent only.
        one: bool,
    },
}

impl Request {
    /// The request at the front of `bytes`, if it is there as a whole (payload aside).
    ///
    /// # Errors
    /// The stream is broken: the connection must end.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, Broken> {
        let Ok((header, _)) = RequestHeader::ref_from_prefix(bytes) else { return Ok(None) };
        if header.magic.get() != REQUEST_MAGIC {
            return Err(Broken::Magic);
        }
        let request = Self {
            cookie: header.cookie.get(),
            command: header.command.get(),
            flags: header.flags.get(),
            offset: header.offset.get(),
            len: header.length.get(),
        };
        if request.payload_bytes() > PAYLOAD_DRAIN_MAX {
            return Err(Broken::Payload);
        }
        Ok(Some(request))
    }

    /// Bytes that follow the header, whether or not the request will be refused.
    #[must_use]
    pub const fn payload_bytes(&self) -> u32 {
        if self.command == command::WRITE { self.len } else { 0 }
    }

    /// Decides whether the request may be done on `target`.
    ///
    /// # Errors
    /// The error to answer with.
    pub fn validate(&self, target: &Target) -> Result<Operation, WireError> {
        self.validate_flags(target.negotiated)?;
        let writes = matches!(self.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        if writes && target.read_only {
            return Err(WireError::Perm);
        }
        if self.command == command::FLUSH {
            let plain = self.offset == 0 && self.len == 0;
            return if plain { Ok(Operation::Flush) } else { Err(WireError::Invalid) };
        }
        self.validate_range(target.size_bytes)?;
        let fua = self.flag(command_flag::FUA);
        match self.command {
            command::READ | command::WRITE if check_payload(self.len).is_err() => {
                Err(WireError::Invalid)
            }
            command::BLOCK_STATUS if self.len == 0 => Err(WireError::Invalid),
            // An empty write has nothing to make durable either.
            _ if self.len == 0 => Ok(Operation::Nothing),
            command::READ => Ok(Operation::Read),
            command::WRITE => Ok(Operation::Write { fua }),
            command::TRIM => Ok(Operation::Trim { fua }),
            command::WRITE_ZEROES => {
                let no_hole = self.flag(command_flag::NO_HOLE);
                if no_hole && self.flag(command_flag::FAST_ZERO) {
                    // Unmapping is fast; writing zeros out is no faster than a write.
                    return Err(WireError::NotSupported);
                }
                Ok(Operation::WriteZeroes(ZeroFlags { fua, no_hole }))
            }
            _ => Ok(Operation::BlockStatus { one: self.flag(command_flag::REQ_ONE) }),
        }
    }

    const fn flag(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// The command is known and negotiated, and so are its flags. `FUA` is valid on all of them.
    const fn validate_flags(&self, negotiated: Negotiated) -> Result<(), WireError> {
        let allowed = match self.command {
            command::READ if negotiated.structured => command_flag::DF,
            command::READ | command::WRITE | command::FLUSH | command::TRIM => 0,
            command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
            command::BLOCK_STATUS if negotiated.allocation => command_flag::REQ_ONE,
            _ => return Err(WireError::Invalid),
        };
        if self.flags & !(allowed | command_flag::FUA) != 0 {
            return Err(WireError::Invalid);
        }
        Ok(())
    }

    fn validate_range(&self, size_bytes: u64) -> Result<(), WireError> {
        let len = u64::from(self.len);
        if !self.offset.is_multiple_of(SECTOR_BYTES) || !len.is_multiple_of(SECTOR_BYTES) {
            return Err(WireError::Invalid);
        }
        let beyond = match self.command {
            command::WRITE | command::WRITE_ZEROES => WireError::NoSpace,
            _ => WireError::Invalid,
        };
        check_range(size_bytes, self.offset, len).map(|_| ()).map_err(|_| beyond)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    const SIZE: u64 = 1 << 20;

    fn target() -> Target {
        let negotiated = Negotiated { structured: true, allocation: true };
        Target { size_bytes: SIZE, read_only: false, negotiated }
    }

    fn request(command: u16, flags: u16, offset: u64, len: u32) -> Request {
        Request { cookie: 9, command, flags, offset, len }
    }

    fn check(command: u16, flags: u16, offset: u64, len: u32) -> Result<Operation, WireError> {
        request(command, flags, offset, len).validate(&target())
    }

    fn bytes(magic: u32, command: u16, length: u32) -> Vec<u8> {
        RequestHeader {
            magic: magic.into(),
            flags: 0.into(),
            command: command.into(),
            cookie: 9.into(),
            offset: 512.into(),
            length: length.into(),
        }
        .as_bytes()
        .to_vec()
    }

    #[test]
    fn parses_whole_headers_only() {
        let whole = bytes(REQUEST_MAGIC, command::READ, 4096);
        for cut in 0..whole.len() {
            assert_eq!(Request::parse(&whole[..cut]), Ok(None));
        }
        let parsed = Request::parse(&whole).unwrap().unwrap();
        assert_eq!(parsed, request(command::READ, 0, 512, 4096));
        assert_eq!(parsed.payload_bytes(), 0);
    }

    #[test]
    fn a_stream_out_of_step_is_broken() {
        assert_eq!(Request::parse(&bytes(1, command::READ, 512)), Err(Broken::Magic));
        let huge = PAYLOAD_DRAIN_MAX + 1;
        let write = bytes(REQUEST_MAGIC, command::WRITE, huge);
        assert_eq!(Request::parse(&write), Err(Broken::Payload));
        // Only a write has a payload.
        assert!(Request::parse(&bytes(REQUEST_MAGIC, command::TRIM, huge)).is_ok());
        assert!(Request::parse(&bytes(REQUEST_MAGIC, command::WRITE, huge - 1)).is_ok());
    }

    #[test]
    fn what_is_allowed() {
        let flags = command_flag::FUA;
        assert_eq!(check(command::READ, 0, 0, 4096), Ok(Operation::Read));
        assert_eq!(check(command::READ, command_flag::DF, 0, 512), Ok(Operation::Read));
        assert_eq!(check(command::WRITE, 0, 0, 512), Ok(Operation::Write { fua: false }));
        assert_eq!(check(command::WRITE, flags, 512, 512), Ok(Operation::Write { fua: true }));
        assert_eq!(check(command::FLUSH, 0, 0, 0), Ok(Operation::Flush));
        assert_eq!(check(command::TRIM, flags, 0, 1 << 20), Ok(Operation::Trim { fua: true }));
        let fast = check(command::WRITE_ZEROES, command_flag::FAST_ZERO, 0, 512);
        assert_eq!(fast, Ok(Operation::WriteZeroes(ZeroFlags::default())));
        let kept = check(command::WRITE_ZEROES, command_flag::NO_HOLE | flags, 0, 512);
        let zero_flags = ZeroFlags { fua: true, no_hole: true };
        assert_eq!(kept, Ok(Operation::WriteZeroes(zero_flags)));
        let one = check(command::BLOCK_STATUS, command_flag::REQ_ONE, 0, 512);
        assert_eq!(one, Ok(Operation::BlockStatus { one: true }));
        for command in [command::READ, command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(check(command, 0, SIZE, 0), Ok(Operation::Nothing));
        }
    }

    #[test]
    fn beyond_the_end() {
        for (offset, len) in [
            (SIZE, 512),
            (SIZE - 512, 1024),
            (SIZE + 512, 0),
            (u64::MAX - 511, 1024),
            (1 << 63, 512),
        ] {
            for command in [command::READ, command::TRIM, command::BLOCK_STATUS] {
                assert_eq!(check(command, 0, offset, len), Err(WireError::Invalid));
            }
            for command in [command::WRITE, command::WRITE_ZEROES] {
                assert_eq!(check(command, 0, offset, len), Err(WireError::NoSpace));
            }
        }
    }

    #[test]
    fn misaligned() {
        let ranged = [
            command::READ,
            command::WRITE,
            command::TRIM,
            command::WRITE_ZEROES,
            command::BLOCK_STATUS,
        ];
        for command in ranged {
            for (offset, len) in [(1, 512), (0, 511), (256, 256), (511, 1)] {
                assert_eq!(check(command, 0, offset, len), Err(WireError::Invalid));
            }
        }
    }

    #[test]
    fn unknown_commands_and_flags() {
        for command in [command::DISCONNECT, 5, 8, 9, 0xffff] {
            assert_eq!(check(command, 0, 0, 512), Err(WireError::Invalid));
        }
        for (command, wrong) in [
            (command::READ, command_flag::NO_HOLE),
            (command::READ, 1 << 5),
            (command::WRITE, command_flag::DF),
            (command::WRITE, command_flag::FAST_ZERO),
            (command::FLUSH, command_flag::REQ_ONE),
            (command::TRIM, command_flag::NO_HOLE),
            (command::WRITE_ZEROES, command_flag::REQ_ONE),
            (command::BLOCK_STATUS, command_flag::DF),
            (command::READ, 1 << 15),
        ] {
            let len = if command == command::FLUSH { 0 } else { 512 };
            assert_eq!(check(command, wrong, 0, len), Err(WireError::Invalid), "{command} {wrong}");
        }
        // Not without their negotiation.
        let plain = Target { negotiated: Negotiated::default(), ..target() };
        let status = request(command::BLOCK_STATUS, 0, 0, 512);
        assert_eq!(status.validate(&plain), Err(WireError::Invalid));
        let fragment = request(command::READ, command_flag::DF, 0, 512);
        assert_eq!(fragment.validate(&plain), Err(WireError::Invalid));
    }

    #[test]
    fn read_only_and_oversized_and_odd() {
        let frozen = Target { read_only: true, ..target() };
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(request(command, 0, 0, 512).validate(&frozen), Err(WireError::Perm));
        }
        assert_eq!(request(command::FLUSH, 0, 0, 0).validate(&frozen), Ok(Operation::Flush));
        let large = Target { size_bytes: 1 << 40, ..target() };
        let over = REQUEST_BYTES_MAX + 512;
        assert_eq!(request(command::READ, 0, 0, over).validate(&large), Err(WireError::Invalid));
        assert_eq!(request(command::WRITE, 0, 0, over).validate(&large), Err(WireError::Invalid));
        assert!(request(command::TRIM, 0, 0, 0xffff_fe00).validate(&large).is_ok());
        assert_eq!(check(command::FLUSH, 0, 0, 512), Err(WireError::Invalid));
        assert_eq!(check(command::FLUSH, 0, 512, 0), Err(WireError::Invalid));
        assert_eq!(check(command::BLOCK_STATUS, 0, 0, 0), Err(WireError::Invalid));
        let both = command_flag::NO_HOLE | command_flag::FAST_ZERO;
        assert_eq!(check(command::WRITE_ZEROES, both, 0, 512), Err(WireError::NotSupported));
    }
}
