//! The file system that the kernel sees: one flat directory, a file for each attached volume.
//!
//! Its thread only sorts: what concerns the data goes to the volume's shard, which replies. So a
//! volume that is slow holds up nobody else's, and a lookup is answered even while none answers.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, WriteFlags,
};
use parking_lot::{Mutex, RwLock};
use tokio::sync::mpsc;

use super::mount;
use super::serve::Request;
use crate::limits::NAME_BYTES_MAX;
use crate::runtime::Buf;
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, SECTOR_BYTES, to_u32, to_u64, to_usize};

/// Nothing is cached: sizes change, files come and go.
const TTL: Duration = Duration::ZERO;
/// A file's number is not used a second time.
const GENERATION: Generation = Generation(0);
/// The directory is 1.
const FIRST_FILE: u64 = 2;

/// A volume as a file.
struct Served {
    identity: String,
    size_bytes: AtomicU64,
    read_only: bool,
    queue: mpsc::Sender<Request>,
}

impl Served {
    fn attributes(&self, inode: u64) -> FileAttr {
        let size = self.size_bytes.load(Ordering::Acquire);
        let perm = if self.read_only { 0o400 } else { 0o600 };
        FileAttr {
            size,
            blocks: size.div_ceil(SECTOR_BYTES),
            ..attributes(inode, FileType::RegularFile, perm)
        }
    }

    /// Hands a request to the shard. A shard that is gone drops it, and its reply says so.
    fn send(&self, request: Request) {
        self.queue.blocking_send(request).unwrap_or_default();
    }
}

/// All files. Shared by the file system's thread and the devices.
pub(super) struct Files {
    by_inode: RwLock<BTreeMap<u64, Arc<Served>>>,
    next: Mutex<u64>,
}

impl Files {
    /// None.
    pub(super) const fn new() -> Self {
        Self { by_inode: RwLock::new(BTreeMap::new()), next: Mutex::new(FIRST_FILE) }
    }

    /// Shows a file, for as long as what is returned lives.
    pub(super) fn show(
        self: &Arc<Self>,
        identity: String,
        size_bytes: u64,
        read_only: bool,
        queue: mpsc::Sender<Request>,
    ) -> Shown {
        let inode = {
            let mut next = self.next.lock();
            *next += 1;
            *next - 1
        };
        let served =
            Arc::new(Served { identity, size_bytes: AtomicU64::new(size_bytes), read_only, queue });
        self.by_inode.write().insert(inode, Arc::clone(&served));
        Shown { files: Arc::clone(self), inode, served }
    }

    fn get(&self, inode: INodeNo) -> Result<Arc<Served>, Errno> {
        self.by_inode.read().get(&inode.0).cloned().ok_or(Errno::ENOENT)
    }

    fn attributes(&self, inode: INodeNo) -> Result<FileAttr, Errno> {
        if inode == INodeNo::ROOT {
            return Ok(attributes(inode.0, FileType::Directory, 0o700));
        }
        self.get(inode).map(|served| served.attributes(inode.0))
    }

    fn find(&self, name: &OsStr) -> Option<FileAttr> {
        let files = self.by_inode.read();
        let found = files.iter().find(|(_, served)| name == served.identity.as_str());
        found.map(|(inode, served)| served.attributes(*inode))
    }

    fn names(&self) -> Vec<(u64, String)> {
        let files = self.by_inode.read();
        files.iter().map(|(inode, served)| (*inode, served.identity.clone())).collect()
    }
}

fn attributes(inode: u64, kind: FileType, perm: u16) -> FileAttr {
    FileAttr {
        ino: INodeNo(inode),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm,
        nlink: 1,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        rdev: 0,
        blksize: to_u32(BLOCK_BYTES),
        flags: 0,
    }
}

/// A file that is shown. Goes with this.
pub(super) struct Shown {
    files: Arc<Files>,
    inode: u64,
    served: Arc<Served>,
}

impl Shown {
    /// Shows a new size to whoever asks from now on.
    pub(super) fn resize(&self, size_bytes: u64) {
        self.served.size_bytes.store(size_bytes, Ordering::Release);
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.files.by_inode.write().remove(&self.inode);
    }
}

/// The kernel's side of [`Files`].
pub(super) struct FlatDirectory(pub(super) Arc<Files>);

impl Filesystem for FlatDirectory {
    fn init(&mut self, _: &fuser::Request, config: &mut KernelConfig) -> io::Result<()> {
        mount::configure(config)
    }

    fn lookup(&self, _: &fuser::Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = if parent == INodeNo::ROOT { self.0.find(name) } else { None };
        match found {
            Some(attributes) => reply.entry(&TTL, &attributes, GENERATION),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &fuser::Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.attributes(ino) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &fuser::Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.0.get(ino) {
            Ok(served) if served.read_only && flags.acc_mode() != OpenAccMode::O_RDONLY => {
                reply.error(Errno::EROFS);
            }
            // Without the second flag the kernel lets one write at a time through.
            Ok(_) => reply.opened(
                FileHandle(ino.0),
                FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
            ),
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &fuser::Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let served = match self.0.get(ino) {
            Ok(served) => served,
            Err(error) => return reply.error(error),
        };
        let left = served.size_bytes.load(Ordering::Acquire).saturating_sub(offset);
        let len = to_u32(left.min(size.into()));
        served.send(Request::Read { offset, len, reply });
    }

    fn write(
        &self,
        _: &fuser::Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let served = match self.0.get(ino) {
            Ok(served) => served,
            Err(error) => return reply.error(error),
        };
        if data.is_empty() {
            return reply.written(0);
        }
        let start = to_usize(offset % BLOCK_BYTES);
        let end = start + data.len();
        let mut buf = Buf::new(end.div_ceil(BLOCK_SIZE));
        buf.as_mut_bytes()[start..end].copy_from_slice(data);
        let len = to_u32(to_u64(data.len()));
        served.send(Request::Write { offset, len, buf, reply });
    }

    fn flush(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        reply: ReplyEmpty,
    ) {
        // Said when a descriptor is closed; it promises nothing.
        reply.ok();
    }

    fn fsync(&self, _: &fuser::Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.0.get(ino) {
            Ok(served) => served.send(Request::Flush { reply }),
            Err(error) => reply.error(error),
        }
    }

    fn fallocate(
        &self,
        _: &fuser::Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // A hole must read as zeros to its last byte, since a loop device writes zeros this way as
        // well; a discard would keep the bytes of blocks that it covers in part. And zeros are
        // kept as holes: what mkfs clears in a thin volume takes no space.
        if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) == 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        match self.0.get(ino) {
            Ok(served) => served.send(Request::Zero { offset, len: length, reply }),
            Err(error) => reply.error(error),
        }
    }

    fn getxattr(&self, _: &fuser::Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        // There are none; the kernel does not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn readdir(
        &self,
        _: &fuser::Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if ino != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        // A place in the listing is the number of the file before it.
        for (inode, name) in self.0.names().into_iter().filter(|(inode, _)| *inode > offset) {
            if reply.add(INodeNo(inode), inode, FileType::RegularFile, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &fuser::Request, _: INodeNo, reply: ReplyStatfs) {
        // The size of blocks becomes the grain of a loop device's discards.
        let name_bytes = to_u32(to_u64(NAME_BYTES_MAX));
        let block = to_u32(BLOCK_BYTES);
        reply.statfs(0, 0, 0, 0, 0, block, name_bytes, block);
    }
}
