//! What CSI needs to remember of a volume, as labels in the pool's catalogue. They are written by
//! the record that makes the volume. Sizes, sources and limits are properties of the volume
//! itself.

/// File system of a volume for mounts: `ext4`, `xfs` or `btrfs`; the one that it was asked with, and
/// for a copy of which none was asked, that of its source. Snapshots have that of their volume.
pub const FS_TYPE: &str = "csi.pando.dev/fs-type";
/// More arguments for mkfs, separated by blanks.
pub const MKFS_OPTIONS: &str = "csi.pando.dev/mkfs-options";
/// Kind of device to make of it: `auto`, `ublk`, `nbd` or `loop`.
pub const DEVICE_KIND: &str = "csi.pando.dev/device-kind";
/// How it is used: [`ACCESS_MOUNT`] or [`ACCESS_BLOCK`].
pub const ACCESS: &str = "csi.pando.dev/access";
/// What kind of object it was made from, if any: [`SOURCE_VOLUME`] or [`SOURCE_SNAPSHOT`].
pub const SOURCE: &str = "csi.pando.dev/source";
/// `true`: its clones and snapshots are made while its file system is frozen.
pub const FREEZE: &str = "csi.pando.dev/freeze";
/// The limits that it was asked with; the present ones are properties of the volume.
pub const LIMITS: &str = "csi.pando.dev/limits";
/// Namespace and name of the claim that it was made for, for people.
pub const CLAIM: &str = "csi.pando.dev/claim";
/// Name of the group that a snapshot was taken in, as CSI has it.
pub const GROUP: &str = "csi.pando.dev/group";
/// Number of that group, the same for all its members.
pub const GROUP_ID: &str = "csi.pando.dev/group-id";
/// [`DONE`]: the file system of a clone has an identity of its own. Written by the node.
pub const IDENTITY: &str = "csi.pando.dev/identity";
/// [`TRUE`]: the node began to format the volume and has not finished. What is on it may be
/// formatted again. Copies of such a volume have the label as well.
pub const FORMATTING: &str = "csi.pando.dev/formatting";
/// [`TRUE`]: the node unmounted the staged volume to grow it and has not mounted it again yet.
pub const RESTAGING: &str = "csi.pando.dev/restaging";
/// [`TRUE`]: the node froze its file system and has not thawed it yet.
pub const FROZEN: &str = "csi.pando.dev/frozen";
/// [`TRUE`]: a copy that is to be clean, of which nobody knows yet whether it is. A call that comes
/// again deletes it and makes another.
pub const UNPROVEN: &str = "csi.pando.dev/unproven";

/// Value of [`ACCESS`]: a file system is mounted from it.
pub const ACCESS_MOUNT: &str = "mount";
/// Value of [`ACCESS`]: it is a block device.
pub const ACCESS_BLOCK: &str = "block";
/// Value of [`SOURCE`]: a volume.
pub const SOURCE_VOLUME: &str = "volume";
/// Value of [`SOURCE`]: a snapshot.
pub const SOURCE_SNAPSHOT: &str = "snapshot";
/// Value of what is a matter of yes or no.
pub const TRUE: &str = "true";
/// Value of [`IDENTITY`].
pub const DONE: &str = "done";
