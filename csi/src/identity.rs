//! The service Identity: name and capabilities of the driver, and a probe.

use std::collections::BTreeMap;
use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::adapter::Adapter;
use crate::proto::csi::identity_server::Identity;
use crate::proto::csi::plugin_capability::service::Type as Service;
use crate::proto::csi::plugin_capability::volume_expansion::Type as Expansion;
use crate::proto::csi::plugin_capability::{self, Type};
use crate::proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest,
    GetPluginInfoResponse, PluginCapability, ProbeRequest, ProbeResponse,
};

/// Services besides Identity and Node.
const SERVICES: [Service; 4] = [
    Service::ControllerService,
    Service::VolumeAccessibilityConstraints,
    Service::GroupControllerService,
    Service::SnapshotMetadataService,
];

/// The service.
pub(crate) struct IdentityService {
    adapter: Arc<Adapter>,
}

impl IdentityService {
    pub(crate) const fn new(adapter: Arc<Adapter>) -> Self {
        Self { adapter }
    }
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _request: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: self.adapter.config.driver_name.clone(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: BTreeMap::new(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _request: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let service =
            |service: Service| Type::Service(plugin_capability::Service { r#type: service.into() });
        let expansion = Type::VolumeExpansion(plugin_capability::VolumeExpansion {
            r#type: Expansion::Online.into(),
        });
        let types = SERVICES.into_iter().map(service).chain([expansion]);
        let capabilities = types.map(|t| PluginCapability { r#type: Some(t) }).collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    /// Reports only that this process answers. If a plugin is not ready, livenessprobe restarts it
    /// and the other sidecars wait for it. Neither helps when the daemon or its pool has failed,
    /// which each call reports by itself.
    async fn probe(
        &self,
        _request: Request<ProbeRequest>,
    ) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse { ready: Some(true) }))
    }
}
