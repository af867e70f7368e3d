//! A volume as an export sees it: the pool's device, perhaps read-only, and, for a connection, known to be in use.

use std::rc::Rc;

use crate::daemon::uses::Connected;
use crate::device::{BlockDevice, MappedRun, ReadData, ZeroFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{Buf, LocalFuture};

/// A volume that is offered to one connection, or served as a device.
pub(super) struct Offered {
    device: Rc<dyn BlockDevice>,
    read_only: bool,
    _connected: Option<Connected>,
}

impl Offered {
    /// `device` for one user, counted as `connected` unless something larger holds the volume;
    /// `read_only` refuses writes that the volume itself would take.
    pub(super) fn new(
        device: Rc<dyn BlockDevice>,
        read_only: bool,
        connected: Option<Connected>,
    ) -> Self {
        Self { device, read_only, _connected: connected }
    }

    /// What to answer to a change, if it is refused here.
    fn refused<'a>(&self) -> Option<LocalFuture<'a, Result<()>>> {
        self.read_only.then(|| -> LocalFuture<'a, Result<()>> {
            let error = Error::new(ErrorKind::ReadOnly, "the export is read-only");
            Box::pin(std::future::ready(Err(error)))
        })
    }
}

impl BlockDevice for Offered {
    fn size_bytes(&self) -> u64 {
        self.device.size_bytes()
    }

    fn read_only(&self) -> bool {
        self.read_only || self.device.read_only()
    }

    fn read(&self, offset: u64, len: u32) -> LocalFuture<'_, Result<ReadData>> {
        self.device.read(offset, len)
    }

    fn write(&self, offset: u64, len: u32, buf: Buf, fua: bool) -> LocalFuture<'_, Result<()>> {
        self.refused().unwrap_or_else(|| self.device.write(offset, len, buf, fua))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'_, Result<()>> {
        self.refused().unwrap_or_else(|| self.device.write_zeroes(offset, len, flags))
    }

    fn discard(&self, offset: u64, len: u64, fua: bool) -> LocalFuture<'_, Result<()>> {
        self.refused().unwrap_or_else(|| self.device.discard(offset, len, fua))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.device.flush()
    }

    fn mapped_runs(
        &self,
        offset: u64,
        len: u64,
        max_runs: usize,
    ) -> LocalFuture<'_, Result<Vec<MappedRun>>> {
        self.device.mapped_runs(offset, len, max_runs)
    }
}
