//! NBD on the wire: constants and fixed structures, all big-endian, exactly as the protocol's
//! own document (NetworkBlockDevice/nbd, `doc/proto.md`) has them.
//!
//! ```text
//! handshake     server hello, client flags, then options:
//!               [ magic | option | length ][ data ]  ->  [ magic | option | reply | length ][ data ]
//! transmission  [ request header ][ payload of a write ]
//!               ->  [ simple reply ][ data of a read ]           before STRUCTURED_REPLY
//!               ->  [ chunk header ][ offset, data | error | .. ] after it
//! ```

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// "NBDMAGIC", the first word of the server.
pub const HELLO_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": newstyle negotiation, and the magic of each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags: options may be refused without ending the connection.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flags: the 124 zeros after `EXPORT_NAME` may be left out.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;
/// Padding after the answer to `EXPORT_NAME`.
pub const EXPORT_NAME_PADDING: usize = 124;

/// Options of the handshake.
pub mod option {
    /// Choose an export and begin; refusing is only possible by closing.
    pub const EXPORT_NAME: u32 = 1;
    /// End the connection politely.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Upgrade the connection to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and begin.
    pub const GO: u32 = 7;
    /// Answer reads with structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts for `BLOCK_STATUS`.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options; those with the top bit set are errors.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One item of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// The option is known but forbidden here.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    /// The option's data is malformed, or it comes at the wrong time.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// Nothing but `STARTTLS` is answered in the clear.
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// The option's data is longer than the server accepts.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Items of information about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum length of a request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod export_flag {
    /// The flags field means something.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH` is served.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `FLAG_FUA` is served.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `TRIM` is served.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` is served.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `FLAG_DF` is served.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers the writes of all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `FLAG_FAST_ZERO` is served.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands of the transmission phase.
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
    /// Ask which parts of a range hold data.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a command.
pub mod command_flag {
    /// Durable before it is acknowledged.
    pub const FUA: u16 = 1 << 0;
    /// `WRITE_ZEROES`: keep the space allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// `READ`: one chunk only.
    pub const DF: u16 = 1 << 2;
    /// `BLOCK_STATUS`: one extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// `WRITE_ZEROES`: fail rather than be as slow as a write.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Flag of the last chunk of a structured reply.
pub const CHUNK_DONE: u16 = 1;

/// Types of chunks of a structured reply.
pub mod chunk {
    /// No content.
    pub const NONE: u16 = 0;
    /// Data of a read, behind its offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Extents of one metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// An errno and a text.
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// The metadata context that tells data from holes.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
/// What the server calls it.
pub const CONTEXT_ALLOCATION_ID: u32 = 1;
/// `base:allocation`: no storage stands behind the extent.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: the extent reads as zeros.
pub const STATE_ZERO: u32 = 2;

/// Errno values that the protocol knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum WireError {
    /// A write to a read-only export.
    Perm = 1,
    /// Anything that has no better name.
    Io = 5,
    /// Out of memory.
    NoMemory = 12,
    /// A malformed request.
    Invalid = 22,
    /// No room, or beyond the end.
    NoSpace = 28,
    /// A value too large.
    Overflow = 75,
    /// Not possible as asked.
    NotSupported = 95,
    /// The server is going away.
    Shutdown = 108,
}

impl WireError {
    /// What stands on the wire.
    #[must_use]
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// The wire's errno for one of the system's; unknown ones become `EIO`.
    #[must_use]
    pub const fn from_errno(errno: i32) -> Self {
        match errno {
            libc::EPERM | libc::EROFS | libc::EACCES => Self::Perm,
            libc::ENOMEM => Self::NoMemory,
            libc::EINVAL => Self::Invalid,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::NoSpace,
            libc::EOVERFLOW => Self::Overflow,
            libc::EOPNOTSUPP => Self::NotSupported,
            libc::ESHUTDOWN => Self::Shutdown,
            _ => Self::Io,
        }
    }
}

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident[$size:literal] { $($(#[$fdoc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        #[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name {
            $($(#[$fdoc])* pub $field: $type,)*
        }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

wire! {
    /// First words of the server.
    Hello[18] {
        /// [`HELLO_MAGIC`].
        magic: U64,
        /// [`OPTION_MAGIC`].
        option_magic: U64,
        /// Handshake flags.
        flags: U16,
    }
}
wire! {
    /// Head of an option.
    OptionHeader[16] {
        /// [`OPTION_MAGIC`].
        magic: U64,
        /// One of [`option`].
        option: U32,
        /// Bytes of data behind it.
        length: U32,
    }
}
wire! {
    /// Head of a reply to an option.
    OptionReply[20] {
        /// [`OPTION_REPLY_MAGIC`].
        magic: U64,
        /// The option that is answered.
        option: U32,
        /// One of [`reply`].
        reply: U32,
        /// Bytes of data behind it.
        length: U32,
    }
}
wire! {
    /// Answer to `EXPORT_NAME`.
    ExportNameAnswer[10] {
        /// Bytes of the export.
        size: U64,
        /// Transmission flags.
        flags: U16,
    }
}
wire! {
    /// `INFO_EXPORT`.
    InfoExport[12] {
        /// [`info::EXPORT`].
        kind: U16,
        /// Bytes of the export.
        size: U64,
        /// Transmission flags.
        flags: U16,
    }
}
wire! {
    /// `INFO_BLOCK_SIZE`.
    InfoBlockSize[14] {
        /// [`info::BLOCK_SIZE`].
        kind: U16,
        /// Least length and alignment.
        minimum: U32,
        /// Best length and alignment.
        preferred: U32,
        /// Largest length of a request with data.
        maximum: U32,
    }
}
wire! {
    /// Head of a request.
    RequestHeader[28] {
        /// [`REQUEST_MAGIC`].
        magic: U32,
        /// Of [`command_flag`].
        flags: U16,
        /// One of [`command`].
        command: U16,
        /// The client's name for the request.
        cookie: U64,
        /// First byte.
        offset: U64,
        /// Bytes.
        length: U32,
    }
}
wire! {
    /// Head of a simple reply.
    SimpleReply[16] {
        /// [`SIMPLE_REPLY_MAGIC`].
        magic: U32,
        /// 0 or a [`WireError`].
        error: U32,
        /// The request's.
        cookie: U64,
    }
}
wire! {
    /// Head of a chunk of a structured reply.
    ChunkHeader[20] {
        /// [`CHUNK_MAGIC`].
        magic: U32,
        /// [`CHUNK_DONE`] on the last.
        flags: U16,
        /// One of [`chunk`].
        kind: U16,
        /// The request's.
        cookie: U64,
        /// Bytes behind it.
        length: U32,
    }
}
wire! {
    /// Head of an error chunk's content.
    ChunkError[6] {
        /// A [`WireError`].
        error: U32,
        /// Bytes of text behind it.
        text_length: U16,
    }
}
wire! {
    /// One extent of a `BLOCK_STATUS` answer.
    Extent[8] {
        /// Bytes.
        length: U32,
        /// [`STATE_HOLE`] and [`STATE_ZERO`].
        state: U32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_bytes_of_the_standard() {
        let header = RequestHeader {
            magic: REQUEST_MAGIC.into(),
            flags: command_flag::FUA.into(),
            command: command::WRITE.into(),
            cookie: 0x0102_0304_0506_0708.into(),
            offset: 4096.into(),
            length: 512.into(),
        };
        let golden = [
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0,
            0, 0, 2, 0,
        ];
        assert_eq!(header.as_bytes(), golden);
    }

    #[test]
    fn unknown_errnos_become_eio() {
        assert_eq!(WireError::from_errno(libc::ENOSPC), WireError::NoSpace);
        assert_eq!(WireError::from_errno(libc::EOPNOTSUPP).code(), 95);
        assert_eq!(WireError::from_errno(libc::EBADF).code(), 5);
        assert_eq!(WireError::from_errno(0).code(), 5);
    }
}
