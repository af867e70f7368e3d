//! A [`Disk`] on the ring of the calling thread.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::disk::Disk;
use crate::disk::file::PoolFile;
use crate::error::{Error, Result};
use crate::runtime::clock::real_now;
use crate::runtime::executor::end_of_turn;
use crate::runtime::{Buf, Clock, LocalFuture, reactor};
use crate::units::{BlockNo, to_u64};

/// Longest average sync that a shard's thread may run inline.
const INLINE_SYNC_MAX: Duration = Duration::from_micros(250);
/// Short reads and interruptions of one read that are tolerated.
const READ_TRIES_MAX: u32 = 64;

/// One thread's handle of the pool's file.
pub struct UringDisk {
    file: Arc<PoolFile>,
    /// How long syncs take: a running mean of about eight of them.
    sync_time: Cell<Duration>,
}

impl UringDisk {
    pub(super) fn new(file: Arc<PoolFile>) -> Self {
        Self { file, sync_time: Cell::new(Duration::ZERO) }
    }

    async fn read_all(&self, at: BlockNo, mut buf: Buf) -> (Buf, Result<()>) {
        let total = buf.len_bytes();
        if let Err(error) = self.file.check_range(at, to_u64(total)) {
            return (buf, Err(error));
        }
        let mut filled = 0;
        for _ in 0..READ_TRIES_MAX {
            let offset = at.byte_offset() + to_u64(filled);
            let (back, result) = reactor::read_at(self.file.fd(), buf, filled, offset).await;
            buf = back;
            match result {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                Err(e) => return (buf, Err(self.file.failed("read", at, e))),
            }
            if filled >= total {
                return (buf, Ok(()));
            }
        }
        let short = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
        (buf, Err(self.file.failed("read", at, short)))
    }

    /// Runs a sync and records how long it took.
    async fn timed_sync(&self) -> std::io::Result<()> {
        // Other tasks of this turn queue their I/O first.
        end_of_turn().await;
        // The ring passes every sync to a worker thread, because a sync blocks. That costs two
        // wake-ups of another core, 25 to 40 us on a virtual machine. If this thread has no other
        // disk I/O under way and syncs are short, it runs the sync itself.
        let inline = reactor::disk_ops_in_flight() == 0 && self.sync_time.get() <= INLINE_SYNC_MAX;
        let start = Instant::now();
        let result = if inline {
            reactor::submit_now();
            rustix::fs::fdatasync(self.file.fd()).map_err(Into::into)
        } else {
            reactor::sync_data(self.file.fd()).await
        };
        self.sync_time.set((self.sync_time.get() * 7 + start.elapsed()) / 8);
        result
    }
}

impl Clock for UringDisk {
    fn now(&self) -> Duration {
        real_now()
    }

    fn sleep(&self, time: Duration) -> LocalFuture<'_, ()> {
        Box::pin(reactor::sleep(time))
    }
}

impl Disk for UringDisk {
    fn len_bytes(&self) -> u64 {
        self.file.len_bytes()
    }

    fn read(&self, at: BlockNo, buf: Buf) -> LocalFuture<'_, (Buf, Result<()>)> {
        Box::pin(self.read_all(at, buf))
    }

    fn write(&self, at: BlockNo, bufs: Vec<Buf>) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.file.check_range(at, bufs.iter().map(|buf| to_u64(buf.len_bytes())).sum())?;
            let (_, result) = reactor::write_all_at(self.file.fd(), bufs, at.byte_offset()).await;
            result.map_err(|e| self.file.failed("write", at, e))
        })
    }

    fn sync(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let result = self.timed_sync().await;
            result.map_err(|e| Error::io(format!("sync of {}", self.file), e))
        })
    }

    fn discard(&self, at: BlockNo, count: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let (offset, len) = self.file.discard_range(at, count)?;
            if self.file.is_block_device() {
                return self.file.discard_device(at, offset, len);
            }
            let result = reactor::punch_hole(self.file.fd(), offset, len).await;
            result.map_err(|e| self.file.failed("discard", at, e))
        })
    }

    fn extend(&self, len_bytes: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move { self.file.extend(len_bytes) })
    }
}
