//! The service Controller: creates, lists, changes and deletes volumes and snapshots. Each call
//! writes at most one record to the pool's journal, so it happens as a whole or not at all.

mod capacity;
pub(crate) mod frozen;
pub(crate) mod parameters;
mod requirement;
pub(crate) mod snapshots;
mod volumes;

use std::collections::BTreeMap;
use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::adapter::Adapter;
use crate::proto::csi::controller_server::Controller;
use crate::proto::csi::controller_service_capability::rpc::Type as Capability;
use crate::proto::csi::controller_service_capability::{Rpc, Type};
use crate::proto::csi::{
    ControllerExpandVolumeRequest, ControllerExpandVolumeResponse,
    ControllerGetCapabilitiesRequest, ControllerGetCapabilitiesResponse,
    ControllerGetVolumeRequest, ControllerGetVolumeResponse, ControllerModifyVolumeRequest,
    ControllerModifyVolumeResponse, ControllerServiceCapability, CreateSnapshotRequest,
    CreateSnapshotResponse, CreateVolumeRequest, CreateVolumeResponse, DeleteSnapshotRequest,
    DeleteSnapshotResponse, DeleteVolumeRequest, DeleteVolumeResponse, GetCapacityRequest,
    GetCapacityResponse, GetSnapshotRequest, GetSnapshotResponse, ListSnapshotsRequest,
    ListSnapshotsResponse, ListVolumesRequest, ListVolumesResponse,
    ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse,
};
use crate::validate;

/// Capabilities of the controller. `ExpandVolume` is omitted where only the nodes grow volumes.
const CAPABILITIES: [Capability; 11] = [
    Capability::CreateDeleteVolume,
    Capability::CloneVolume,
    Capability::ListVolumes,
    Capability::GetCapacity,
    Capability::CreateDeleteSnapshot,
    Capability::ListSnapshots,
    Capability::ExpandVolume,
    Capability::GetVolume,
    Capability::GetSnapshot,
    Capability::ModifyVolume,
    Capability::SingleNodeMultiWriter,
];

/// Maximum number of entries in a page of a list. With the longest ids they take 1 MiB, a quarter
/// of the message limit of gRPC. Further pages need a token.
const PAGE_MAX: u32 = 2048;

/// The service.
pub(crate) struct ControllerService {
    adapter: Arc<Adapter>,
}

impl ControllerService {
    pub(crate) const fn new(adapter: Arc<Adapter>) -> Self {
        Self { adapter }
    }
}

/// The maximum number of entries in a page.
fn page(max_entries: i32) -> Result<u32, Status> {
    match validate::not_negative("max_entries", max_entries)? {
        0 => Ok(PAGE_MAX),
        entries => Ok(PAGE_MAX.min(entries)),
    }
}

/// Converts a size to the signed type of CSI. Sizes of Pando are far below its maximum.
pub(crate) fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Whether two volumes have the same labels, apart from labels that are not part of a request.
fn same_request(old: &BTreeMap<String, String>, new: &BTreeMap<String, String>) -> bool {
    parameters::COMPARED.iter().all(|key| old.get(*key) == new.get(*key))
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn controller_get_capabilities(
        &self,
        _request: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        let expand = self.adapter.config.controller_expand;
        let offered = CAPABILITIES.into_iter().filter(|c| expand || *c != Capability::ExpandVolume);
        let capabilities = offered.map(|capability| ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: capability.into() })),
        });
        let capabilities = capabilities.collect();
        Ok(Response::new(ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        volumes::create(&self.adapter, request.into_inner()).await.map(Response::new)
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        volumes::delete(&self.adapter, request.into_inner()).await.map(Response::new)
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        volumes::validate(&self.adapter, request.into_inner()).await.map(Response::new)
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        volumes::list(&self.adapter, request.into_inner()).await.map(Response::new)
    }

    async fn controller_get_volume(
        &self,
        request: Request<ControllerGetVolumeRequest>,
    ) -> Result<Response<ControllerGetVolumeResponse>, Status> {
        volumes::get(&self.adapter, request.into_inner()).await.map(Response::new)
    }

    async fn get_capacity(
        &self,
        request: Request<GetCapacityRequest>,
    ) -> Result<Response<GetCapacityResponse>, Status> {
        capacity::get(&self.adapter, request.into_inner()).await.map(Response::new)
    }

    async fn controller_expand_volume(
        &self,
        request: Request<ControllerExpandVolumeRequest>,
    ) -> Result<Response<ControllerExpandVolumeResponse>, Status> {
        volumes::expand(&self.adapter, request.into_inner()).await.map(Response::new)
    }

    async fn controller_modify_volume(
        &self,
        request: Request<ControllerModifyVolumeRequest>,
    ) -> Result<Response<ControllerModifyVolumeResponse>, Status> {
        volumes::modify(&self.adapter, request.into_inner()).await.map(Response::new)
    }

    async fn create_snapshot(
        &self,
        request: Request<CreateSnapshotRequest>,
    ) -> Result<Response<CreateSnapshotResponse>, Status> {
        snapshots::create(&self.adapter, request.into_inner()).await.map(Response::new)
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        snapshots::delete(&self.adapter, request.into_inner()).await.map(Response::new)
    }

    async fn list_snapshots(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        snapshots::list(&self.adapter, request.into_inner()).await.map(Response::new)
    }

    async fn get_snapshot(
        &self,
        request: Request<GetSnapshotRequest>,
    ) -> Result<Response<GetSnapshotResponse>, Status> {
        snapshots::get(&self.adapter, request.into_inner()).await.map(Response::new)
    }
}
