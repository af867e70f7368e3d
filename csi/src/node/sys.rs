//! Kernel calls that our dependencies lack. All of them take a descriptor, so that a path cannot
//! change between a check and the call.

use std::os::fd::{AsFd, AsRawFd};

use rustix::fd::BorrowedFd;
use rustix::io::{Errno, Result};
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode, opcode};

/// `MOUNT_ATTR_RDONLY` of linux/mount.h.
const MOUNT_ATTR_RDONLY: u64 = 0x1;
/// `FIFREEZE` and `FITHAW` of linux/fs.h.
const FIFREEZE: Opcode = opcode::read_write::<libc::c_int>(b'X', 119);
const FITHAW: Opcode = opcode::read_write::<libc::c_int>(b'X', 120);

/// `XFS_IOC_FSGEOMETRY_V1` and `XFS_IOC_FSGROWFSDATA` of xfs_fs.h.
const XFS_GEOMETRY: Opcode = opcode::read::<XfsGeometry>(b'X', 100);
const XFS_GROW: Opcode = opcode::write::<XfsGrow>(b'X', 110);
/// `BTRFS_IOC_RESIZE` of linux/btrfs.h.
const BTRFS_RESIZE: Opcode = opcode::write::<BtrfsResize>(0x94, 3);

/// `struct mount_attr` of linux/mount.h, its first version.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

const _: () = assert!(size_of::<MountAttr>() == 32, "MOUNT_ATTR_SIZE_VER0");

/// Makes a mount read-only. This is done before the mount is attached, so that it is never visible
/// as writable.
///
/// # Errors
/// The errno of mount_setattr(2).
pub(crate) fn make_read_only(mount: BorrowedFd<'_>) -> Result<()> {
    let attr = MountAttr { set: MOUNT_ATTR_RDONLY, clear: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path is a C string, `attr` outlives the call and its size is passed with it; the
    // kernel only reads both.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if answer == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error().raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error))
}

/// `struct xfs_fsop_geom_v1`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct XfsGeometry {
    /// Bytes of a block.
    pub(crate) block_bytes: u32,
    unused: [u32; 6],
    /// Percent of the space that inodes may take.
    inodes_percent_max: u32,
    /// Blocks of the data section.
    pub(crate) data_blocks: u64,
    rest: [u64; 9],
}

const _: () = assert!(size_of::<XfsGeometry>() == 112, "struct xfs_fsop_geom_v1");

/// `struct xfs_growfs_data`.
#[repr(C)]
struct XfsGrow {
    data_blocks: u64,
    inodes_percent_max: u32,
}

const _: () = assert!(size_of::<XfsGrow>() == 16, "struct xfs_growfs_data");

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct BtrfsResize {
    unused: i64,
    size: [u8; 4088],
}

const _: () = assert!(size_of::<BtrfsResize>() == 4096, "struct btrfs_ioctl_vol_args");

/// The geometry of the xfs that contains `directory`.
///
/// # Errors
/// The errno of the kernel.
pub(crate) fn xfs_geometry(directory: impl AsFd) -> Result<XfsGeometry> {
    // SAFETY: the number of the call is that of a structure of this layout, which the kernel fills
    // in; every pattern of bits is a value of it.
    let call = unsafe { ioctl::Getter::<XFS_GEOMETRY, XfsGeometry>::new() };
    // SAFETY: the call passes nothing but that structure.
    unsafe { ioctl::ioctl(directory, call) }
}

/// Grows the data section of the xfs that contains `directory`, unless it has the size already.
///
/// # Errors
/// EROFS if it is mounted read-only; the errno of the kernel.
pub(crate) fn xfs_grow(directory: impl AsFd, now: XfsGeometry, data_blocks: u64) -> Result<()> {
    let grow = XfsGrow { data_blocks, inodes_percent_max: now.inodes_percent_max };
    // SAFETY: the number of the call is that of a structure of this layout, which the kernel reads.
    let call = unsafe { ioctl::Setter::<XFS_GROW, XfsGrow>::new(grow) };
    // SAFETY: the call passes nothing but that structure.
    unsafe { ioctl::ioctl(directory, call) }
}

/// Grows the btrfs that contains `directory` to the size of its first device.
///
/// # Errors
/// EROFS if it is mounted read-only; the errno of the kernel.
pub(crate) fn btrfs_grow(directory: impl AsFd) -> Result<()> {
    let mut resize = BtrfsResize { unused: 0, size: [0; 4088] };
    resize.size[..3].copy_from_slice(b"max");
    // SAFETY: the number of the call is that of a structure of this layout, which the kernel reads;
    // the text in it ends with a zero.
    let call = unsafe { ioctl::Setter::<BTRFS_RESIZE, BtrfsResize>::new(resize) };
    // SAFETY: the call passes nothing but that structure.
    unsafe { ioctl::ioctl(directory, call) }
}

/// Writes out the file system that contains `directory`, and blocks all changes to it.
///
/// # Errors
/// EBUSY if it is frozen already; the errno of the kernel.
pub(crate) fn freeze(directory: impl AsFd) -> Result<()> {
    // SAFETY: FIFREEZE takes no argument: the kernel does not look at the pointer.
    unsafe { ioctl::ioctl(directory, Plain(FIFREEZE)) }
}

/// Thaws the file system that contains `directory`.
///
/// # Errors
/// EINVAL if it is not frozen; the errno of the kernel.
pub(crate) fn thaw(directory: impl AsFd) -> Result<()> {
    // SAFETY: FITHAW takes no argument: the kernel does not look at the pointer.
    unsafe { ioctl::ioctl(directory, Plain(FITHAW)) }
}

/// An ioctl without an argument, although its number encodes the size of one.
struct Plain(Opcode);

// SAFETY: no memory is passed in either direction.
unsafe impl Ioctl for Plain {
    type Output = ();
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        self.0
    }

    fn as_ptr(&mut self) -> *mut libc::c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut libc::c_void) -> Result<()> {
        Ok(())
    }
}
