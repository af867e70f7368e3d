//! Compiles the interfaces of CSI and of kubelet with protox, which does not need protoc.

use std::error::Error;

/// Protocol files, relative to `proto/`.
const FILES: [&str; 2] = ["csi/v1/csi.proto", "pluginregistration/v1/api.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed=proto/{file}");
    }
    let descriptors = protox::compile(FILES, ["proto"])?;
    // Maps are BTreeMaps, so that they are printed and compared in one order. The default stubs
    // answer UNIMPLEMENTED to calls that Pando does not offer, such as those of volume health.
    tonic_prost_build::configure()
        .btree_map(".")
        .generate_default_stubs(true)
        .compile_fds(descriptors)?;
    Ok(())
}
