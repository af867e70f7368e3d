//! The service Node: devices, file systems and mounts of this machine.

pub(crate) mod freeze;

use std::sync::Arc;

use crate::adapter::Adapter;
use crate::proto::csi::node_server::Node;

/// The service. With `controller_expand = false` NodeExpandVolume has to grow the volume as well.
pub(crate) struct NodeService {
    adapter: Arc<Adapter>,
}

impl NodeService {
    pub(crate) const fn new(adapter: Arc<Adapter>) -> Self {
        Self { adapter }
    }
}

#[tonic::async_trait]
impl Node for NodeService {}
