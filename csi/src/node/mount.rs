//! Mounts through descriptors (fsopen(2), fsmount(2), open_tree(2), move_mount(2)).
//!
//! ```text
//! file system   fsopen -> fsconfig -> create -> fsmount --+
//! bind          open_tree of the staged volume -----------+--> a detached mount
//!                                                              its attributes are set
//!                                                              move_mount onto the target
//! ```
//!
//! A mount is complete before it becomes visible, and closing the descriptor of a detached mount
//! unmounts it: a crash in between leaves nothing behind. These calls can block on a slow device,
//! so they run on blocking threads.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    open_tree, unmount as unmount_path,
};
use tonic::Status;

use super::fs::Kind;
use super::grow;
use super::options::MountOptions;
use super::paths::Place;
use super::sys;

/// Maximum length of a kernel message about a failed mount.
const MESSAGE_BYTES: usize = 1024;
/// Maximum number of messages that are read.
const MESSAGES_MAX: usize = 8;

/// As [`file_system`], but a read-only xfs or btrfs is first grown to the size of its device.
///
/// # Errors
/// As [`file_system`]; `INTERNAL`: it cannot grow.
pub(crate) fn grown_file_system(
    kind: Kind,
    (device, device_bytes): (&Path, u64),
    options: &MountOptions,
) -> Result<OwnedFd, Status> {
    let mounted = file_system(kind, device, options)?;
    let grows = options.read_only() && kind != Kind::Ext4;
    if !grows || grow::fills(kind, mounted.as_fd(), device_bytes)? {
        return Ok(mounted);
    }
    // The kernel does not mount one device read-only and writable at the same time.
    drop(mounted);
    grow::through_mount(kind, file_system(kind, device, &detached())?.as_fd(), device_bytes)?;
    file_system(kind, device, options)
}

/// Creates a detached mount of the file system on `device`. [`attach`] attaches it to a path;
/// dropping it unmounts it.
///
/// # Errors
/// `INTERNAL` with the message of the kernel; `INVALID_ARGUMENT`: the kernel refuses an option.
pub(crate) fn file_system(
    kind: Kind,
    device: &Path,
    options: &MountOptions,
) -> Result<OwnedFd, Status> {
    let shown = device.display();
    let context = fsopen(kind.name(), FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|errno| Status::internal(format!("this kernel cannot mount {kind}: {errno}")))?;
    let refused = |option: &str, errno: Errno| {
        let messages = messages(&context);
        Status::invalid_argument(format!("{kind} refuses the option {option}: {errno}{messages}"))
    };
    fsconfig_set_string(context.as_fd(), "source", device)
        .map_err(|errno| Status::internal(format!("{shown}: {errno}{}", messages(&context))))?;
    if options.read_only() {
        fsconfig_set_flag(context.as_fd(), "ro").map_err(|errno| refused("ro", errno))?;
    }
    // A copy has the UUID of its source, and a mount of a dead device may have the same UUID.
    // Options of a class cannot set it twice: `MountOptions` drops it.
    if kind == Kind::Xfs {
        fsconfig_set_flag(context.as_fd(), "nouuid").map_err(|errno| refused("nouuid", errno))?;
    }
    for (name, value) in options.parameters(selinux()) {
        let set = match value {
            Some(value) => fsconfig_set_string(context.as_fd(), name, value),
            None => fsconfig_set_flag(context.as_fd(), name),
        };
        set.map_err(|errno| refused(name, errno))?;
    }
    let failed = |errno: Errno| {
        Status::internal(format!("cannot mount {kind} on {shown}: {errno}{}", messages(&context)))
    };
    fsconfig_create(context.as_fd()).map_err(failed)?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, options.attributes).map_err(failed)
}

/// Whether the kernel runs with SELinux: then it supports selinuxfs, whether that is mounted or
/// not.
fn selinux() -> bool {
    let supported = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    supported.lines().any(|line| line.ends_with("\tselinuxfs"))
}

/// The messages of the kernel about the context of a mount, to be appended to an errno.
fn messages(context: &OwnedFd) -> String {
    let mut messages = String::new();
    let mut message = [0; MESSAGE_BYTES];
    for _ in 0..MESSAGES_MAX {
        let Ok(length) = rustix::io::read(context, &mut message) else { break };
        let text = String::from_utf8_lossy(message.get(..length).unwrap_or_default());
        // "e " is an error, "w " a warning, "i " information.
        let text = text.trim_end().get(2..).unwrap_or_default();
        messages.push_str(if messages.is_empty() { ": " } else { "; " });
        messages.push_str(text);
    }
    messages
}

/// Attaches a detached mount to `target`, an open file or directory.
///
/// # Errors
/// `INTERNAL` with the errno.
pub(crate) fn attach(mount: &OwnedFd, target: &OwnedFd, place: &Place) -> Result<(), Status> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount.as_fd(), "", target.as_fd(), "", flags)
        .map_err(|errno| place.failed("cannot attach the mount", &errno))
}

/// Bind mounts `source`, a directory or a device node, onto `target`.
///
/// # Errors
/// `INTERNAL` with the errno.
pub(crate) fn bind(
    source: BorrowedFd<'_>,
    read_only: bool,
    target: &OwnedFd,
    place: &Place,
) -> Result<(), Status> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(source, "", flags)
        .map_err(|errno| place.failed("cannot clone the staged mount", &errno))?;
    if read_only {
        sys::make_read_only(tree.as_fd())
            .map_err(|errno| place.failed("cannot make the mount read-only", &errno))?;
    }
    attach(&tree, target, place)
}

/// How to unmount.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unmount {
    /// Fails while it is in use. When it returns, the file system has released its device.
    WhenUnused,
    /// Detaches it from its path at once; it ends with its last user. For file systems whose device
    /// is gone.
    Detached,
}

/// Unmounts the topmost mount at a place; succeeds if nothing is mounted there. Follows no link and
/// does not access the file system.
///
/// # Errors
/// `FAILED_PRECONDITION`: in use; `INTERNAL` with the errno.
pub(crate) fn unmount(place: &Place, how: Unmount) -> Result<(), Status> {
    let flags = match how {
        Unmount::WhenUnused => UnmountFlags::NOFOLLOW,
        Unmount::Detached => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
    };
    match unmount_path(place.through_parent(), flags) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(Errno::BUSY) => Err(Status::failed_precondition(format!(
            "{} is in use: end the processes that have files open there",
            place.shown()
        ))),
        Err(errno) => Err(place.failed("cannot unmount", &errno)),
    }
}

/// Mounts the file system on `device` and unmounts it again, so that the kernel replays its log.
///
/// # Errors
/// As [`file_system`].
pub(crate) fn replay_log(kind: Kind, device: &Path) -> Result<(), Status> {
    file_system(kind, device, &detached()).map(drop)
}

/// Options of a mount that is never attached: it exists only for what the kernel does with it.
fn detached() -> MountOptions {
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    MountOptions { attributes, settings: Vec::new(), contexts: Vec::new() }
}
