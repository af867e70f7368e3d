//! The narrow waist above the pool: what an export sees of a volume.
//!
//! Every export goes through [`BlockDevice`] and through [`check_range`], so that there is one
//! range check for all of them. Offsets and lengths are bytes, multiples of 512.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::REQUEST_BYTES_MAX;
use crate::runtime::{Buf, LocalFuture};
use crate::units::{SECTOR_BYTES, Size};

/// A run of a volume that is mapped (holds data) or not (reads as zeros).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRun {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Whether blocks of the pool stand behind it.
    pub mapped: bool,
}

/// How [`BlockDevice::write_zeroes`] shall go about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// Durable before it is acknowledged.
    pub fua: bool,
    /// Keep blocks allocated: write zeros instead of unmapping.
    pub no_hole: bool,
}

/// One volume as a block device, for the thread that holds it. All operations may run
/// concurrently; a reply means acknowledged, not durable, unless `fua` is set.
pub trait BlockDevice {
    /// Size in bytes, a multiple of 512; may grow while in use.
    fn size_bytes(&self) -> u64;

    /// Whether writes are refused (a snapshot, or a volume set read-only).
    fn read_only(&self) -> bool;

    /// Reads `[offset, offset + len)`. The answer's bytes begin at [`ReadData::bytes`].
    fn read(&self, offset: u64, len: u32) -> LocalFuture<'_, Result<ReadData>>;

    /// Writes `len` bytes at `offset`. The data lies in `buf` from byte `offset % 4096` on, so
    /// that whole blocks of the volume are whole blocks of the buffer and go to the disk without
    /// a copy; `buf` has `ceil((offset % 4096 + len) / 4096)` blocks.
    fn write(&self, offset: u64, len: u32, buf: Buf, fua: bool) -> LocalFuture<'_, Result<()>>;

    /// Makes the range read as zeros. Unmaps whole blocks unless `no_hole`.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>>;

    /// Unmaps the whole blocks inside the range; the bytes of partly covered blocks are kept.
    fn discard(&self, offset: u64, len: u64, fua: bool) -> LocalFuture<'_, Result<()>>;

    /// Everything acknowledged before the call, on any handle of any volume of the pool, is
    /// durable when this is acknowledged.
    fn flush(&self) -> LocalFuture<'_, Result<()>>;

    /// Mapped and unmapped runs from `offset` on, in order and without gaps, at most `max_runs`,
    /// not beyond `offset + len`. May stop early but returns at least one run.
    fn mapped_runs(
        &self,
        offset: u64,
        len: u64,
        max_runs: usize,
    ) -> LocalFuture<'_, Result<Vec<MappedRun>>>;
}

/// What a read returns: a buffer of whole blocks and the part of it that was asked for.
pub struct ReadData {
    /// Whole blocks.
    pub buf: Buf,
    /// First byte of the answer in `buf`.
    pub start: usize,
    /// Bytes of the answer.
    pub len: usize,
}

impl ReadData {
    /// The bytes asked for.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.buf.as_bytes()[self.start..self.start + self.len]
    }
}

/// Checks that `[offset, offset + len)` is aligned to sectors and inside a device of `size`
/// bytes. Returns the end of the range.
///
/// # Errors
/// `Invalid` when misaligned or beyond the end. (A protocol that answers ENOSPC for writes past
/// the end maps that itself.)
pub fn check_range(size: u64, offset: u64, len: u64) -> Result<u64> {
    if !offset.is_multiple_of(SECTOR_BYTES) || !len.is_multiple_of(SECTOR_BYTES) {
        return Err(Error::invalid(format!(
            "offset {offset} and length {len} must be multiples of {SECTOR_BYTES}"
        )));
    }
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(end),
        _ => Err(Error::invalid(format!(
            "range of {len} bytes at {offset} is beyond the end of the device ({})",
            Size(size)
        ))),
    }
}

/// Checks the length of a request that carries data.
///
/// # Errors
/// `Invalid` when it is larger than [`REQUEST_BYTES_MAX`].
pub fn check_payload(len: u32) -> Result<()> {
    if len > REQUEST_BYTES_MAX {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("request of {len} bytes is larger than the maximum of {REQUEST_BYTES_MAX}"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_check() {
        assert_eq!(check_range(4096, 0, 4096).unwrap(), 4096);
        assert_eq!(check_range(4096, 4096, 0).unwrap(), 4096);
        assert!(check_range(4096, 512, 4096).is_err());
        assert!(check_range(4096, 100, 512).is_err());
        assert!(check_range(4096, 512, 100).is_err());
        assert!(check_range(4096, 4608, 512).is_err());
        assert!(check_range(u64::MAX, u64::MAX - 511, 1024).is_err());
    }
}
