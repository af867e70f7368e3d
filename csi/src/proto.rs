//! Types of the interfaces, generated when the crate is built. What they mean is said in
//! `csi/proto/`.

#![expect(
    missing_docs,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::too_many_lines,
    reason = "generated code; what it means is said in the protocol files"
)]

/// Package `csi.v1`.
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// Package `pluginregistration`: how a driver makes itself known to kubelet.
pub mod registration {
    tonic::include_proto!("pluginregistration");
}
