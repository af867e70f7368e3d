//! Compiles the protocol files with protox: pure Rust, no protoc to install, nothing checked in.

use std::error::Error;

/// Protocol files, relative to this crate.
const FILES: [&str; 1] = ["pando/v1/pando.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
    // A map as BTreeMap prints and compares in one order. Content travels as Bytes: no copy.
    tonic_prost_build::configure().btree_map(".").bytes(".").compile_fds(descriptors)?;
    Ok(())
}
