//! [`RingMemory`] as a file that is mapped and never synced. A store copies into memory of the
//! kernel, which survives the process. The file should be on a file system in memory.
//!
//! ```text
//!  0        8              24        32        32+40     32+2*40       4096             4096+len
//!  +--------+--------------+---------+---------+---------+--- zeros ---+------- ring -------+
//!  | magic  | boot id      | current | mark 0  | mark 1  |             |                    |
//!  +--------+--------------+---------+---------+---------+-------------+--------------------+
//! ```
//! Integers are in native byte order, because the file is valid only on the machine that wrote it,
//! until that machine is rebooted. The boot id ensures this: after a power failure, a file system
//! that is not in memory returns an old file with only parts of the last stores.
//!
//! Only one process uses the file: its name is derived from the pool's device and inode, and the
//! pool is locked.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::mem::{offset_of, size_of};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use memmap2::MmapMut;
use rustix::fs::OFlags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::ring::{RingMark, RingMemory};
use crate::units::{BLOCK_SIZE, to_u64, to_usize};

const MAGIC: u64 = u64::from_ne_bytes(*b"PandoRg1");

/// The start of the file.
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: u64,
    boot: [u8; 16],
    /// Index of the valid mark: 0 or 1.
    current: u64,
    marks: [RingMark; 2],
}

const _: () = assert!(size_of::<RingMark>() == 40 && size_of::<Header>() == 112);

/// The mapped ring. It has one writer, behind the journal's lock.
pub struct MappedRing {
    memory: MmapMut,
    /// Keeps the pool locked while its newest records can be changed through this ring.
    _pool: Arc<OwnedFd>,
}

impl MappedRing {
    /// Maps the file `name` in `directory`. A file that this machine wrote since it was booted is
    /// kept, whatever its length. Any other file is created anew, with a ring of `len` bytes.
    ///
    /// # Errors
    /// The kernel's: for example a missing directory, or no space.
    pub fn open(directory: &Path, name: &str, len: usize, pool: Arc<OwnedFd>) -> io::Result<Self> {
        assert!(len > 0 && len.is_multiple_of(BLOCK_SIZE), "a ring of {len} bytes");
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let flags = OFlags::NOFOLLOW.bits().cast_signed();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(flags)
            .open(directory.join(name))?;
        let boot = boot_id()?;
        let found = file.metadata()?.len();
        let whole = found > to_u64(BLOCK_SIZE) && found.is_multiple_of(to_u64(BLOCK_SIZE));
        if whole {
            let ring = Self { memory: map(&file)?, _pool: Arc::clone(&pool) };
            let header = ring.header();
            if header.magic == MAGIC && header.boot == boot && header.current < 2 {
                return Ok(ring);
            }
        }
        make(&file, boot, len)?;
        Ok(Self { memory: map(&file)?, _pool: pool })
    }

    fn header(&self) -> Header {
        let (header, _) = Header::read_from_prefix(&self.memory).expect("longer than a header");
        header
    }
}

/// Creates the file. Its magic is written last, in case the process dies meanwhile.
fn make(mut file: &File, boot: [u8; 16], len: usize) -> io::Result<()> {
    file.set_len(0)?;
    // Written, not only extended: running out of memory must not surface at a store.
    let zeros = vec![0; BLOCK_SIZE + len];
    file.write_all(&zeros)?;
    let header = Header { boot, ..Header::default() };
    std::os::unix::fs::FileExt::write_all_at(file, header.as_bytes(), 0)?;
    std::os::unix::fs::FileExt::write_all_at(file, &MAGIC.to_ne_bytes(), 0)
}

fn map(file: &File) -> io::Result<MmapMut> {
    // SAFETY: the file is private to this user (its directory has mode 0700, the file 0600) and to
    // this process while the pool is locked, so nothing else changes its bytes or its length.
    unsafe { MmapMut::map_mut(file) }
}

/// Differs after every boot of the machine.
fn boot_id() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let id = uuid::Uuid::try_parse(text.trim()).map_err(io::Error::other)?;
    Ok(id.into_bytes())
}

impl RingMemory for MappedRing {
    fn len_bytes(&self) -> usize {
        self.memory.len() - BLOCK_SIZE
    }

    fn store(&mut self, offset: usize, bytes: &[u8]) {
        self.memory[BLOCK_SIZE..][offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn load(&self, offset: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.memory[BLOCK_SIZE..][offset..offset + out.len()]);
    }

    fn mark(&self) -> RingMark {
        let header = self.header();
        header.marks[to_usize(header.current & 1)]
    }

    fn set_mark(&mut self, mark: &RingMark) {
        // A process dies between two instructions, so only their order matters.
        let other = 1 - (self.header().current & 1);
        let at = offset_of!(Header, marks) + to_usize(other) * size_of::<RingMark>();
        compiler_fence(Ordering::SeqCst);
        self.memory[at..at + size_of::<RingMark>()].copy_from_slice(mark.as_bytes());
        compiler_fence(Ordering::SeqCst);
        self.memory[offset_of!(Header, current)..][..8].copy_from_slice(&other.to_ne_bytes());
        compiler_fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(directory: &Path, len: usize) -> MappedRing {
        let pool = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
        MappedRing::open(&directory.join("rings"), "1-2", len, pool).unwrap()
    }

    #[test]
    fn the_next_process_finds_what_was_stored() {
        let directory = tempfile::tempdir().unwrap();
        let mut ring = open(directory.path(), 2 * BLOCK_SIZE);
        assert_eq!((ring.len_bytes(), ring.mark()), (2 * BLOCK_SIZE, RingMark::default()));
        for head in 1..4 {
            ring.store(2 * BLOCK_SIZE - 3, &[1, 2, 3]);
            ring.set_mark(&RingMark { pool: [7; 16], salt: 8, head, ..RingMark::default() });
            assert_eq!(ring.mark().head, head);
        }
        drop(ring);
        // The file was created with another length, which it keeps.
        let ring = open(directory.path(), 9 * BLOCK_SIZE);
        let mut out = [0; 4];
        ring.load(2 * BLOCK_SIZE - 4, &mut out);
        assert_eq!((ring.len_bytes(), out), (2 * BLOCK_SIZE, [0, 1, 2, 3]));
        assert_eq!((ring.mark().pool, ring.mark().salt, ring.mark().head), ([7; 16], 8, 3));
    }

    #[test]
    fn a_file_of_another_start_of_the_machine_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let mut ring = open(directory.path(), BLOCK_SIZE);
        ring.store(0, &[5]);
        ring.set_mark(&RingMark { head: 5, ..RingMark::default() });
        ring.memory[offset_of!(Header, boot)] ^= 1;
        drop(ring);
        let ring = open(directory.path(), 3 * BLOCK_SIZE);
        let mut out = [9];
        ring.load(0, &mut out);
        assert_eq!(
            (ring.len_bytes(), ring.mark(), out),
            (3 * BLOCK_SIZE, RingMark::default(), [0])
        );
        drop(ring);
        // A file that is no ring is created anew, too.
        std::fs::write(directory.path().join("rings/1-2"), [1; 3 * BLOCK_SIZE]).unwrap();
        assert_eq!(open(directory.path(), BLOCK_SIZE).len_bytes(), BLOCK_SIZE);
        std::fs::write(directory.path().join("rings/1-2"), [1; 77]).unwrap();
        assert_eq!(open(directory.path(), BLOCK_SIZE).mark(), RingMark::default());
    }
}
