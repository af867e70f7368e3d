//! Mounting through descriptors (fsopen(2), fsmount(2), open_tree(2), move_mount(2)).
//!
//! ```text
//! file system   fsopen -> fsconfig -> create -> fsmount --+
//! bind          open_tree of what is staged --------------+--> a mount that is nowhere yet
//!                                                              its attributes are set
//!                                                              move_mount onto the place
//! ```
//!
//! A mount is complete before anybody sees it, and one that is attached nowhere goes with its
//! descriptor: a crash in between leaves nothing. These calls can block on a slow device; they are
//! made on threads for that.

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

/// Bytes of one message of the kernel about a mount that fails.
const MESSAGE_BYTES: usize = 1024;
/// Messages that are read.
const MESSAGES_MAX: usize = 8;

/// Mounts the file system on `device`, nowhere yet: [`attach`] gives it a place, dropping it
/// unmounts it. One that is to be read-only is made as large as its device first, if it is an xfs
/// or btrfs.
///
/// # Errors
/// As [`file_system`]; `INTERNAL` if it cannot grow.
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
    // The kernel does not give one device two file systems, one of them read-only.
    drop(mounted);
    grow::by_mount(kind, file_system(kind, device, &nowhere())?.as_fd(), device_bytes)?;
    file_system(kind, device, options)
}

/// Mounts the file system on `device`, nowhere yet: [`attach`] gives it a place, dropping it
/// unmounts it.
///
/// # Errors
/// `INTERNAL` with the kernel's words; `INVALID_ARGUMENT` if it does not take one of the options.
pub(crate) fn file_system(
    kind: Kind,
    device: &Path,
    options: &MountOptions,
) -> Result<OwnedFd, Status> {
    let shown = device.display();
    let context = fsopen(kind.name(), FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|errno| Status::internal(format!("this kernel cannot mount {kind}: {errno}")))?;
    let refused = |option: &str, errno: Errno| {
        let words = words(&context);
        Status::invalid_argument(format!("{kind} refuses the option {option}: {errno}{words}"))
    };
    fsconfig_set_string(context.as_fd(), "source", device)
        .map_err(|errno| Status::internal(format!("{shown}: {errno}{}", words(&context))))?;
    if options.read_only() {
        fsconfig_set_flag(context.as_fd(), "ro").map_err(|errno| refused("ro", errno))?;
    }
    // A copy has the UUID of its source, and so has the mount of a device that has died. The option
    // is set here alone: a class may name it as well.
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
        Status::internal(format!("cannot mount {kind} on {shown}: {errno}{}", words(&context)))
    };
    fsconfig_create(context.as_fd()).map_err(failed)?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, options.attributes).map_err(failed)
}

/// Whether the kernel runs with SELinux: it has its file system then, mounted here or not.
fn selinux() -> bool {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    known.lines().any(|line| line.ends_with("\tselinuxfs"))
}

/// What the kernel says about the context of a mount, ready to be put after an errno.
fn words(context: &OwnedFd) -> String {
    let mut words = String::new();
    let mut message = [0; MESSAGE_BYTES];
    for _ in 0..MESSAGES_MAX {
        let Ok(length) = rustix::io::read(context, &mut message) else { break };
        let text = String::from_utf8_lossy(message.get(..length).unwrap_or_default());
        // "e " is an error, "w " a warning, "i " information.
        let text = text.trim_end().get(2..).unwrap_or_default();
        words.push_str(if words.is_empty() { ": " } else { "; " });
        words.push_str(text);
    }
    words
}

/// Gives a mount that is nowhere yet its place: onto `target`, an open file or directory there.
///
/// # Errors
/// `INTERNAL` with the errno.
pub(crate) fn attach(mount: &OwnedFd, target: &OwnedFd, place: &Place) -> Result<(), Status> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount.as_fd(), "", target.as_fd(), "", flags)
        .map_err(|errno| place.failed("cannot mount there", &errno))
}

/// Mounts what `source` is, a directory or a device node, onto `target` as well.
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
        .map_err(|errno| place.failed("cannot take what is staged", &errno))?;
    if read_only {
        sys::make_read_only(tree.as_fd())
            .map_err(|errno| place.failed("cannot make it read-only", &errno))?;
    }
    attach(&tree, target, place)
}

/// How to unmount.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unmount {
    /// Fails while it is in use; when it returns, the file system has let go of its device.
    Whole,
    /// Takes it away from its place at once, and ends it with its last user. For file systems
    /// whose device is gone.
    Detached,
}

/// Unmounts what is mounted at the place, the topmost of several. No link is followed, and the
/// file system itself is not asked.
///
/// # Errors
/// `FAILED_PRECONDITION`: in use; `INTERNAL` with the errno. Nothing mounted there is no error.
pub(crate) fn unmount(place: &Place, how: Unmount) -> Result<(), Status> {
    let flags = match how {
        Unmount::Whole => UnmountFlags::NOFOLLOW,
        Unmount::Detached => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
    };
    match unmount_path(place.through_parent(), flags) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(Errno::BUSY) => Err(Status::failed_precondition(format!(
            "{}: in use; end what has files open there",
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
    file_system(kind, device, &nowhere()).map(drop)
}

/// Options of a mount that is attached nowhere, for what the kernel does while it is there.
fn nowhere() -> MountOptions {
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    MountOptions { attributes, settings: Vec::new(), contexts: Vec::new() }
}
