//! Types of the interfaces, generated when the crate is built. The files in `csi/proto/` document
//! them.

#![expect(
    missing_docs,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::too_many_lines,
    reason = "generated code; the protocol files document it"
)]

/// Package `csi.v1`.
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// Package `pluginregistration`: the registration of a driver with kubelet.
pub mod registration {
    tonic::include_proto!("pluginregistration");
}
