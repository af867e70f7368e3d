//! Arguments and results of the pool's operations: plain data, no behaviour. Times are seconds
//! since the epoch and come from the caller, because the engine has no wall clock.

use std::collections::BTreeMap;

pub use crate::format::catalogue::IoLimits;
use crate::units::VolumeId;

/// Origin of a volume's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// None: an empty volume.
    Empty,
    /// Another volume or a snapshot, as of the operation.
    Volume(VolumeId),
}

/// Request to create a volume, a clone or a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateVolume {
    /// Unique name in the pool, 1 to 253 bytes of `[A-Za-z0-9._-]`, not starting with `-` or `.`.
    pub name: String,
    /// Bytes, a multiple of 512. `None` means the size of the source (clone and snapshot only).
    pub size_bytes: Option<u64>,
    /// The source to share blocks with.
    pub source: Source,
    /// Create a snapshot: never writable, with the size of its source.
    pub snapshot: bool,
    /// Refuse writes; the flag can be cleared later.
    pub read_only: bool,
    /// Bytes reserved for the volume: within them it never gets ENOSPC.
    pub reservation_bytes: u64,
    /// Bytes by which the volume may grow the pool's usage; 0 means no limit.
    pub growth_limit_bytes: u64,
    /// Limits of reads and writes.
    pub io_limits: IoLimits,
    /// Free text for users and programs.
    pub labels: BTreeMap<String, String>,
    /// Seconds since the epoch.
    pub created_at: u64,
}

/// Changes to an existing volume; `None` leaves a property unchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModifyVolume {
    /// New size in bytes; it cannot be smaller.
    pub size_bytes: Option<u64>,
    /// Refuse or accept writes.
    pub read_only: Option<bool>,
    /// New reservation in bytes.
    pub reservation_bytes: Option<u64>,
    /// New growth limit in bytes; 0 means no limit.
    pub growth_limit_bytes: Option<u64>,
    /// New limit of requests per second; 0 means no limit.
    pub iops_limit: Option<u64>,
    /// New limit of bytes per second; 0 means no limit.
    pub bandwidth_limit_bytes: Option<u64>,
    /// Labels to set; an empty value removes the label.
    pub labels: BTreeMap<String, String>,
}

/// A volume or snapshot in the catalogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Id; never reused.
    pub id: VolumeId,
    /// Unique name.
    pub name: String,
    /// Bytes.
    pub size_bytes: u64,
    /// Whether it is a snapshot.
    pub snapshot: bool,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Its source; that may be deleted by now.
    pub source: Source,
    /// Bytes reserved.
    pub reservation_bytes: u64,
    /// Bytes by which it may grow the pool's usage; 0 means no limit.
    pub growth_limit_bytes: u64,
    /// Limits of reads and writes.
    pub io_limits: IoLimits,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Seconds since the epoch.
    pub created_at: u64,
    /// Bytes of blocks that its map names, shared or not. Exact; takes constant time.
    pub mapped_bytes: u64,
    /// Bytes written since the last clone or snapshot that it took part in; no other volume shares
    /// them. A lower bound of [`SpaceReport::exclusive_bytes`]; takes constant time.
    pub own_bytes: u64,
}

/// Exact space of one volume, from a walk of its map and the reference counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceReport {
    /// Bytes of data blocks named by the map.
    pub mapped_bytes: u64,
    /// Bytes of data blocks that no other volume names.
    pub exclusive_bytes: u64,
    /// `mapped_bytes - exclusive_bytes`.
    pub shared_bytes: u64,
    /// Bytes freed if the volume is deleted: exclusive data and map nodes.
    pub freed_if_deleted_bytes: u64,
}

/// Summary of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolStatus {
    /// Identity of the pool.
    pub uuid: [u8; 16],
    /// Bytes of the device or file that the pool uses.
    pub size_bytes: u64,
    /// Bytes usable for data and nodes.
    pub usable_bytes: u64,
    /// Bytes that are free now.
    pub free_bytes: u64,
    /// Bytes of freed blocks that become free with the next checkpoint or by background deletion
    /// (an estimate).
    pub pending_bytes: u64,
    /// Bytes that growth must leave for checkpoints, deletions and overwrites.
    pub reserve_bytes: u64,
    /// Sum of the volumes' sizes.
    pub provisioned_bytes: u64,
    /// Promises to the volumes that are not used yet: unmet reservations, and the nodes to copy of
    /// shared maps.
    pub reserved_bytes: u64,
    /// Volumes, without snapshots.
    pub volumes: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// Generation of the last checkpoint.
    pub generation: u32,
    /// Sequence number of the last record.
    pub seqno: u64,
    /// Bytes of the journal in use.
    pub journal_used_bytes: u64,
    /// Size of the journal.
    pub journal_bytes: u64,
    /// Dropped map nodes whose space is not freed yet.
    pub deletions_pending: u64,
    /// The reason why no change is accepted, if the pool is poisoned.
    pub poisoned: Option<String>,
}

/// Counters since the pool was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolCounters {
    /// Reads at the volume interface.
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
    /// Flushes requested by users.
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

/// A run in which two volumes differ or, without an old side, a mapped run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangedRun {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Whether the newer side maps it. If not, it reads as zeros there.
    pub mapped: bool,
}
