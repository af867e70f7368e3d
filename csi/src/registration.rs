//! Registration with kubelet's plugin watcher: kubelet finds a socket in its directory, asks there
//! for the name and endpoint of the driver, and reports the result. Kubernetes documents this under
//! `k8s.io/kubelet/pkg/apis/pluginregistration`.

use std::sync::Arc;

use tonic::{Request, Response, Status};
use tracing::{error, info};

use crate::adapter::Adapter;
use crate::proto::registration::registration_server::Registration;
use crate::proto::registration::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};

/// Kubelet's name for this kind of plugin.
const PLUGIN_TYPE: &str = "CSIPlugin";
/// The supported version of CSI; kubelet compares the major version.
const VERSION: &str = "1.0.0";

/// The service.
pub(crate) struct RegistrationService {
    adapter: Arc<Adapter>,
}

impl RegistrationService {
    pub(crate) const fn new(adapter: Arc<Adapter>) -> Self {
        Self { adapter }
    }
}

#[tonic::async_trait]
impl Registration for RegistrationService {
    async fn get_info(
        &self,
        _request: Request<InfoRequest>,
    ) -> Result<Response<PluginInfo>, Status> {
        let config = &self.adapter.config;
        let endpoint = config.kubelet_endpoint.as_ref().unwrap_or(&config.endpoint);
        Ok(Response::new(PluginInfo {
            r#type: PLUGIN_TYPE.to_owned(),
            name: config.driver_name.clone(),
            endpoint: endpoint.display().to_string(),
            supported_versions: vec![VERSION.to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        // Kubelet retries as long as the socket exists.
        if status.plugin_registered {
            info!(driver = self.adapter.config.driver_name, "registered with kubelet");
        } else {
            error!(
                driver = self.adapter.config.driver_name,
                error = status.error,
                "kubelet refuses the driver"
            );
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
