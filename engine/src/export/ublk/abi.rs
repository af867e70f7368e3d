//! The kernel's side of ublk: commands, structures, places. Source: `include/uapi/linux/ublk_cmd.h`
//! and `Documentation/block/ublk.rst` of Linux.
//!
//! ```text
//! /dev/ublk-control   one command for all devices: a 128-byte entry that holds CtrlCmd, which
//!                     points to DevInfo, Params or a bit mask
//! /dev/ublkcN         queue commands in ordinary entries that hold IoCmd; mapped: IoDesc of each
//!                     queue and tag; pread and pwrite: the data of the request of a queue and tag
//! /dev/ublkbN         the block device
//! ```
//!
//! Integers are in the machine's own byte order.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An ioctl-like number: direction, size of the argument, type `u`, number.
const fn command(direction: u32, bytes: u32, number: u32) -> u32 {
    direction << 30 | bytes << 16 | 0x75 << 8 | number
}

/// Commands for `/dev/ublk-control`; all carry a [`CtrlCmd`].
pub(super) mod ctrl {
    use super::command;

    const READ: u32 = 2;
    const READ_WRITE: u32 = 3;

    pub(crate) const GET_DEV_INFO: u32 = command(READ, 32, 0x02);
    pub(crate) const ADD_DEV: u32 = command(READ_WRITE, 32, 0x04);
    pub(crate) const DEL_DEV: u32 = command(READ_WRITE, 32, 0x05);
    pub(crate) const START_DEV: u32 = command(READ_WRITE, 32, 0x06);
    pub(crate) const STOP_DEV: u32 = command(READ_WRITE, 32, 0x07);
    pub(crate) const SET_PARAMS: u32 = command(READ_WRITE, 32, 0x08);
    pub(crate) const GET_PARAMS: u32 = command(READ, 32, 0x09);
    pub(crate) const START_USER_RECOVERY: u32 = command(READ_WRITE, 32, 0x10);
    pub(crate) const END_USER_RECOVERY: u32 = command(READ_WRITE, 32, 0x11);
    pub(crate) const GET_FEATURES: u32 = command(READ, 32, 0x13);
    pub(crate) const UPDATE_SIZE: u32 = command(READ_WRITE, 32, 0x15);
}

/// Commands for `/dev/ublkcN`; all carry an [`IoCmd`].
pub(super) mod io {
    use super::command;

    /// The first for a tag: take the next request.
    pub(crate) const FETCH: u32 = command(3, 16, 0x20);
    /// Answer a request, and take the next.
    pub(crate) const COMMIT_AND_FETCH: u32 = command(3, 16, 0x21);
}

/// What a device can do.
pub(super) mod feature {
    pub(crate) const USER_RECOVERY: u64 = 1 << 3;
    pub(crate) const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    pub(crate) const CMD_IOCTL_ENCODE: u64 = 1 << 6;
    pub(crate) const USER_COPY: u64 = 1 << 7;
    pub(crate) const UPDATE_SIZE: u64 = 1 << 10;
}

/// `DevInfo::state`.
pub(super) mod state {
    /// Made, not started; or stopped.
    pub(crate) const DEAD: u16 = 0;
    /// (1: it is served.) Its server is gone, its I/O waits.
    pub(crate) const QUIESCED: u16 = 2;
}

/// `Params::types`.
pub(super) mod param {
    pub(crate) const BASIC: u32 = 1;
    pub(crate) const DISCARD: u32 = 2;
}

/// `Params::attributes`.
pub(super) mod attribute {
    pub(crate) const READ_ONLY: u32 = 1;
    pub(crate) const VOLATILE_CACHE: u32 = 1 << 2;
    pub(crate) const FUA: u32 = 1 << 3;
}

/// Low eight bits of `IoDesc::op_flags`.
pub(super) mod operation {
    pub(crate) const READ: u32 = 0;
    pub(crate) const WRITE: u32 = 1;
    pub(crate) const FLUSH: u32 = 2;
    pub(crate) const DISCARD: u32 = 3;
    pub(crate) const WRITE_ZEROES: u32 = 5;
    pub(crate) const MASK: u32 = 0xff;
}

/// The other bits of `IoDesc::op_flags`.
pub(super) mod io_flag {
    pub(crate) const FUA: u32 = 1 << 13;
    /// Write zeroes, but do not unmap.
    pub(crate) const NOUNMAP: u32 = 1 << 15;
}

/// `CtrlCmd::queue` of commands for a device.
pub(super) const NO_QUEUE: u16 = u16::MAX;
/// `CtrlCmd::device` of a new device whose number the kernel may choose.
pub(super) const ANY_DEVICE: u32 = u32::MAX;

/// Command for the control device.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct CtrlCmd {
    pub(super) device: u32,
    pub(super) queue: u16,
    /// Bytes at `address`.
    pub(super) len: u16,
    pub(super) address: u64,
    pub(super) data: u64,
    pub(super) path_len: u16,
    pub(super) pad: u16,
    pub(super) reserved: u32,
}

/// What the kernel knows of a device.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DevInfo {
    pub(super) queues: u16,
    pub(super) depth: u16,
    pub(super) state: u16,
    pub(super) pad0: u16,
    pub(super) request_bytes_max: u32,
    pub(super) device: u32,
    pub(super) server_pid: i32,
    pub(super) pad1: u32,
    pub(super) features: u64,
    /// The server's own; the kernel keeps it. Here: the digest of the identity.
    pub(super) server_flags: u64,
    pub(super) owner_uid: u32,
    pub(super) owner_gid: u32,
    pub(super) reserved: [u64; 2],
}

/// Shape of the block device, up to and with what the kernel adds.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Params {
    pub(super) len: u32,
    pub(super) types: u32,
    pub(super) attributes: u32,
    pub(super) logical_shift: u8,
    pub(super) physical_shift: u8,
    pub(super) io_opt_shift: u8,
    pub(super) io_min_shift: u8,
    pub(super) sectors_max: u32,
    pub(super) chunk_sectors: u32,
    pub(super) sectors: u64,
    pub(super) virt_boundary_mask: u64,
    pub(super) discard_alignment: u32,
    pub(super) discard_granularity: u32,
    pub(super) discard_sectors_max: u32,
    pub(super) write_zeroes_sectors_max: u32,
    pub(super) discard_segments_max: u16,
    pub(super) reserved: u16,
    /// From here on read-only: the numbers of `/dev/ublkcN` and `/dev/ublkbN`.
    pub(super) char_major: u32,
    pub(super) char_minor: u32,
    pub(super) disk_major: u32,
    pub(super) disk_minor: u32,
    /// Of zoned devices.
    pub(super) rest: u32,
}

/// Bytes of [`Params`] that a server sets.
pub(super) const PARAMS_SET_BYTES: u32 = 60;

/// Command for a queue.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IoCmd {
    pub(super) queue: u16,
    pub(super) tag: u16,
    /// Bytes done, or an errno negated.
    pub(super) result: i32,
    /// Zero in this mode of data transfer.
    pub(super) address: u64,
}

/// A request, in the mapped area.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IoDesc {
    pub(super) op_flags: u32,
    pub(super) sectors: u32,
    pub(super) start_sector: u64,
    pub(super) address: u64,
}

const _: () = assert!(size_of::<CtrlCmd>() == 32);
const _: () = assert!(size_of::<DevInfo>() == 64);
const _: () = assert!(size_of::<Params>() == 80);
const _: () = assert!(std::mem::offset_of!(Params, char_major) == PARAMS_SET_BYTES as usize);
const _: () = assert!(size_of::<IoCmd>() == 16);
const _: () = assert!(size_of::<IoDesc>() == 24);

/// Queue depth that the mapped area is laid out for.
const DEPTH_MAX: u64 = 4096;
const DATA_START: u64 = 0x8000_0000;
const DATA_TAG_SHIFT: u32 = 25;
const DATA_QUEUE_SHIFT: u32 = 41;

/// Where the requests of a queue are mapped from, and how many bytes they are.
pub(super) const fn descriptors(queue: u16, depth: u16) -> (u64, u64) {
    let each = size_of::<IoDesc>() as u64;
    // Both are whole pages: 4096 descriptors are 24 of them.
    let len = (depth as u64 * each).next_multiple_of(4096);
    (queue as u64 * DEPTH_MAX * each, len)
}

/// Where the data of a request is in the file of `/dev/ublkcN`.
pub(super) const fn data_offset(queue: u16, tag: u16) -> u64 {
    DATA_START + ((queue as u64) << DATA_QUEUE_SHIFT) + ((tag as u64) << DATA_TAG_SHIFT)
}

/// 64-bit FNV-1a, for `DevInfo::server_flags`.
pub(super) fn digest(identity: &str) -> u64 {
    identity.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        // As printed by a C program with the kernel's header.
        assert_eq!(ctrl::ADD_DEV, 0xc020_7504);
        assert_eq!(ctrl::GET_DEV_INFO, 0x8020_7502);
        assert_eq!(io::FETCH, 0xc010_7520);
        assert_eq!(data_offset(1, 2), 0x0200_0000_0000 + 0x0400_0000 + 0x8000_0000);
        assert_eq!(descriptors(2, 128), (2 * 24 * 4096, 4096));
        assert_eq!(descriptors(0, 4096), (0, 24 * 4096));
    }

    #[test]
    fn digests_are_the_published_ones() {
        // Test vectors of the draft of FNV.
        assert_eq!(digest(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(digest("a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(digest("foobar"), 0x8594_4171_f739_67e8);
    }
}
