//! The service GroupController: snapshots of several volumes at one instant.
//!
//! A group has no entry of its own in the catalogue: it consists of the snapshots that carry its
//! name and number as labels. One record creates them, so all of them show the same point in the
//! order of all writes, and either all of them exist or none.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pando_proto::v1;
use tonic::{Request, Response, Status};
use tracing::info;

use crate::adapter::{Adapter, Found};
use crate::controller::{frozen, parameters, snapshots};
use crate::ids::{self, PoolId};
use crate::labels;
use crate::proto::csi::group_controller_server::GroupController;
use crate::proto::csi::group_controller_service_capability::rpc::Type as Capability;
use crate::proto::csi::group_controller_service_capability::{Rpc, Type};
use crate::proto::csi::{
    CreateVolumeGroupSnapshotRequest, CreateVolumeGroupSnapshotResponse,
    DeleteVolumeGroupSnapshotRequest, DeleteVolumeGroupSnapshotResponse,
    GetVolumeGroupSnapshotRequest, GetVolumeGroupSnapshotResponse,
    GroupControllerGetCapabilitiesRequest, GroupControllerGetCapabilitiesResponse,
    GroupControllerServiceCapability, VolumeGroupSnapshot,
};
use crate::validate;

/// Maximum number of volumes in a group: the daemon takes so many snapshots at one instant.
const MEMBERS_MAX: u32 = 64;

/// The service.
pub(crate) struct GroupService {
    adapter: Arc<Adapter>,
}

impl GroupService {
    pub(crate) const fn new(adapter: Arc<Adapter>) -> Self {
        Self { adapter }
    }

    /// The snapshots with this label, ordered by name.
    async fn members(&self, label: &str, value: String) -> Result<Vec<v1::Volume>, Status> {
        let query = v1::ListVolumesRequest {
            name_prefix: ids::GROUP_PREFIX.to_owned(),
            labels: BTreeMap::from([(label.to_owned(), value)]),
            kind: v1::VolumeKind::Snapshot.into(),
            ..v1::ListVolumesRequest::default()
        };
        Ok(self.adapter.list(query, MEMBERS_MAX, String::new()).await?.0)
    }

    /// The members of the group with this id; empty if there is no such group.
    ///
    /// # Errors
    /// FAILED_PRECONDITION: the group is on another node.
    async fn group(&self, pool: &PoolId, id: &str) -> Result<Vec<v1::Volume>, Status> {
        match ids::parse_group(id) {
            Some(parsed) if parsed.pool == *pool => {
                self.members(labels::GROUP_ID, parsed.number.to_string()).await
            }
            Some(parsed) if matches!(self.adapter.other_pool(&parsed), Found::Elsewhere) => {
                Err(self.adapter.elsewhere("group", id))
            }
            Some(_) | None => Ok(Vec::new()),
        }
    }

    /// A group in the form of CSI.
    fn to_csi(&self, pool: &PoolId, members: &[v1::Volume]) -> Result<VolumeGroupSnapshot, Status> {
        let first = members.first();
        let first = first.ok_or_else(|| Status::internal("a group without members"))?;
        let snapshots: Vec<_> =
            members.iter().map(|member| snapshots::to_csi(&self.adapter, pool, member)).collect();
        Ok(VolumeGroupSnapshot {
            group_snapshot_id: snapshots[0].group_snapshot_id.clone(),
            creation_time: Some(snapshots::creation_time(first)),
            ready_to_use: true,
            snapshots,
        })
    }

    /// The members of the group that an earlier call with this name created. If one of them is
    /// unproven, no caller has got an answer about the group, and all of it is deleted: unproven
    /// members last, so that the mark remains until the end.
    async fn created_before(&self, name: &str) -> Result<Vec<v1::Volume>, Status> {
        let mut members = self.members(labels::GROUP, name.to_owned()).await?;
        if !members.iter().any(frozen::is_unproven) {
            return Ok(members);
        }
        members.sort_by_key(frozen::is_unproven);
        for member in members {
            self.adapter.daemon.delete(member.id).await?;
        }
        Ok(Vec::new())
    }

    /// The volumes to take snapshots of, by number.
    async fn sources(
        &self,
        pool: &PoolId,
        ids: &BTreeSet<String>,
    ) -> Result<BTreeMap<u64, v1::Volume>, Status> {
        let mut sources = BTreeMap::new();
        for id in ids {
            match self.adapter.find_volume(pool, id).await? {
                Found::Here(volume, _) => {
                    sources.insert(volume.id, *volume);
                }
                Found::Elsewhere => {
                    let node = &self.adapter.config.node_id;
                    return Err(Status::failed_precondition(format!(
                        "source volume {id:?} is on another node than {node}: all volumes of a \
                         group must be on one node"
                    )));
                }
                Found::Nowhere => return Err(self.adapter.not_found("source volume", id)),
            }
        }
        Ok(sources)
    }
}

/// Checks the member ids of a request. They may include members that an interrupted call has
/// deleted already.
///
/// # Errors
/// INVALID_ARGUMENT: a member is missing, or there are too many ids.
fn check_members(
    adapter: &Adapter,
    pool: &PoolId,
    members: &[v1::Volume],
    ids: &[String],
) -> Result<(), Status> {
    let missing = members.iter().find(|member| !ids.contains(&adapter.id(pool, member.id)));
    match missing {
        Some(member) => Err(Status::invalid_argument(format!(
            "snapshot_ids omits member {:?}",
            adapter.id(pool, member.id)
        ))),
        None => check_count("snapshot_ids", ids.len()),
    }
}

/// Checks the number of ids in a request.
///
/// # Errors
/// INVALID_ARGUMENT: more than a group can have.
fn check_count(field: &str, count: usize) -> Result<(), Status> {
    if count > usize::try_from(MEMBERS_MAX).unwrap_or(usize::MAX) {
        let text = format!("{field} has {count} entries, the limit is {MEMBERS_MAX}");
        return Err(Status::invalid_argument(text));
    }
    Ok(())
}

#[tonic::async_trait]
impl GroupController for GroupService {
    async fn group_controller_get_capabilities(
        &self,
        _request: Request<GroupControllerGetCapabilitiesRequest>,
    ) -> Result<Response<GroupControllerGetCapabilitiesResponse>, Status> {
        let rpc = Rpc { r#type: Capability::CreateDeleteGetVolumeGroupSnapshot.into() };
        let capability = GroupControllerServiceCapability { r#type: Some(Type::Rpc(rpc)) };
        Ok(Response::new(GroupControllerGetCapabilitiesResponse { capabilities: vec![capability] }))
    }

    async fn create_volume_group_snapshot(
        &self,
        request: Request<CreateVolumeGroupSnapshotRequest>,
    ) -> Result<Response<CreateVolumeGroupSnapshotResponse>, Status> {
        let request = request.into_inner();
        validate::name("name", &request.name)?;
        validate::map("parameters", &request.parameters)?;
        if request.source_volume_ids.is_empty() {
            return Err(validate::missing("source_volume_ids"));
        }
        let wanted: BTreeSet<String> = request.source_volume_ids.into_iter().collect();
        check_count("source_volume_ids", wanted.len())?;
        for id in &wanted {
            validate::required("source_volume_id", id)?;
        }
        let freeze = parameters::snapshot_freeze(&request.parameters)?;
        let _lock = self.adapter.locks.lock(format!("group {:?}", request.name))?;
        let pool = self.adapter.pool_id().await?;
        let old = self.created_before(&request.name).await?;
        if !old.is_empty() {
            let numbers = wanted.iter().map(|id| ids::parse(id).filter(|id| id.pool == pool));
            let numbers: BTreeSet<_> = numbers.map(|id| id.map(|id| id.number)).collect();
            if old.iter().map(|member| member.source_id).collect::<BTreeSet<_>>() != numbers {
                return Err(Status::already_exists(format!(
                    "group {:?} exists with other source volumes",
                    request.name
                )));
            }
            let group_snapshot = Some(self.to_csi(&pool, &old)?);
            return Ok(Response::new(CreateVolumeGroupSnapshotResponse { group_snapshot }));
        }
        let sources = self.sources(&pool, &wanted).await?;
        let to_freeze = sources.values().filter(|source| freeze || frozen::is_wanted(source));
        let to_freeze: Vec<u64> = to_freeze.map(|source| source.id).collect();
        let number = uuid::Uuid::new_v4().as_u64_pair().1;
        let labels = BTreeMap::from([
            (labels::GROUP.to_owned(), request.name.clone()),
            (labels::GROUP_ID.to_owned(), number.to_string()),
        ]);
        let requests = sources.values().map(|source| {
            let member = ids::member_name(&request.name, source.id);
            let mut request = snapshots::request(member, source);
            request.labels.extend(labels.clone());
            request
        });
        let members = frozen::create(&self.adapter, &to_freeze, requests.collect()).await?;
        info!(group = request.name, members = members.len(), "group of snapshots created");
        let group_snapshot = Some(self.to_csi(&pool, &members)?);
        Ok(Response::new(CreateVolumeGroupSnapshotResponse { group_snapshot }))
    }

    async fn delete_volume_group_snapshot(
        &self,
        request: Request<DeleteVolumeGroupSnapshotRequest>,
    ) -> Result<Response<DeleteVolumeGroupSnapshotResponse>, Status> {
        let request = request.into_inner();
        validate::required("group_snapshot_id", &request.group_snapshot_id)?;
        let pool = self.adapter.pool_id().await?;
        let members = self.group(&pool, &request.group_snapshot_id).await?;
        check_members(&self.adapter, &pool, &members, &request.snapshot_ids)?;
        // One by one: after a crash the remaining members are still the group, and the caller
        // repeats the call.
        for member in &members {
            let _lock = self.adapter.lock_volume(member.id)?;
            self.adapter.daemon.delete(member.id).await?;
            info!(snapshot = member.name, id = member.id, "snapshot deleted");
        }
        Ok(Response::new(DeleteVolumeGroupSnapshotResponse {}))
    }

    async fn get_volume_group_snapshot(
        &self,
        request: Request<GetVolumeGroupSnapshotRequest>,
    ) -> Result<Response<GetVolumeGroupSnapshotResponse>, Status> {
        let request = request.into_inner();
        validate::required("group_snapshot_id", &request.group_snapshot_id)?;
        let pool = self.adapter.pool_id().await?;
        let members = self.group(&pool, &request.group_snapshot_id).await?;
        if members.is_empty() {
            return Err(self.adapter.not_found("group", &request.group_snapshot_id));
        }
        check_members(&self.adapter, &pool, &members, &request.snapshot_ids)?;
        let group_snapshot = Some(self.to_csi(&pool, &members)?);
        Ok(Response::new(GetVolumeGroupSnapshotResponse { group_snapshot }))
    }
}
