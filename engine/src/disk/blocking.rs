//! A [`Disk`] with ordinary system calls, for threads without a ring: tools that open a pool once,
//! and machines that forbid io_uring. Each call blocks its thread, so there is no concurrency.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use crate::disk::Disk;
use crate::disk::file::PoolFile;
use crate::error::{Error, Result};
use crate::runtime::clock::{blocking_sleep, real_now};
use crate::runtime::{Buf, Clock, LocalFuture};
use crate::units::{BlockNo, to_u64};

/// Maximum of buffers per system call: the kernel's UIO_MAXIOV.
const PIECES_MAX: usize = 1024;

/// A handle of the pool's file.
pub struct BlockingDisk {
    file: Arc<PoolFile>,
}

impl BlockingDisk {
    pub(super) const fn new(file: Arc<PoolFile>) -> Self {
        Self { file }
    }

    fn read_all(&self, at: BlockNo, bytes: &mut [u8]) -> Result<()> {
        self.file.check_range(at, to_u64(bytes.len()))?;
        let mut filled = 0;
        while filled < bytes.len() {
            let offset = at.byte_offset() + to_u64(filled);
            let count = rustix::io::retry_on_intr(|| {
                rustix::io::pread(self.file.fd(), &mut bytes[filled..], offset)
            });
            match count {
                Ok(0) => {
                    let short = io::ErrorKind::UnexpectedEof.into();
                    return Err(self.file.failed("read", at, short));
                }
                Ok(count) => filled += count,
                Err(e) => return Err(self.file.failed("read", at, e.into())),
            }
        }
        Ok(())
    }

    fn write_all(&self, at: BlockNo, bufs: &[Buf]) -> Result<()> {
        self.file.check_range(at, bufs.iter().map(|buf| to_u64(buf.len_bytes())).sum())?;
        let mut pieces: Vec<_> = bufs.iter().map(|buf| IoSlice::new(buf.as_bytes())).collect();
        let mut left = &mut pieces[..];
        let mut offset = at.byte_offset();
        while !left.is_empty() {
            let listed = &left[..left.len().min(PIECES_MAX)];
            let count =
                rustix::io::retry_on_intr(|| rustix::io::pwritev(self.file.fd(), listed, offset));
            match count {
                Ok(0) => {
                    let short = io::ErrorKind::WriteZero.into();
                    return Err(self.file.failed("write", at, short));
                }
                Ok(count) => {
                    IoSlice::advance_slices(&mut left, count);
                    offset += to_u64(count);
                }
                Err(e) => return Err(self.file.failed("write", at, e.into())),
            }
        }
        Ok(())
    }

    fn discard_all(&self, at: BlockNo, count: u64) -> Result<()> {
        let (offset, len) = self.file.discard_range(at, count)?;
        if self.file.is_block_device() {
            return self.file.discard_device(at, offset, len);
        }
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(self.file.fd(), flags, offset, len)
            .map_err(|e| self.file.failed("discard", at, e.into()))
    }
}

impl Clock for BlockingDisk {
    fn now(&self) -> Duration {
        real_now()
    }

    fn sleep(&self, time: Duration) -> LocalFuture<'_, ()> {
        blocking_sleep(time)
    }
}

impl Disk for BlockingDisk {
    fn len_bytes(&self) -> u64 {
        self.file.len_bytes()
    }

    fn read(&self, at: BlockNo, mut buf: Buf) -> LocalFuture<'_, (Buf, Result<()>)> {
        Box::pin(async move {
            let result = self.read_all(at, buf.as_mut_bytes());
            (buf, result)
        })
    }

    fn write(&self, at: BlockNo, bufs: Vec<Buf>) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move { self.write_all(at, &bufs) })
    }

    fn sync(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            // Never retried: the kernel reports a lost write only once.
            let result = rustix::fs::fdatasync(self.file.fd());
            result.map_err(|e| Error::io(format!("sync of {}", self.file), e.into()))
        })
    }

    fn discard(&self, at: BlockNo, count: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move { self.discard_all(at, count) })
    }

    fn extend(&self, len_bytes: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move { self.file.extend(len_bytes) })
    }
}
