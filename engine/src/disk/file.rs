//! The pool's file or block device, opened for direct I/O and locked for this process.
//!
//! The lock (`flock`) belongs to the open file. It is held while any handle exists: a disk, the
//! memory of the journal, or an I/O that is still in the kernel. So no second process can open a
//! pool to which a late write of the first may still go.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, FileType, FlockOperation, Mode, OFlags};

use crate::error::{Error, ErrorKind, Result};
use crate::runtime::Buf;

use crate::limits::POOL_BYTES_MAX;
use crate::units::{BLOCK_BYTES, BlockNo, Size, to_u64};

/// `BLKGETSIZE64`: _IOR(0x12, 114, size_t).
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// `BLKDISCARD`: _IO(0x12, 119).
const BLKDISCARD: libc::c_ulong = 0x1277;
/// Maximum of bytes per discard, which bounds how long it blocks the thread.
const DISCARD_BYTES_MAX: u64 = 64 << 20;
/// Blocks per write when a new file is filled.
const FILL_BLOCKS: usize = 256;

/// How the space of a new pool file is allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Allocate {
    /// Only the size is set. The host's file system may run out of space later, which is a write
    /// error for the pool.
    #[default]
    Sparse,
    /// The host's file system reserves the space.
    Reserve,
    /// Zeros are written to the whole file, so that no later write changes the host's metadata.
    Write,
}

/// An opened, exclusively locked pool file or block device.
#[derive(Debug)]
pub struct PoolFile {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    block_device: bool,
    len_bytes: AtomicU64,
}

impl PoolFile {
    /// Creates a new file of `size_bytes`.
    ///
    /// # Errors
    /// `Exists` if the path exists (it is not changed), `NotFound` if its directory is missing,
    /// `Invalid` for a size that is not a whole number of blocks, `Io` if there is not enough
    /// space.
    pub fn create(path: &Path, size_bytes: u64, allocate: Allocate) -> Result<Self> {
        if size_bytes == 0 || !size_bytes.is_multiple_of(BLOCK_BYTES) || size_bytes > POOL_BYTES_MAX
        {
            return Err(Error::invalid(format!(
                "pool file {}: {} is not a multiple of {} from there to {}",
                path.display(),
                Size(size_bytes),
                Size(BLOCK_BYTES),
                Size(POOL_BYTES_MAX)
            )));
        }
        let flags = OFlags::CREATE | OFlags::EXCL;
        let opened = rustix::fs::open(path, flags | open_flags(), Mode::RUSR | Mode::WUSR);
        let fd = opened.map_err(|e| match e {
            rustix::io::Errno::NOENT => missing_parent(path),
            e => open_error(path, e),
        })?;
        let file = Self::locked(fd, path, false)?;
        let filled = file.fill(size_bytes, allocate).and_then(|()| sync_directory(path));
        if let Err(e) = filled {
            // This call has just created the file, and an incomplete pool file is useless.
            let _ignored = rustix::fs::unlink(path);
            return Err(Error::io(format!("creation of {file} with {}", Size(size_bytes)), e));
        }
        file.len_bytes.store(size_bytes, Ordering::Release);
        Ok(file)
    }

    /// Whether `path` is a block device; otherwise it is a regular file.
    ///
    /// # Errors
    /// `NotFound`; `Unsupported` for any other type.
    pub fn block_device_at(path: &Path) -> Result<bool> {
        let kind = rustix::fs::stat(path).map_err(|e| open_error(path, e))?;
        match FileType::from_raw_mode(kind.st_mode) {
            FileType::BlockDevice => Ok(true),
            FileType::RegularFile => Ok(false),
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                format!("{} is neither a regular file nor a block device", path.display()),
            )),
        }
    }

    /// Opens an existing file or block device.
    ///
    /// # Errors
    /// `NotFound`; `Busy` if another process has it open; `Unsupported` without direct I/O, or if
    /// it is neither a file nor a block device.
    pub fn open(path: &Path) -> Result<Self> {
        let block_device = Self::block_device_at(path)?;
        // On a block device this also excludes mounts and other exclusive users.
        let exclusive = if block_device { OFlags::EXCL } else { OFlags::empty() };
        let fd = rustix::fs::open(path, open_flags() | exclusive, Mode::empty())
            .map_err(|e| open_error(path, e))?;
        let file = Self::locked(fd, path, block_device)?;
        let len = file.measure().map_err(|e| Error::io(format!("size of {file}"), e))?;
        file.len_bytes.store(len, Ordering::Release);
        Ok(file)
    }

    fn locked(fd: OwnedFd, path: &Path, block_device: bool) -> Result<Self> {
        rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)
            .map_err(|e| open_error(path, e))?;
        Ok(Self {
            fd: Arc::new(fd),
            path: path.to_owned(),
            block_device,
            len_bytes: AtomicU64::new(0),
        })
    }

    /// Length in bytes, in whole blocks.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes.load(Ordering::Acquire)
    }

    /// The path used to open it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a block device; otherwise it is a regular file.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Whether the space of the file is reserved ([`Allocate::Reserve`] or [`Allocate::Write`]):
    /// the host's file system has allocated its whole length. A hole punched in such a file would
    /// give up space that a later write may not get again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn is_reserved(&self) -> Result<bool> {
        let failed = |error| Error::io(format!("allocated space of {self}"), error);
        Ok(!self.block_device && self.has_all_its_space().map_err(failed)?)
    }

    fn has_all_its_space(&self) -> io::Result<bool> {
        let stat = rustix::fs::fstat(&self.fd)?;
        let allocated = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        Ok(allocated >= u64::try_from(stat.st_size).unwrap_or(u64::MAX))
    }

    pub(super) fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    pub(super) fn failed(&self, doing: &str, at: BlockNo, source: io::Error) -> Error {
        Error::io(format!("{doing} at {at} of {self}"), source)
    }

    /// Checks that `len` bytes from `at` on are within the file.
    pub(super) fn check_range(&self, at: BlockNo, len: u64) -> Result<()> {
        let size = self.len_bytes();
        let end = at.get().checked_mul(BLOCK_BYTES).and_then(|start| start.checked_add(len));
        match end {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::invalid(format!(
                "{len} bytes at {at} are beyond the end of {self} ({size} bytes)"
            ))),
        }
    }

    /// Checks a discard and converts it to bytes.
    pub(super) fn discard_range(&self, at: BlockNo, count: u64) -> Result<(u64, u64)> {
        let len = count.saturating_mul(BLOCK_BYTES);
        self.check_range(at, len)?;
        Ok((at.byte_offset(), len))
    }

    /// Extends a regular file to at least `len_bytes`. A reserved file stays reserved.
    pub(super) fn extend(&self, len_bytes: u64) -> Result<()> {
        let fail = |e: io::Error| Error::io(format!("growth of {self} to {len_bytes} bytes"), e);
        let size = self.measure().map_err(fail)?;
        if size < len_bytes && self.block_device {
            return Err(Error::invalid(format!(
                "{self} has {}, not {}: grow the device first",
                Size(size),
                Size(len_bytes)
            )));
        }
        if size < len_bytes {
            let grown = if self.has_all_its_space().map_err(fail)? {
                rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), size, len_bytes - size)
            } else {
                rustix::fs::ftruncate(&self.fd, len_bytes)
            };
            grown.map_err(|e| fail(e.into()))?;
        }
        self.len_bytes.store(self.measure().map_err(fail)?, Ordering::Release);
        Ok(())
    }

    /// Discards a range of a block device, in pieces. Blocks the thread.
    pub(super) fn discard_device(&self, at: BlockNo, offset: u64, len: u64) -> Result<()> {
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(DISCARD_BYTES_MAX);
            let range = [offset + done, piece];
            // SAFETY: the request reads two 64-bit numbers, which live until it returns.
            let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
            if result != 0 {
                return Err(self.failed("discard", at, io::Error::last_os_error()));
            }
            done += piece;
        }
        Ok(())
    }

    /// Current size in whole blocks, from the kernel.
    fn measure(&self) -> io::Result<u64> {
        let size = if self.block_device {
            let mut size = 0_u64;
            // SAFETY: the request writes one 64-bit number, which lives until it returns.
            let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), BLKGETSIZE64, &raw mut size) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
            size
        } else {
            u64::try_from(rustix::fs::fstat(&self.fd)?.st_size).unwrap_or(0)
        };
        Ok(size / BLOCK_BYTES * BLOCK_BYTES)
    }

    fn fill(&self, size: u64, allocate: Allocate) -> io::Result<()> {
        match allocate {
            Allocate::Sparse => rustix::fs::ftruncate(&self.fd, size)?,
            Allocate::Reserve => {
                rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), 0, size)?;
            }
            Allocate::Write => {
                // Reserved first: then either there is room for all of it, or this fails at once.
                rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), 0, size)?;
                let zeros = Buf::zeroed(FILL_BLOCKS);
                let mut at = 0;
                while at < size {
                    let piece = (size - at).min(to_u64(zeros.len_bytes()));
                    let bytes = &zeros.as_bytes()[..crate::units::to_usize(piece)];
                    at += to_u64(rustix::io::retry_on_intr(|| {
                        rustix::io::pwrite(&self.fd, bytes, at)
                    })?);
                }
            }
        }
        rustix::fs::fsync(&self.fd).map_err(Into::into)
    }
}

impl fmt::Display for PoolFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.block_device { "block device" } else { "pool file" };
        write!(f, "{kind} {}", self.path.display())
    }
}

fn open_flags() -> OFlags {
    OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC
}

fn open_error(path: &Path, error: rustix::io::Errno) -> Error {
    use rustix::io::Errno;
    let path = path.display();
    match error {
        Errno::NOENT => Error::new(ErrorKind::NotFound, format!("{path} does not exist")),
        Errno::EXIST => Error::new(
            ErrorKind::Exists,
            format!("{path} already exists; choose another path, or format it explicitly"),
        ),
        Errno::WOULDBLOCK | Errno::BUSY => Error::new(
            ErrorKind::Busy,
            format!("{path} is in use by another process; stop that first"),
        ),
        Errno::INVAL => Error::new(
            ErrorKind::Unsupported,
            format!(
                "{path} cannot be opened for direct I/O; put the pool on a file system that has \
                 it (ext4, xfs, btrfs) or on a block device"
            ),
        ),
        error => Error::io(format!("opening of {path}"), error.into()),
    }
}

/// The error for a new file whose directory does not exist.
fn missing_parent(path: &Path) -> Error {
    let parent = parent(path).display();
    Error::new(
        ErrorKind::NotFound,
        format!("directory {parent} does not exist; make it with `mkdir -p {parent}`"),
    )
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes the directory entry of a new file durable.
fn sync_directory(path: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(parent(path), flags, Mode::empty())?;
    rustix::fs::fsync(&directory).map_err(Into::into)
}

#[cfg(test)]
mod tests;
