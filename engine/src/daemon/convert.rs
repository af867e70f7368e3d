//! Between the engine's types and those of `pando.v1`. No decisions are made here.

use std::time::{SystemTime, UNIX_EPOCH};

use pando_proto::v1::volume_ref::By;
use pando_proto::{ERRNO_KEY, ERROR_KIND_KEY, HINT_KEY, v1};
use tonic::{Code, Status};

use crate::error::{Error, ErrorKind, Result};
use crate::export::driver::DeviceKind;
use crate::limits::LABELS_MAX;
use crate::pool::{
    ChangedRun, CreateVolume, IoLimits, ModifyVolume, Pool, PoolCounters, PoolStatus, Source,
    SpaceReport, VolumeInfo,
};
use crate::units::VolumeId;

/// Label in which the daemon keeps the name of a clone's source, which may be deleted. Clients see
/// it as `source_name`.
const SOURCE_LABEL: &str = "pando/source";

/// The stable name of a kind of error, and the gRPC code that goes with it. The table stands in
/// pando.proto as well.
const fn kind_name(kind: ErrorKind) -> (&'static str, Code) {
    match kind {
        ErrorKind::NotFound => ("not_found", Code::NotFound),
        ErrorKind::Exists => ("exists", Code::AlreadyExists),
        ErrorKind::Invalid => ("invalid", Code::InvalidArgument),
        ErrorKind::NoSpace => ("no_space", Code::ResourceExhausted),
        ErrorKind::Limit => ("limit", Code::ResourceExhausted),
        ErrorKind::ReadOnly => ("read_only", Code::FailedPrecondition),
        ErrorKind::Busy => ("busy", Code::FailedPrecondition),
        ErrorKind::NotAPool => ("not_a_pool", Code::FailedPrecondition),
        ErrorKind::Unsupported => ("unsupported", Code::Unimplemented),
        ErrorKind::Corrupt => ("corrupt", Code::DataLoss),
        ErrorKind::Checksum => ("checksum", Code::DataLoss),
        ErrorKind::Io => ("io", Code::Internal),
        ErrorKind::Poisoned => ("poisoned", Code::FailedPrecondition),
        ErrorKind::Shutdown => ("shutdown", Code::Unavailable),
    }
}

/// An engine's error as a gRPC status with its trailers.
impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let (name, code) = kind_name(error.kind());
        let mut status = Self::new(code, error.to_string());
        let trailers = status.metadata_mut();
        trailers.insert(ERROR_KIND_KEY, tonic::metadata::MetadataValue::from_static(name));
        trailers.insert(ERRNO_KEY, error.errno().into());
        // A path in it may not be ASCII: the message does without.
        if let Some(hint) = error.hint_text().and_then(|hint| hint.parse().ok()) {
            trailers.insert(HINT_KEY, hint);
        }
        status
    }
}

/// Seconds since the epoch.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The volume that a reference names.
pub(super) fn resolve(pool: &Pool, reference: Option<v1::VolumeRef>) -> Result<VolumeInfo> {
    match reference.and_then(|reference| reference.by) {
        Some(By::Id(id)) => pool.get(VolumeId::new(id)),
        Some(By::Name(name)) => pool.find(&name),
        None => Err(Error::invalid("request names no volume: set its id or its name")),
    }
}

pub(super) fn create_request(
    pool: &Pool,
    request: v1::CreateVolumeRequest,
) -> Result<CreateVolume> {
    let source = match request.source {
        None => None,
        some => Some(resolve(pool, some)?),
    };
    if request.must_be_new && pool.find(&request.name).is_ok() {
        return Err(Error::new(
            ErrorKind::Exists,
            format!("volume {}: the name is taken", request.name),
        )
        .hint(format!("choose another name, or `pando volume delete {}` first", request.name)));
    }
    let mut labels = request.labels;
    if let Some(source) = &source
        && labels.len() < LABELS_MAX
    {
        labels.insert(SOURCE_LABEL.to_owned(), source.name.clone());
    }
    Ok(CreateVolume {
        name: request.name,
        size_bytes: request.size_bytes,
        source: source.map_or(Source::Empty, |source| Source::Volume(source.id)),
        snapshot: request.snapshot,
        read_only: request.read_only,
        reservation_bytes: request.reservation_bytes,
        growth_limit_bytes: request.growth_limit_bytes,
        io_limits: IoLimits {
            iops: request.iops_limit,
            bandwidth_bytes: request.bandwidth_limit_bytes,
        },
        labels,
        created_at: now(),
    })
}

/// What a request changes of `info`.
pub(super) fn modify_request(
    info: &VolumeInfo,
    mut request: v1::ModifyVolumeRequest,
) -> ModifyVolume {
    let more = request.labels.keys().filter(|key| !info.labels.contains_key(*key)).count();
    if more > 0 && info.labels.len() + more > LABELS_MAX {
        // The labels of the user take all the room there is: the name gives way.
        request.labels.insert(SOURCE_LABEL.to_owned(), String::new());
    }
    ModifyVolume {
        size_bytes: request.size_bytes,
        read_only: request.read_only,
        reservation_bytes: request.reservation_bytes,
        growth_limit_bytes: request.growth_limit_bytes,
        iops_limit: request.iops_limit,
        bandwidth_limit_bytes: request.bandwidth_limit_bytes,
        labels: request.labels,
    }
}

/// A volume, with the name of its source.
pub(super) fn volume(pool: &Pool, mut info: VolumeInfo) -> v1::Volume {
    let source_id = match info.source {
        Source::Empty => None,
        Source::Volume(id) => Some(id),
    };
    let kept_name = info.labels.remove(SOURCE_LABEL);
    let source = source_id.and_then(|id| pool.get(id).ok());
    let source_deleted = source_id.is_some() && source.is_none();
    let source_name = source.map(|source| source.name).or(kept_name.filter(|_| source_deleted));
    v1::Volume {
        id: info.id.get(),
        name: info.name,
        size_bytes: info.size_bytes,
        snapshot: info.snapshot,
        read_only: info.read_only,
        source_id: source_id.map(VolumeId::get),
        source_name: source_name.unwrap_or_default(),
        reservation_bytes: info.reservation_bytes,
        growth_limit_bytes: info.growth_limit_bytes,
        labels: info.labels,
        created_at: info.created_at,
        mapped_bytes: info.mapped_bytes,
        own_bytes: info.own_bytes,
        iops_limit: info.io_limits.iops,
        bandwidth_limit_bytes: info.io_limits.bandwidth_bytes,
        source_deleted,
    }
}

pub(super) const fn space(report: &SpaceReport) -> v1::SpaceReport {
    v1::SpaceReport {
        mapped_bytes: report.mapped_bytes,
        exclusive_bytes: report.exclusive_bytes,
        shared_bytes: report.shared_bytes,
        freed_if_deleted_bytes: report.freed_if_deleted_bytes,
    }
}

pub(super) const fn extent(run: &ChangedRun) -> v1::Extent {
    v1::Extent { offset: run.offset, length: run.len }
}

pub(super) const fn changed_extent(run: &ChangedRun) -> v1::ChangedExtent {
    v1::ChangedExtent { offset: run.offset, length: run.len, mapped: run.mapped }
}

pub(super) fn pool(status: PoolStatus, path: String) -> v1::Pool {
    let kept = status.reserve_bytes.saturating_add(status.reserved_bytes);
    let available_bytes = match status.poisoned {
        None => status.free_bytes.saturating_sub(kept),
        Some(_) => 0,
    };
    v1::Pool {
        uuid: uuid::Uuid::from_bytes(status.uuid).to_string(),
        path,
        size_bytes: status.size_bytes,
        usable_bytes: status.usable_bytes,
        free_bytes: status.free_bytes,
        pending_bytes: status.pending_bytes,
        reserve_bytes: status.reserve_bytes,
        provisioned_bytes: status.provisioned_bytes,
        reserved_bytes: status.reserved_bytes,
        volumes: status.volumes,
        snapshots: status.snapshots,
        generation: status.generation,
        sequence_number: status.seqno,
        journal_used_bytes: status.journal_used_bytes,
        journal_bytes: status.journal_bytes,
        deletions_pending: status.deletions_pending,
        poisoned: status.poisoned.unwrap_or_default(),
        available_bytes,
    }
}

pub(super) const fn counters(counters: &PoolCounters) -> v1::PoolCounters {
    v1::PoolCounters {
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

pub(super) const fn device_kind(kind: DeviceKind) -> v1::DeviceKind {
    match kind {
        DeviceKind::Ublk => v1::DeviceKind::Ublk,
        DeviceKind::Nbd => v1::DeviceKind::Nbd,
        DeviceKind::Loop => v1::DeviceKind::Loop,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [ErrorKind; 14] = [
        ErrorKind::NotFound,
        ErrorKind::Exists,
        ErrorKind::Invalid,
        ErrorKind::NoSpace,
        ErrorKind::Limit,
        ErrorKind::ReadOnly,
        ErrorKind::Busy,
        ErrorKind::NotAPool,
        ErrorKind::Unsupported,
        ErrorKind::Corrupt,
        ErrorKind::Checksum,
        ErrorKind::Io,
        ErrorKind::Poisoned,
        ErrorKind::Shutdown,
    ];

    #[test]
    fn every_kind_is_in_the_table_of_the_protocol() {
        let protocol = include_str!("../../../proto/pando/v1/pando.proto");
        for kind in KINDS {
            let (name, code) = kind_name(kind);
            let code = match code {
                Code::NotFound => "NOT_FOUND",
                Code::AlreadyExists => "ALREADY_EXISTS",
                Code::InvalidArgument => "INVALID_ARGUMENT",
                Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
                Code::FailedPrecondition => "FAILED_PRECONDITION",
                Code::Unimplemented => "UNIMPLEMENTED",
                Code::DataLoss => "DATA_LOSS",
                Code::Internal => "INTERNAL",
                Code::Unavailable => "UNAVAILABLE",
                other => panic!("{other:?} is not in the table"),
            };
            let described = protocol.lines().any(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                words.windows(2).any(|pair| pair == [name, code])
            });
            assert!(described, "{name} {code} is missing in pando.proto");
        }
    }

    #[test]
    fn errors_carry_kind_and_errno() {
        let error = Error::new(ErrorKind::NoSpace, "volume db: the pool is full");
        let status = Status::from(error);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.message(), "volume db: the pool is full");
        assert_eq!(status.metadata().get(ERROR_KIND_KEY).unwrap(), "no_space");
        assert_eq!(status.metadata().get(ERRNO_KEY).unwrap(), "28");
        assert_eq!(status.metadata().get(HINT_KEY), None, "no advice, no hint");
        let status = Status::from(Error::invalid("no").hint("`pando volume list`"));
        assert_eq!(status.message(), "no");
        assert_eq!(status.metadata().get(HINT_KEY).unwrap(), "`pando volume list`");
    }
}
