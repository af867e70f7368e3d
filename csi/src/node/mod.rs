//! The service Node: devices, file systems and mounts of this machine.
//!
//! ```text
//!  stage ----- device      attach, and the proof of identity before each use
//!    |    `--- fs          probe, mkfs, fsck, grow        command: programs of others
//!    |    `--- identity    of a clone's file system
//!    |    `--- mount       by descriptors                 options: flags by allow-list
//!    |    |--- grow        to the size of the device
//!    |    `--- undo        what a call did that fails
//!  publish --- paths       without following links        mountinfo: what is mounted
//!  stats       space
//!  expand      growth while it is mounted, or by staging it again
//!  freeze      a clean clone of a mounted file system     sys: kernel calls
//! ```
//!
//! * Nothing is remembered here: what is done is told by the kernel and by the pool's catalogue.
//! * Order of checks: required fields, then whether the object exists, then the rest.
//! * A mount that is not this volume's is never touched, unless its device is dead.

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
#[expect(unsafe_code, reason = "calls to the kernel that no crate of ours has")]
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
pub(crate) use fs::Kind;
pub(crate) use options::MountOptions;
use publish::Publication;
use request::Access;
pub(crate) use stage::set_label;

/// What the service can do.
const CAPABILITIES: [Rpc; 4] =
    [Rpc::StageUnstageVolume, Rpc::GetVolumeStats, Rpc::ExpandVolume, Rpc::SingleNodeMultiWriter];

/// The service.
pub(crate) struct NodeService {
    adapter: Arc<Adapter>,
}

/// Runs what may block in the kernel on a thread for that.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Status::internal(format!("a bug of pando-csi: {error}"))))
}

/// A volume that nobody else works on, and the device that it is, if any.
type Held = (v1::Volume, Option<v1::Attachment>, Locked);

impl NodeService {
    pub(crate) const fn new(adapter: Arc<Adapter>) -> Self {
        Self { adapter }
    }

    /// Finds and locks a volume.
    ///
    /// # Errors
    /// `NOT_FOUND`; `ABORTED` while another operation on it is under way.
    async fn hold(&self, id: &str) -> Result<Held, Status> {
        let (volume, _) = self.adapter.volume(id).await?;
        let locked = self.adapter.locks.lock(format!("volume {}", volume.id))?;
        // Again, for it may have been another operation's a moment ago.
        let (volume, attachment) = self.adapter.volume(id).await?;
        Ok((volume, attachment, locked))
    }

    /// The same for ending something: a volume that is gone has to be cleaned up after as well.
    async fn hold_any(
        &self,
        id: &str,
        path: &str,
    ) -> Result<(Option<(v1::Volume, Option<v1::Attachment>)>, Locked), Status> {
        let pool = self.adapter.pool_id().await?;
        match self.adapter.find_volume(&pool, id).await? {
            Found::Here(..) => {
                let (volume, attachment, locked) = self.hold(id).await?;
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
        let access = Access::of(request.volume_capability)?;
        let (volume, attachment, _locked) = self.hold(&request.volume_id).await?;
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
        let (volume, _locked) = self.hold_any(&request.volume_id, path).await?;
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
            access: Access::of(request.volume_capability)?,
            read_only: request.readonly,
        };
        let (volume, attachment, _locked) = self.hold(&request.volume_id).await?;
        if publication.staging.is_empty() {
            return Err(Status::failed_precondition("staging_target_path is missing"));
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
        let (volume, _locked) = self.hold_any(&request.volume_id, &request.target_path).await?;
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
        let access = request.volume_capability.map(|asked| Access::of(Some(asked))).transpose()?;
        let staging = Some(request.staging_target_path).filter(|path| !path.is_empty());
        let expansion = Expansion {
            staging: staging.unwrap_or_else(|| request.volume_path.clone()),
            path: request.volume_path,
            range: request.capacity_range,
            access,
        };
        let (volume, attachment, _locked) = self.hold(&request.volume_id).await?;
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
