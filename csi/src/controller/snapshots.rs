//! Calls about snapshots. A snapshot is a read-only volume of its own: it outlives its source
//! volume and keeps the number of that volume.

use pando_proto::v1;
use prost_types::Timestamp;
use tonic::Status;
use tracing::info;

use crate::adapter::{Adapter, Found};
use crate::controller::{frozen, page, parameters, signed};
use crate::daemon::by_number;
use crate::ids::{self, PoolId};
use crate::labels;
use crate::proto::csi::{
    CreateSnapshotRequest, CreateSnapshotResponse, DeleteSnapshotRequest, DeleteSnapshotResponse,
    GetSnapshotRequest, GetSnapshotResponse, ListSnapshotsRequest, ListSnapshotsResponse, Snapshot,
    list_snapshots_response,
};
use crate::validate;

/// A request to the daemon for a snapshot. The snapshot gets the file system label of its source,
/// so that a volume that is restored from it cannot be requested with another file system.
pub(crate) fn request(name: String, source: &v1::Volume) -> v1::CreateVolumeRequest {
    let recorded = source.labels.get_key_value(labels::FS_TYPE);
    v1::CreateVolumeRequest {
        name,
        source: Some(by_number(source.id)),
        snapshot: true,
        labels: recorded.map(|(key, value)| (key.clone(), value.clone())).into_iter().collect(),
        ..v1::CreateVolumeRequest::default()
    }
}

/// CreateSnapshot.
pub(super) async fn create(
    adapter: &Adapter,
    request: CreateSnapshotRequest,
) -> Result<CreateSnapshotResponse, Status> {
    validate::name("name", &request.name)?;
    validate::required("source_volume_id", &request.source_volume_id)?;
    validate::map("parameters", &request.parameters)?;
    let freeze = parameters::snapshot_freeze(&request.parameters)?;
    let name = ids::snapshot_name(&request.name);
    let _lock = adapter.locks.lock(&name)?;
    let pool = adapter.pool_id().await?;
    if let Some(snapshot) = frozen::created_before(adapter, &name).await? {
        let source = ids::parse(&request.source_volume_id).filter(|id| id.pool == pool);
        // A snapshot has a source, so a request whose source id is invalid did not create it.
        if ids::is_snapshot(&snapshot) && source.map(|id| id.number) == snapshot.source_id {
            return Ok(CreateSnapshotResponse {
                snapshot: Some(to_csi(adapter, &pool, &snapshot)),
            });
        }
        return Err(Status::already_exists(format!(
            "snapshot {name} exists with another source volume"
        )));
    }
    let snapshot = match adapter.find_volume(&pool, &request.source_volume_id).await? {
        Found::Here(volume, _) => {
            let source = (freeze || frozen::is_wanted(&volume)).then_some(volume.id);
            frozen::create_one(adapter, source, self::request(name, &volume)).await?
        }
        Found::Elsewhere => {
            return Err(adapter.elsewhere("source volume", &request.source_volume_id));
        }
        Found::Nowhere => {
            return Err(adapter.not_found("source volume", &request.source_volume_id));
        }
    };
    info!(
        snapshot = snapshot.name,
        id = snapshot.id,
        source = snapshot.source_id,
        "snapshot created"
    );
    Ok(CreateSnapshotResponse { snapshot: Some(to_csi(adapter, &pool, &snapshot)) })
}

/// A snapshot in the form of CSI. `pool` contains it.
pub(crate) fn to_csi(adapter: &Adapter, pool: &PoolId, snapshot: &v1::Volume) -> Snapshot {
    let source = snapshot.source_id.map(|number| adapter.id(pool, number));
    let group = snapshot.labels.get(labels::GROUP_ID).and_then(|number| number.parse().ok());
    let group = group.map(|number| pool.group_id(&adapter.config.node_id, number));
    Snapshot {
        size_bytes: signed(snapshot.size_bytes),
        snapshot_id: adapter.id(pool, snapshot.id),
        source_volume_id: source.unwrap_or_default(),
        creation_time: Some(creation_time(snapshot)),
        ready_to_use: true,
        group_snapshot_id: group.unwrap_or_default(),
        accessible_topology: Vec::new(),
    }
}

/// The time when a snapshot was created.
pub(crate) fn creation_time(snapshot: &v1::Volume) -> Timestamp {
    Timestamp { seconds: signed(snapshot.created_at), nanos: 0 }
}

/// DeleteSnapshot.
pub(super) async fn delete(
    adapter: &Adapter,
    request: DeleteSnapshotRequest,
) -> Result<DeleteSnapshotResponse, Status> {
    validate::required("snapshot_id", &request.snapshot_id)?;
    let pool = adapter.pool_id().await?;
    match adapter.find_snapshot(&pool, &request.snapshot_id).await? {
        Found::Here(snapshot, _) => {
            if let Some(group) = snapshot.labels.get(labels::GROUP) {
                return Err(Status::invalid_argument(format!(
                    "snapshot {} is a member of group {group:?}: delete the group instead",
                    snapshot.name
                )));
            }
            let _lock = adapter.lock_volume(snapshot.id)?;
            adapter.daemon.delete(snapshot.id).await?;
            info!(snapshot = snapshot.name, id = snapshot.id, "snapshot deleted");
        }
        Found::Elsewhere => return Err(adapter.elsewhere("snapshot", &request.snapshot_id)),
        Found::Nowhere => {}
    }
    Ok(DeleteSnapshotResponse {})
}

/// ListSnapshots. Ids in a filter that do not exist give an empty list.
pub(super) async fn list(
    adapter: &Adapter,
    request: ListSnapshotsRequest,
) -> Result<ListSnapshotsResponse, Status> {
    validate::optional("snapshot_id", &request.snapshot_id)?;
    validate::optional("source_volume_id", &request.source_volume_id)?;
    let max = page(request.max_entries)?;
    let pool = adapter.pool_id().await?;
    let source = match request.source_volume_id.as_str() {
        "" => None,
        id => match ids::parse(id).filter(|id| id.pool == pool) {
            Some(id) => Some(id.number),
            None => return Ok(ListSnapshotsResponse::default()),
        },
    };
    let (snapshots, next_token) = if request.snapshot_id.is_empty() {
        let query = v1::ListVolumesRequest {
            name_prefix: ids::ANY_PREFIX.to_owned(),
            kind: v1::VolumeKind::Snapshot.into(),
            source: source.map(by_number),
            ..v1::ListVolumesRequest::default()
        };
        adapter.list(query, max, request.starting_token).await?
    } else {
        let found = match adapter.find_snapshot(&pool, &request.snapshot_id).await? {
            Found::Here(snapshot, _) => Some(*snapshot),
            Found::Elsewhere | Found::Nowhere => None,
        };
        let matches = |found: &v1::Volume| source.is_none() || source == found.source_id;
        (found.into_iter().filter(matches).collect(), String::new())
    };
    let taken = snapshots.iter().filter(|snapshot| !frozen::is_unproven(snapshot));
    let entries = taken.map(|snapshot| list_snapshots_response::Entry {
        snapshot: Some(to_csi(adapter, &pool, snapshot)),
    });
    Ok(ListSnapshotsResponse { entries: entries.collect(), next_token })
}

/// GetSnapshot.
pub(super) async fn get(
    adapter: &Adapter,
    request: GetSnapshotRequest,
) -> Result<GetSnapshotResponse, Status> {
    validate::required("snapshot_id", &request.snapshot_id)?;
    let pool = adapter.pool_id().await?;
    let snapshot = existing(adapter, &pool, &request.snapshot_id).await?;
    Ok(GetSnapshotResponse { snapshot: Some(to_csi(adapter, &pool, &snapshot)) })
}

/// The snapshot with this id.
///
/// # Errors
/// NOT_FOUND: no such snapshot; FAILED_PRECONDITION: it is on another node.
pub(crate) async fn existing(
    adapter: &Adapter,
    pool: &PoolId,
    id: &str,
) -> Result<v1::Volume, Status> {
    match adapter.find_snapshot(pool, id).await? {
        Found::Here(snapshot, _) => Ok(*snapshot),
        Found::Elsewhere => Err(adapter.elsewhere("snapshot", id)),
        Found::Nowhere => Err(adapter.not_found("snapshot", id)),
    }
}
