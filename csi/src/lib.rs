//! The CSI adapter: offers volumes of a Pando pool to Kubernetes.
//!
//! ```text
//!  kubelet, sidecars                                       pandod
//!        | unix socket, csi.v1                                ^ unix socket, pando.v1
//!        v                                                    |
//!  server -- identity                                         |
//!    |       controller   volumes, snapshots: the catalogue --+-- daemon   client, errors
//!    |       group        snapshots of several volumes -------|
//!    |       metadata     changed blocks ---------------------|
//!    |       node         devices, file systems, mounts ------'
//!  registration, health
//! ```
//!
//! The adapter keeps no state. Names, sources and parameters are in the pool's catalogue, in the
//! one record that creates the volume, so a request that is repeated after a crash at any point
//! finds what it created before.
//!
//! * An id is looked up in the catalogue and never becomes part of a path (`ids`).
//! * A call answers ABORTED while another call works on the same object (`locks`).
//! * One table translates the errors of the daemon to codes of CSI (`daemon`).

#![deny(unsafe_code)]

mod adapter;
mod authority;
pub mod config;
mod controller;
mod daemon;
mod group;
mod health;
mod identity;
mod ids;
pub mod labels;
mod listen;
mod locks;
mod metadata;
mod node;
pub mod proto;
mod registration;
mod server;
mod validate;

#[doc(hidden)]
pub use server::Services;
pub use server::{init_log, run};

use std::process::ExitCode;

/// Whether this process was started as the guard of a frozen file system ([`freeze_guard`]).
#[must_use]
pub fn is_freeze_guard() -> bool {
    std::env::args_os().nth(1).is_some_and(|first| first == node::freeze::GUARD)
}

/// Keeps a file system frozen until the adapter that started this process releases it.
#[must_use]
pub fn freeze_guard() -> ExitCode {
    node::freeze::guard()
}
