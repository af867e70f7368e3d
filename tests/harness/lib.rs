//! What the whole-system tests stand on: the real programs in a directory of their own, and an NBD
//! client that shares no code with the server.
//!
//! ```text
//! system   a directory, a pool in a file, pandod on it: start, kill, restart
//! cli      pando against that daemon, answers as JSON
//! nbd      a blocking client of its own, also for requests that no good client sends
//! devices  block devices and what the kernel says of them
//! tools    programs of others: nbdcopy, qemu-io, fio, e2fsck
//! csi      pando-csi beside that daemon, and its caller; csi_cases: what it must do
//! data     what is in a volume, without a device
//! noise    bytes that say where they belong
//! vm       a virtual machine, and a suite that runs inside
//! power    what survives when its power goes
//! ```
//!
//! The programs are those in the directory of the test's own executable: `make test` builds them
//! first.

#![forbid(unsafe_code)]

pub mod cli;
#[cfg(feature = "suites")]
pub mod csi;
#[cfg(feature = "suites")]
pub mod csi_cases;
#[cfg(feature = "suites")]
pub mod data;
pub mod devices;
pub mod nbd;
pub mod noise;
#[cfg(feature = "suites")]
pub mod power;
pub mod system;
pub mod tools;
#[cfg(feature = "suites")]
pub mod vm;

pub use cli::Cli;
#[cfg(feature = "suites")]
pub use csi::Csi;
#[cfg(feature = "suites")]
pub use data::Data;
pub use nbd::Nbd;
pub use system::System;
