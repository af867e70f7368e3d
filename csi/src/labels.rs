//! Keys and values of the labels in the pool's catalogue that keep the CSI properties of a volume.
//! The record that creates the volume contains them. Sizes, sources and limits are properties of
//! the volume itself.

/// File system of a volume for mounts: `ext4`, `xfs` or `btrfs`, as requested; for a copy whose
/// request names none, that of its source. Snapshots have that of their volume.
pub const FS_TYPE: &str = "csi.pando.dev/fs-type";
/// Additional arguments for mkfs, separated by spaces.
pub const MKFS_OPTIONS: &str = "csi.pando.dev/mkfs-options";
/// Kind of device to attach it as: `auto`, `ublk`, `nbd` or `loop`.
pub const DEVICE_KIND: &str = "csi.pando.dev/device-kind";
/// How it is used: [`ACCESS_MOUNT`] or [`ACCESS_BLOCK`].
pub const ACCESS: &str = "csi.pando.dev/access";
/// Kind of its source, if it has one: [`SOURCE_VOLUME`] or [`SOURCE_SNAPSHOT`].
pub const SOURCE: &str = "csi.pando.dev/source";
/// [`TRUE`]: its file system is frozen while clones and snapshots of it are created.
pub const FREEZE: &str = "csi.pando.dev/freeze";
/// The limits of the request that created it. The current ones are properties of the volume.
pub const LIMITS: &str = "csi.pando.dev/limits";
/// Namespace and name of the claim that it was created for, as information for people.
pub const CLAIM: &str = "csi.pando.dev/claim";
/// CSI name of the group that a snapshot belongs to.
pub const GROUP: &str = "csi.pando.dev/group";
/// Number of that group, the same for all its members.
pub const GROUP_ID: &str = "csi.pando.dev/group-id";
/// [`DONE`]: the file system of a clone has an identity of its own. The node writes it.
pub const IDENTITY: &str = "csi.pando.dev/identity";
/// [`TRUE`]: the node began to format the volume and has not finished, so the volume may be
/// formatted again. Copies of such a volume have the label as well.
pub const FORMATTING: &str = "csi.pando.dev/formatting";
/// [`TRUE`]: the node unmounted the staged volume to grow it and has not mounted it again yet.
pub const RESTAGING: &str = "csi.pando.dev/restaging";
/// [`TRUE`]: the node froze its file system and has not thawed it yet.
pub const FROZEN: &str = "csi.pando.dev/frozen";
/// [`TRUE`]: a copy that must be clean, but has not been proven to be. A repeated call deletes it
/// and creates another.
pub const UNPROVEN: &str = "csi.pando.dev/unproven";

/// Value of [`ACCESS`]: a file system is mounted from it.
pub const ACCESS_MOUNT: &str = "mount";
/// Value of [`ACCESS`]: it is a block device.
pub const ACCESS_BLOCK: &str = "block";
/// Value of [`SOURCE`]: a volume.
pub const SOURCE_VOLUME: &str = "volume";
/// Value of [`SOURCE`]: a snapshot.
pub const SOURCE_SNAPSHOT: &str = "snapshot";
/// Value of labels that are either set or absent.
pub const TRUE: &str = "true";
/// Value of [`IDENTITY`].
pub const DONE: &str = "done";
