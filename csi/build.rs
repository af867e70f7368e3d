//! Compiles the interfaces of CSI and of kubelet with protox: no protoc to install.

use std::error::Error;

/// Protocol files, relative to `proto/`.
const FILES: [&str; 2] = ["csi/v1/csi.proto", "pluginregistration/v1/api.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed=proto/{file}");
    }
    let descriptors = protox::compile(FILES, ["proto"])?;
    // A map as BTreeMap prints and compares in one order. Calls that Pando does not offer, as those
    // of health, answer UNIMPLEMENTED by themselves.
    tonic_prost_build::configure()
        .btree_map(".")
        .generate_default_stubs(true)
        .compile_fds(descriptors)?;
    Ok(())
}
