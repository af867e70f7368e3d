//! Selects the implementation of [`Disk`] and [`RingMemory`] for a pool file.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use super::blocking::BlockingDisk;
use super::mapped::MappedRing;
use super::uring::UringDisk;
use super::{Disk, PoolFile, RingMemory};
use crate::error::{Error, Result};
use crate::runtime::reactor;

impl PoolFile {
    /// A [`Disk`] for the calling thread: on the thread's ring if it has one, otherwise with
    /// blocking system calls.
    #[must_use]
    pub fn disk(self: &Arc<Self>) -> Rc<dyn Disk> {
        let file = Arc::clone(self);
        if reactor::is_here() {
            Rc::new(UringDisk::new(file))
        } else {
            Rc::new(BlockingDisk::new(file))
        }
    }

    /// The memory of the pool's journal: a file in `directory` that belongs to this pool only. A
    /// new file gets a ring of `len` bytes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn map_ring(&self, directory: &Path, len: usize) -> Result<Box<dyn RingMemory>> {
        let shown = directory.display();
        let failed = |error| Error::io(format!("memory of the journal in {shown}"), error);
        let about = rustix::fs::fstat(self.fd()).map_err(|e| failed(e.into()))?;
        let name = if self.is_block_device() {
            format!("dev-{:x}", about.st_rdev)
        } else {
            format!("{:x}-{:x}", about.st_dev, about.st_ino)
        };
        let ring = MappedRing::open(directory, &name, len, Arc::clone(self.fd()));
        Ok(Box::new(ring.map_err(failed)?))
    }
}
