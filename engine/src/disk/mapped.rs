//! The journal's ring as memory mapped from the pool.
//!
//! A store is a copy into the page cache: it survives the death of the process at once, and power
//! loss after the next sync of the pool. What could go wrong with mapped memory is kept away from
//! the stores: [`RingMemory::prepare`] makes a window ahead of them resident and locks it, so no
//! store there reads the disk or meets a page that has gone. The region was written when the pool
//! was formatted, so no store there needs space from the host's file system. Replay reads the
//! region with ordinary I/O, which reports errors.
//!
//! The window is brought in by *reading*. A write fault would make its pages dirty, and the next
//! sync would write all of them for nothing; and since each sync write-protects the pages that it
//! cleans, it would not even save the later stores their minor fault. What the window has left
//! behind is let go, so that the ring does not count as resident memory of the process.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use rustix::io::Errno;
use rustix::mm::Advice;

use super::RingMemory;
use crate::error::{Error, Result};
use crate::units::BLOCK_SIZE;

/// The mapped ring. One writer, behind the journal's lock.
pub struct MappedRing {
    memory: MmapRaw,
    /// The locked window, if any.
    locked: Option<(usize, usize)>,
    /// The kernel refused to lock once, and it has been said.
    warned: bool,
    /// Keeps the pool's lock for as long as its bytes can be changed through here.
    _file: Arc<OwnedFd>,
}

impl MappedRing {
    /// Maps `len` bytes at `offset` of the pool.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(file: Arc<OwnedFd>, offset: u64, len: usize) -> io::Result<Self> {
        let memory = MmapOptions::new().offset(offset).len(len).map_raw(&file)?;
        Ok(Self { memory, locked: None, warned: false, _file: file })
    }

    fn check(&self, offset: usize, len: usize) {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.memory.len()),
            "range {offset}+{len} is outside of a ring of {} bytes",
            self.memory.len()
        );
    }

    /// Address of `offset`, which lies inside the ring or at its end.
    fn at(&self, offset: usize) -> *mut u8 {
        self.memory.as_mut_ptr().wrapping_add(offset)
    }

    fn populate(&self, offset: usize, len: usize) -> io::Result<()> {
        let start = self.at(offset).cast();
        // SAFETY: the range is inside our mapping (checked by the caller), and reading pages in
        // changes no byte of it.
        match unsafe { rustix::mm::madvise(start, len, Advice::LinuxPopulateRead) } {
            Ok(()) => Ok(()),
            // Linux before 5.14.
            Err(Errno::INVAL) => {
                for page in (offset..offset + len).step_by(BLOCK_SIZE) {
                    // SAFETY: inside our mapping; other programs do not write to the locked pool.
                    unsafe { self.at(page).read_volatile() };
                }
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Lets the kernel read the bytes after the window in the background, for the next window.
    fn read_ahead(&self, offset: usize, len: usize) {
        let len = len.min(self.memory.len() - offset);
        if len == 0 {
            return;
        }
        let start = self.at(offset).cast();
        // SAFETY: the range is inside our mapping, and reading ahead changes no byte of it.
        let asked = unsafe { rustix::mm::madvise(start, len, Advice::WillNeed) };
        // Only an advice: without it the next window waits for the disk.
        let _ignored = asked;
    }

    fn lock(&mut self, offset: usize, len: usize) -> io::Result<()> {
        let start = self.at(offset).cast();
        // SAFETY: the range is inside our mapping (checked by the caller); locking changes no byte.
        match unsafe { rustix::mm::mlock(start, len) } {
            Ok(()) => {
                self.locked = Some((offset, len));
                Ok(())
            }
            Err(error @ (Errno::NOMEM | Errno::PERM | Errno::AGAIN)) => {
                if !std::mem::replace(&mut self.warned, true) {
                    tracing::warn!(
                        %error,
                        bytes = len,
                        "the journal's window cannot be locked in memory; raise LimitMEMLOCK"
                    );
                }
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }
}

impl RingMemory for MappedRing {
    fn len_bytes(&self) -> usize {
        self.memory.len()
    }

    fn store(&mut self, offset: usize, bytes: &[u8]) {
        self.check(offset, bytes.len());
        // SAFETY: the range is inside our mapping, which nobody else writes (`&mut self`, and the
        // pool is locked for this process); `bytes` is ordinary memory and cannot overlap it.
        unsafe { bytes.as_ptr().copy_to_nonoverlapping(self.at(offset), bytes.len()) };
    }

    fn prepare(&mut self, offset: usize, len: usize) -> Result<()> {
        self.check(offset, len);
        // Locking and populating work on whole pages.
        let start = offset / BLOCK_SIZE * BLOCK_SIZE;
        let len = (offset + len).next_multiple_of(BLOCK_SIZE).min(self.memory.len()) - start;
        if len == 0 {
            return Ok(());
        }
        let before = self.locked.take();
        self.populate(start, len)
            .and_then(|()| self.lock(start, len))
            .map_err(|e| Error::io(format!("journal window of {len} bytes at {start}"), e))?;
        self.read_ahead(start + len, len);
        // After the new window is locked, so that pages in both stay all the time.
        for (from, to) in before.into_iter().flat_map(|window| outside(window, (start, len))) {
            let from_address = self.at(from).cast();
            // SAFETY: the range is inside our mapping, it was locked before.
            let unlocked = unsafe { rustix::mm::munlock(from_address, to - from) };
            unlocked.map_err(|e| Error::io("unlocking of the old journal window", e.into()))?;
            // SAFETY: as above. The mapping is shared: its pages stay in the page cache, dirty ones
            // too, and only leave the memory that counts as this process's.
            let dropped =
                unsafe { rustix::mm::madvise(from_address, to - from, Advice::LinuxDontNeed) };
            dropped.map_err(|e| Error::io("unmapping of the old journal window", e.into()))?;
        }
        Ok(())
    }
}

/// The parts `[from, to)` of the window `old` that are not in the window `new`.
fn outside(old: (usize, usize), new: (usize, usize)) -> impl Iterator<Item = (usize, usize)> {
    let (old_from, old_to) = (old.0, old.0 + old.1);
    let (new_from, new_to) = (new.0, new.0 + new.1);
    let below = (old_from, old_to.min(new_from));
    let above = (old_from.max(new_to), old_to);
    [below, above].into_iter().filter(|(from, to)| from < to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_window_less_new_window() {
        let parts = |old, new| outside(old, new).collect::<Vec<_>>();
        assert_eq!(parts((0, 8), (8, 8)), [(0, 8)]);
        assert_eq!(parts((0, 8), (4, 8)), [(0, 4)]);
        assert_eq!(parts((8, 8), (0, 12)), [(12, 16)]);
        assert_eq!(parts((0, 16), (4, 4)), [(0, 4), (8, 16)]);
        assert_eq!(parts((4, 4), (0, 16)), []);
    }
}
