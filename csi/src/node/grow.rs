//! Grows file systems to the size of their device.
//!
//! | | mounted for writing | mounted read-only | not mounted |
//! |---|---|---|---|
//! | ext4 | resize2fs, with CAP_SYS_RESOURCE | no | e2fsck and resize2fs |
//! | xfs, btrfs | an ioctl on the mount | no | through a detached mount |
//!
//! So a volume that will be mounted read-only grows before it is mounted, and a volume that cannot
//! grow while it is mounted grows when it is staged.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, fstatvfs, openat};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities};
use tonic::Status;

use super::blocking;
use super::command::{run, succeed};
use super::fs::{CHECK_LIMIT, Kind, PROBE_LIMIT};
use super::sys;

/// Time limit to grow a file system.
const GROW_LIMIT: Duration = Duration::from_secs(10 * 60);
/// Blocks that xfs leaves unused at the end of its device: no allocation group is smaller.
const XFS_GROUP_BLOCKS_MIN: u64 = 64;
/// Bytes of a sector of a btrfs that we format; the rest of a device is unused.
const BTRFS_SECTOR_BYTES: u64 = 4096;

/// Whether a file system of this kind can grow while it is mounted. For an ext4 the kernel requires
/// CAP_SYS_RESOURCE, which some containers and machines do not have.
pub(crate) fn grows_mounted(kind: Kind) -> bool {
    let has = |sets: CapabilitySets| sets.effective.contains(CapabilitySet::SYS_RESOURCE);
    kind != Kind::Ext4 || capabilities(None).is_ok_and(has)
}

/// Whether an ext4 is as large as its device, according to its superblock on the device.
///
/// # Errors
/// `INTERNAL`: the superblock cannot be read.
pub(crate) async fn ext4_fills(device: &Path, device_bytes: u64) -> Result<bool, Status> {
    let header = succeed("dumpe2fs", &["-h".as_ref(), device.as_os_str()], PROBE_LIMIT).await?;
    Ok(ext4_bytes(&header.stdout).is_none_or(|bytes| bytes >= device_bytes))
}

/// The size of an ext4 in the output of `dumpe2fs -h`; `None` if the output is not understood.
fn ext4_bytes(header: &str) -> Option<u64> {
    let number = |key: &str| -> Option<u64> {
        header.lines().find_map(|line| line.strip_prefix(key))?.trim().parse().ok()
    };
    number("Block count:")?.checked_mul(number("Block size:")?)
}

/// Grows an ext4 that is not mounted to the size of its device. resize2fs requires a full check
/// before that, so this is only for file systems that cannot grow while they are mounted.
///
/// # Errors
/// `INTERNAL` with the message of the program.
pub(crate) async fn unmounted_ext4(device: &Path, device_bytes: u64) -> Result<(), Status> {
    if ext4_fills(device, device_bytes).await? {
        return Ok(());
    }
    let device = device.as_os_str();
    let checked = run("e2fsck", &["-f".as_ref(), "-p".as_ref(), device], CHECK_LIMIT).await?;
    if !matches!(checked.code, Some(0..=2)) {
        return Err(checked.failure("e2fsck"));
    }
    succeed("resize2fs", &[device], GROW_LIMIT).await.map(|_| ())
}

/// Grows a file system that is mounted for writing to the size of its device, if it is smaller.
/// `mount` is its root, or any directory in it.
///
/// # Errors
/// `FAILED_PRECONDITION`: it cannot grow while it is mounted; `INTERNAL` with the errno or the
/// message of the program.
pub(crate) async fn mounted(
    kind: Kind,
    (device, device_bytes): (&Path, u64),
    mount: OwnedFd,
) -> Result<(), Status> {
    if kind != Kind::Ext4 {
        return blocking(move || through_mount(kind, mount.as_fd(), device_bytes)).await;
    }
    // The program needs exclusive access to the file system.
    drop(mount);
    if grows_mounted(kind) {
        return succeed("resize2fs", &[device], GROW_LIMIT).await.map(|_| ());
    }
    may_grow_mounted(kind, device, device_bytes).await
}

/// Checks that a mounted file system has `bytes` or can grow.
///
/// # Errors
/// `FAILED_PRECONDITION`: it is smaller, and cannot grow while it is mounted.
pub(crate) async fn may_grow_mounted(kind: Kind, device: &Path, bytes: u64) -> Result<(), Status> {
    if grows_mounted(kind) || ext4_fills(device, bytes).await? {
        return Ok(());
    }
    let text = "an ext4 cannot grow while it is mounted, as this process lacks CAP_SYS_RESOURCE; \
                it grows when its pod is started again";
    Err(Status::failed_precondition(text))
}

/// Opens the root of a mount for reading; `mount` may be an `O_PATH` descriptor.
fn root(mount: BorrowedFd<'_>) -> Result<OwnedFd, Status> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(mount, ".", flags, Mode::empty())
        .map_err(|errno| Status::internal(format!("cannot open the root of the mount: {errno}")))
}

/// Whether an xfs or btrfs is as large as its device allows.
///
/// # Errors
/// `INTERNAL` with the errno.
pub(crate) fn fills(kind: Kind, mount: BorrowedFd<'_>, device_bytes: u64) -> Result<bool, Status> {
    let failed = |errno| Status::internal(format!("size of {kind}: {errno}"));
    let root = root(mount)?;
    if kind == Kind::Xfs {
        let now = sys::xfs_geometry(&root).map_err(failed)?;
        let blocks = device_bytes / u64::from(now.block_bytes.max(1));
        return Ok(blocks.saturating_sub(now.data_blocks) < XFS_GROUP_BLOCKS_MIN);
    }
    let now = fstatvfs(&root).map_err(failed)?;
    let bytes = now.f_blocks.saturating_mul(now.f_frsize);
    Ok(bytes >= device_bytes - device_bytes % BTRFS_SECTOR_BYTES)
}

/// Grows an xfs or btrfs to the size of its device through `mount`, which is writable.
///
/// # Errors
/// `INTERNAL` with the errno.
pub(crate) fn through_mount(
    kind: Kind,
    mount: BorrowedFd<'_>,
    device_bytes: u64,
) -> Result<(), Status> {
    if fills(kind, mount, device_bytes)? {
        return Ok(());
    }
    let failed = |errno| {
        Status::internal(format!(
            "cannot grow {kind} to its device's {device_bytes} bytes: {errno}"
        ))
    };
    let root = root(mount)?;
    if kind == Kind::Btrfs {
        return sys::btrfs_grow(&root).map_err(failed);
    }
    let now = sys::xfs_geometry(&root).map_err(failed)?;
    let blocks = device_bytes / u64::from(now.block_bytes.max(1));
    sys::xfs_grow(&root, now, blocks).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::command::present;
    use crate::node::fs;

    #[test]
    fn output_of_dumpe2fs_is_parsed() {
        let header =
            "Filesystem UUID: x\nBlock count:              16384\nBlock size:       4096\n";
        assert_eq!(ext4_bytes(header), Some(64 << 20));
        assert_eq!(ext4_bytes("Block count: 18446744073709551615\nBlock size: 4096\n"), None);
        assert_eq!(ext4_bytes("Block size: 4096\n"), None);
    }

    #[tokio::test]
    async fn an_ext4_grows_unmounted() {
        if !present(&["mkfs.ext4", "e2fsck", "resize2fs", "dumpe2fs"]) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ext4");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(16 << 20).unwrap();
        fs::format(Kind::Ext4, &path, "").await.unwrap();
        file.set_len(32 << 20).unwrap();
        assert!(!ext4_fills(&path, 32 << 20).await.unwrap());
        for _ in 0..2 {
            unmounted_ext4(&path, 32 << 20).await.unwrap();
            assert!(ext4_fills(&path, 32 << 20).await.unwrap());
        }
    }
}
