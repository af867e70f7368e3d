//! The answers as JSON. Programs depend on these names: fields may be added, never renamed.

use std::collections::BTreeMap;

use pando_engine::pool::CheckReport;
use pando_proto::v1;
use serde::Serialize;

#[derive(Debug, Serialize)]
pub(crate) struct Volume {
    pub id: u64,
    pub name: String,
    pub kind: Kind,
    pub size_bytes: u64,
    pub read_only: bool,
    pub source_id: Option<u64>,
    pub source_name: Option<String>,
    pub source_deleted: bool,
    pub reservation_bytes: u64,
    pub growth_limit_bytes: u64,
    pub iops_limit: u64,
    pub bandwidth_limit_bytes: u64,
    pub labels: BTreeMap<String, String>,
    pub created_at: u64,
    pub mapped_bytes: u64,
    pub own_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub space: Option<Space>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exports: Vec<Export>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attachment: Option<Attachment>,
}

/// What sort of volume it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Volume,
    Clone,
    Snapshot,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Volume => "volume",
            Self::Clone => "clone",
            Self::Snapshot => "snapshot",
        }
    }
}

impl From<v1::Volume> for Volume {
    fn from(volume: v1::Volume) -> Self {
        let kind = match (volume.snapshot, volume.source_id) {
            (true, _) => Kind::Snapshot,
            (false, Some(_)) => Kind::Clone,
            (false, None) => Kind::Volume,
        };
        Self {
            id: volume.id,
            name: volume.name,
            kind,
            size_bytes: volume.size_bytes,
            read_only: volume.read_only,
            source_id: volume.source_id,
            source_name: Some(volume.source_name).filter(|name| !name.is_empty()),
            source_deleted: volume.source_deleted,
            reservation_bytes: volume.reservation_bytes,
            growth_limit_bytes: volume.growth_limit_bytes,
            iops_limit: volume.iops_limit,
            bandwidth_limit_bytes: volume.bandwidth_limit_bytes,
            labels: volume.labels,
            created_at: volume.created_at,
            mapped_bytes: volume.mapped_bytes,
            own_bytes: volume.own_bytes,
            space: None,
            exports: Vec::new(),
            attachment: None,
        }
    }
}

impl From<v1::GetVolumeResponse> for Volume {
    fn from(answer: v1::GetVolumeResponse) -> Self {
        Self {
            space: answer.space.map(Space::from),
            exports: answer.exports.into_iter().map(Export::from).collect(),
            attachment: answer.attachment.map(Attachment::from),
            ..Self::from(answer.volume.unwrap_or_default())
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Space {
    pub mapped_bytes: u64,
    pub exclusive_bytes: u64,
    pub shared_bytes: u64,
    pub freed_if_deleted_bytes: u64,
}

impl From<v1::SpaceReport> for Space {
    fn from(space: v1::SpaceReport) -> Self {
        Self {
            mapped_bytes: space.mapped_bytes,
            exclusive_bytes: space.exclusive_bytes,
            shared_bytes: space.shared_bytes,
            freed_if_deleted_bytes: space.freed_if_deleted_bytes,
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Export {
    pub volume_id: u64,
    pub volume_name: String,
    pub kind: &'static str,
    pub uri: String,
    pub path: String,
    pub read_only: bool,
}

impl From<v1::Export> for Export {
    fn from(export: v1::Export) -> Self {
        let kind = match export.kind() {
            v1::ExportKind::NbdUnix => "nbd-unix",
            v1::ExportKind::Unspecified => "unknown",
        };
        Self {
            volume_id: export.volume_id,
            volume_name: export.volume_name,
            kind,
            uri: export.uri,
            path: export.path,
            read_only: export.read_only,
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Attachment {
    pub volume_id: u64,
    pub volume_name: String,
    pub kind: &'static str,
    pub device: String,
    pub major: u32,
    pub minor: u32,
    pub read_only: bool,
    pub sector_bytes: u32,
    pub identity: String,
    pub passed_over: Vec<String>,
}

impl From<v1::Attachment> for Attachment {
    fn from(attachment: v1::Attachment) -> Self {
        let kind = match attachment.kind() {
            v1::DeviceKind::Ublk => "ublk",
            v1::DeviceKind::Nbd => "nbd",
            v1::DeviceKind::Loop => "loop",
            v1::DeviceKind::Unspecified => "unknown",
        };
        Self {
            volume_id: attachment.volume_id,
            volume_name: attachment.volume_name,
            kind,
            device: attachment.device,
            major: attachment.major,
            minor: attachment.minor,
            read_only: attachment.read_only,
            sector_bytes: attachment.sector_bytes,
            identity: attachment.identity,
            passed_over: attachment.passed_over,
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Extent {
    pub offset: u64,
    pub length: u64,
    /// Whether the volume, of a difference the newer one, holds data there.
    pub mapped: bool,
}

impl From<v1::Extent> for Extent {
    fn from(extent: v1::Extent) -> Self {
        Self { offset: extent.offset, length: extent.length, mapped: true }
    }
}

impl From<v1::ChangedExtent> for Extent {
    fn from(extent: v1::ChangedExtent) -> Self {
        Self { offset: extent.offset, length: extent.length, mapped: extent.mapped }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Pool {
    /// `good`, `warning`, `full` or `poisoned`.
    pub health: &'static str,
    pub uuid: String,
    pub path: String,
    pub size_bytes: u64,
    pub usable_bytes: u64,
    pub free_bytes: u64,
    pub available_bytes: u64,
    pub pending_bytes: u64,
    pub reserve_bytes: u64,
    pub provisioned_bytes: u64,
    pub reserved_bytes: u64,
    pub volumes: u64,
    pub snapshots: u64,
    pub generation: u32,
    pub sequence_number: u64,
    pub journal_used_bytes: u64,
    pub journal_bytes: u64,
    pub deletions_pending: u64,
    pub poisoned: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub daemon_version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counters: Option<Counters>,
}

impl Pool {
    /// Part of the usable space that is taken, in percent.
    pub(crate) fn used_percent(&self) -> u64 {
        let used = self.usable_bytes.saturating_sub(self.free_bytes);
        (used.saturating_mul(100)).checked_div(self.usable_bytes).unwrap_or(0)
    }
}

/// The part of the pool in use from which on there is a warning, in percent: the daemon's first
/// watermark.
const WARNING_PERCENT: u64 = 80;

fn health(pool: &v1::Pool) -> &'static str {
    let used = pool.usable_bytes.saturating_sub(pool.free_bytes.saturating_add(pool.pending_bytes));
    let warns =
        u128::from(used) * 100 >= u128::from(WARNING_PERCENT) * u128::from(pool.usable_bytes);
    if !pool.poisoned.is_empty() {
        "poisoned"
    } else if pool.available_bytes == 0 && pool.pending_bytes == 0 {
        "full"
    } else if warns {
        "warning"
    } else {
        "good"
    }
}

impl From<v1::Pool> for Pool {
    fn from(pool: v1::Pool) -> Self {
        Self {
            health: health(&pool),
            available_bytes: pool.available_bytes,
            uuid: pool.uuid,
            path: pool.path,
            size_bytes: pool.size_bytes,
            usable_bytes: pool.usable_bytes,
            free_bytes: pool.free_bytes,
            pending_bytes: pool.pending_bytes,
            reserve_bytes: pool.reserve_bytes,
            provisioned_bytes: pool.provisioned_bytes,
            reserved_bytes: pool.reserved_bytes,
            volumes: pool.volumes,
            snapshots: pool.snapshots,
            generation: pool.generation,
            sequence_number: pool.sequence_number,
            journal_used_bytes: pool.journal_used_bytes,
            journal_bytes: pool.journal_bytes,
            deletions_pending: pool.deletions_pending,
            poisoned: Some(pool.poisoned).filter(|why| !why.is_empty()),
            daemon_version: None,
            counters: None,
        }
    }
}

impl From<v1::PoolStatusResponse> for Pool {
    fn from(answer: v1::PoolStatusResponse) -> Self {
        Self {
            daemon_version: Some(answer.daemon_version),
            counters: answer.counters.map(Counters::from),
            ..Self::from(answer.pool.unwrap_or_default())
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Counters {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub data_bytes: u64,
    pub metadata_bytes: u64,
    pub journal_bytes: u64,
    pub flushes: u64,
    pub syncs: u64,
    pub checkpoints: u64,
    pub no_space: u64,
    pub checksum_errors: u64,
    pub metadata_reads: u64,
}

impl From<v1::PoolCounters> for Counters {
    fn from(counters: v1::PoolCounters) -> Self {
        Self {
            reads: counters.reads,
            read_bytes: counters.read_bytes,
            writes: counters.writes,
            written_bytes: counters.written_bytes,
            data_bytes: counters.data_bytes,
            metadata_bytes: counters.metadata_bytes,
            journal_bytes: counters.journal_bytes,
            flushes: counters.flushes,
            syncs: counters.syncs,
            checkpoints: counters.checkpoints,
            no_space: counters.no_space,
            checksum_errors: counters.checksum_errors,
            metadata_reads: counters.metadata_reads,
        }
    }
}

/// A volume that was copied into a file or device.
#[derive(Debug, Serialize)]
pub(crate) struct Copied {
    pub volume_id: u64,
    pub volume_name: String,
    pub path: String,
    pub size_bytes: u64,
}

/// A pool that was made.
#[derive(Debug, Serialize)]
pub(crate) struct CreatedPool {
    pub path: String,
    pub uuid: String,
    pub size_bytes: u64,
}

/// Result of a check: sound if there are no findings.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Check {
    pub generation: u32,
    pub nodes: u64,
    pub data_blocks: u64,
    pub findings: Vec<Finding>,
    /// Findings that are not listed.
    pub omitted: u64,
}

impl From<CheckReport> for Check {
    fn from(report: CheckReport) -> Self {
        let findings = report.findings.into_iter().map(|finding| Finding {
            code: finding.code,
            kind: finding.kind,
            what: finding.what,
        });
        Self {
            generation: report.generation,
            nodes: report.nodes,
            data_blocks: report.data_blocks,
            findings: findings.collect(),
            omitted: report.more,
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Finding {
    pub code: String,
    pub kind: String,
    pub what: String,
}

/// Result of a scrub.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Scrub {
    pub blocks: u64,
    pub errors: Vec<ScrubError>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ScrubError {
    pub block: u64,
    pub what: String,
}
