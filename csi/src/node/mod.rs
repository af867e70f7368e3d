//! The service Node: devices, file systems and mounts of this machine.
//!
//! ```text
//!  stage ----- device      attach, and the proof of identity before each use
//!    |    `--- fs          probe, mkfs, fsck              command: external programs
//!    |    `--- identity    of a clone's file system
//!    |    `--- mount       by descriptors                 options: allow-list of mount flags
//!    |    |--- grow        to the size of the device
//!    |    `--- undo        after a failed call
//!  publish --- paths       without following links        mountinfo: the mounts of the namespace
//!  stats       space
//!  expand      growth while mounted, or by staging again
//!  freeze      a clean clone of a mounted file system     sys: kernel calls
//! ```
//!
//! * No state is kept here: the kernel and the pool's catalogue show what has been done.
//! * Order of checks: required fields, then whether the object exists, then the rest.
//! * A mount that does not belong to the volume is never touched, unless its device is dead.

mod command;
mod device;
mod expand;
pub(crate) mod freeze;
mod fs;
mod grow;
mod identity;
mod mount;
mod mountinfo;
mod options;
mod paths;
mod publish;
mod request;
mod stage;
mod stats;
#[expect(unsafe_code, reason = "kernel calls that our dependencies lack")]
mod sys;
mod undo;

use std::sync::Arc;

use pando_proto::v1;
use tonic::{Request, Response, Status};

use crate::adapter::{Adapter, Found};
use crate::locks::Locked;
use crate::proto::csi::node_server::Node;
use crate::proto::csi::node_service_capability::rpc::Type as Rpc;
use crate::proto::csi::node_service_capability::{Rpc as RpcMessage, Type};
use crate::proto::csi::{
    NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest,
    NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest,
    NodePublishVolumeResponse, NodeServiceCapability, NodeStageVolumeRequest,
    NodeStageVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse,
    NodeUnstageVolumeRequest, NodeUnstageVolumeResponse,
};
use crate::validate::required;

use expand::Expansion;
pub(crate) use fs::{Kind, format_options};
pub(crate) use options::MountOptions;
use publish::Publication;
use request::Access;
pub(crate) use stage::set_label;

/// Capabilities of the service.
const CAPABILITIES: [Rpc; 4] =
    [Rpc::StageUnstageVolume, Rpc::GetVolumeStats, Rpc::ExpandVolume, Rpc::SingleNodeMultiWriter];

/// The error of publishing without a staging path, for which CSI requires FAILED_PRECONDITION.
const MISSING_STAGING_PATH: &str = "staging_target_path is missing";

/// The service.
pub(crate) struct NodeService {
    adapter: Arc<Adapter>,
}

/// Runs work that may block in the kernel on a blocking thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Status::internal(format!("a bug of pando-csi: {error}"))))
}

/// A locked volume, and its device if it is attached.
type LockedVolume = (v1::Volume, Option<v1::Attachment>, Locked);

impl NodeService {
    pub(crate) const fn new(adapter: Arc<Adapter>) -> Self {
        Self { adapter }
    }

    /// Finds and locks a volume.
    ///
    /// # Errors
    /// `NOT_FOUND`; `ABORTED`: another operation on it is under way.
    async fn lock(&self, id: &str) -> Result<LockedVolume, Status> {
        let (volume, _) = self.adapter.volume(id).await?;
        let locked = self.adapter.lock_volume(volume.id)?;
        // Read again: another operation may have changed it before the lock was taken.
        let (volume, attachment) = self.adapter.volume(id).await?;
        Ok((volume, attachment, locked))
    }

    /// Finds and locks a volume for a call that ends something. If the volume is gone, locks the
    /// path, which has to be cleaned up as well.
    async fn lock_if_exists(
        &self,
        id: &str,
        path: &str,
    ) -> Result<(Option<(v1::Volume, Option<v1::Attachment>)>, Locked), Status> {
        let pool = self.adapter.pool_id().await?;
        match self.adapter.find_volume(&pool, id).await? {
            Found::Here(..) => {
                let (volume, attachment, locked) = self.lock(id).await?;
                Ok((Some((volume, attachment)), locked))
            }
            Found::Elsewhere | Found::Nowhere => {
                Ok((None, self.adapter.locks.lock(format!("path {path}"))?))
            }
        }
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        request::path("staging_target_path", &request.staging_target_path)?;
        let access = Access::parse(request.volume_capability)?;
        let (volume, attachment, _locked) = self.lock(&request.volume_id).await?;
        let volume = (&volume, attachment.is_some());
        stage::stage(&self.adapter, volume, &request.staging_target_path, &access).await?;
        Ok(Response::new(NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        let path = &request.staging_target_path;
        request::path("staging_target_path", path)?;
        let (volume, _locked) = self.lock_if_exists(&request.volume_id, path).await?;
        stage::unstage(&self.adapter, volume, path).await?;
        Ok(Response::new(NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        request::path("target_path", &request.target_path)?;
        request::short_path("staging_target_path", &request.staging_target_path)?;
        let publication = Publication {
            staging: request.staging_target_path,
            target: request.target_path,
            access: Access::parse(request.volume_capability)?,
            read_only: request.readonly,
        };
        let (volume, attachment, _locked) = self.lock(&request.volume_id).await?;
        if publication.staging.is_empty() {
            return Err(Status::failed_precondition(MISSING_STAGING_PATH));
        }
        publish::publish(&self.adapter, &volume, attachment, publication).await?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        request::path("target_path", &request.target_path)?;
        let (volume, _locked) =
            self.lock_if_exists(&request.volume_id, &request.target_path).await?;
        let volume = volume.map(|(volume, attachment)| (volume.id, attachment));
        publish::unpublish(&self.adapter, volume, &request.target_path).await?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        request::path("volume_path", &request.volume_path)?;
        let (volume, attachment) = self.adapter.volume(&request.volume_id).await?;
        let usage = stats::stats(volume, attachment, request.volume_path).await?;
        Ok(Response::new(NodeGetVolumeStatsResponse { usage }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        required("volume_id", &request.volume_id)?;
        request::path("volume_path", &request.volume_path)?;
        request::short_path("staging_target_path", &request.staging_target_path)?;
        let access = request.volume_capability.map(|some| Access::parse(Some(some))).transpose()?;
        let staging = Some(request.staging_target_path).filter(|path| !path.is_empty());
        let expansion = Expansion {
            staging: staging.unwrap_or_else(|| request.volume_path.clone()),
            path: request.volume_path,
            range: request.capacity_range,
            access,
        };
        let (volume, attachment, _locked) = self.lock(&request.volume_id).await?;
        let capacity_bytes = expand::expand(&self.adapter, volume, attachment, expansion).await?;
        Ok(Response::new(NodeExpandVolumeResponse { capacity_bytes }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capability = |rpc: Rpc| NodeServiceCapability {
            r#type: Some(Type::Rpc(RpcMessage { r#type: rpc.into() })),
        };
        let capabilities = CAPABILITIES.map(capability).to_vec();
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.adapter.config.node_id.clone(),
            max_volumes_per_node: 0,
            accessible_topology: Some(self.adapter.topology()),
        }))
    }
}
