//! What the pool's operations take and give: plain data, no behaviour. Times are seconds since
//! the epoch and come from the caller, because the engine knows no clock.

use std::collections::BTreeMap;

pub use crate::format::catalogue::IoLimits;
use crate::units::VolumeId;

/// What a volume was born of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nothing: an empty volume.
    Empty,
    /// Another volume or a snapshot, at the instant of the operation.
    Volume(VolumeId),
}

/// Request to make a volume, a clone or a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateVolume {
    /// Unique name in the pool, 1 to 253 bytes of `[A-Za-z0-9._-]`, not starting with `-` or `.`.
    pub name: String,
    /// Bytes, a multiple of 512; `None` means the source's size (clone and snapshot only).
    pub size_bytes: Option<u64>,
    /// What to share blocks with.
    pub source: Source,
    /// A frozen volume: never writable, size of its source.
    pub snapshot: bool,
    /// Writes are refused, but the flag may be cleared later.
    pub read_only: bool,
    /// Bytes that are promised to the volume: within them it never meets a full pool.
    pub reservation_bytes: u64,
    /// Bytes that it may add to the pool; 0 is no limit.
    pub growth_limit_bytes: u64,
    /// How fast it may be read and written.
    pub io_limits: IoLimits,
    /// Free text for people and programs.
    pub labels: BTreeMap<String, String>,
    /// Seconds since the epoch.
    pub created_at: u64,
}

/// Changes to a live volume; `None` leaves a property as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModifyVolume {
    /// New size in bytes; only growth.
    pub size_bytes: Option<u64>,
    /// Refuse or accept writes.
    pub read_only: Option<bool>,
    /// New reservation in bytes.
    pub reservation_bytes: Option<u64>,
    /// New growth limit in bytes; 0 is no limit.
    pub growth_limit_bytes: Option<u64>,
    /// New limit of requests in a second; 0 is no limit.
    pub iops_limit: Option<u64>,
    /// New limit of bytes in a second; 0 is no limit.
    pub bandwidth_limit_bytes: Option<u64>,
    /// Labels to set; an empty value removes the label.
    pub labels: BTreeMap<String, String>,
}

/// A volume or snapshot as the catalogue knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Identity; never used again.
    pub id: VolumeId,
    /// Unique name.
    pub name: String,
    /// Bytes.
    pub size_bytes: u64,
    /// Frozen.
    pub snapshot: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// What it was born of; the source may be gone by now.
    pub source: Source,
    /// Bytes promised.
    pub reservation_bytes: u64,
    /// Bytes that it may add; 0 is no limit.
    pub growth_limit_bytes: u64,
    /// How fast it may be read and written.
    pub io_limits: IoLimits,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Seconds since the epoch.
    pub created_at: u64,
    /// Bytes of blocks that its map names, shared or not. Exact, constant time.
    pub mapped_bytes: u64,
    /// Bytes written since it last took part in a clone or snapshot: its own for certain. A lower
    /// bound of [`SpaceReport::exclusive_bytes`], constant time.
    pub own_bytes: u64,
}

/// Exact space of one volume, by a walk of its map and the reference counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceReport {
    /// Bytes of data blocks named by the map.
    pub mapped_bytes: u64,
    /// Bytes of data blocks that no other volume names.
    pub exclusive_bytes: u64,
    /// `mapped_bytes - exclusive_bytes`.
    pub shared_bytes: u64,
    /// Bytes that come back if the volume is deleted: exclusive data and map nodes.
    pub freed_if_deleted_bytes: u64,
}

/// The pool at a glance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolStatus {
    /// Identity of the pool.
    pub uuid: [u8; 16],
    /// Bytes of the device or file in use.
    pub size_bytes: u64,
    /// Bytes that can hold data or nodes.
    pub usable_bytes: u64,
    /// Bytes free at once.
    pub free_bytes: u64,
    /// Bytes freed that come back with the next checkpoint or by background deletion (estimate).
    pub pending_bytes: u64,
    /// Bytes kept back for checkpoints, deletions and overwrites.
    pub reserve_bytes: u64,
    /// Sum of the volumes' sizes.
    pub provisioned_bytes: u64,
    /// Sum of what the volumes were promised and do not have yet: unmet reservations, and the nodes
    /// of what they share.
    pub reserved_bytes: u64,
    /// Volumes, without snapshots.
    pub volumes: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// Generation of the last checkpoint.
    pub generation: u32,
    /// Sequence number of the last record.
    pub seqno: u64,
    /// Bytes of the journal in use, and its size.
    pub journal_used_bytes: u64,
    /// Size of the journal.
    pub journal_bytes: u64,
    /// Roots of deleted maps whose space is still to be returned.
    pub deletions_pending: u64,
    /// Why no change is accepted, if so.
    pub poisoned: Option<String>,
}

/// Counters since the pool was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolCounters {
    /// Reads at the volume interface, and their bytes.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes at the volume interface.
    pub writes: u64,
    /// Bytes written by users.
    pub written_bytes: u64,
    /// Bytes of data blocks written to the device.
    pub data_bytes: u64,
    /// Bytes of nodes, tables and catalogue written to the device.
    pub metadata_bytes: u64,
    /// Bytes appended to the journal, padding included.
    pub journal_bytes: u64,
    /// Flushes asked for by users.
    pub flushes: u64,
    /// Syncs of the device.
    pub syncs: u64,
    /// Checkpoints written.
    pub checkpoints: u64,
    /// Writes refused for lack of space.
    pub no_space: u64,
    /// Data blocks whose checksum did not match.
    pub checksum_errors: u64,
    /// Map nodes and table pages read from the device.
    pub metadata_reads: u64,
    /// Bytes of free blocks discarded.
    pub discarded_bytes: u64,
}

/// A run of LBAs in which two volumes differ, or which one of them maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangedRun {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Whether the newer side maps it (false: it reads as zeros there).
    pub mapped: bool,
}
