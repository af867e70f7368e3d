//! The CSI adapter: makes volumes of a Pando pool available to Kubernetes.
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
//! The adapter keeps no state. What CSI needs to be remembered (names, sources, parameters) is in
//! the pool's catalogue, written by the one record that makes the volume, so that a request which
//! is repeated after a crash at any point finds what it made before.
//!
//! * An id is looked up in the catalogue and never becomes part of a path (`ids`).
//! * A call that finds another one at work on its object answers ABORTED (`locks`).
//! * Errors of the daemon become CSI's by one table (`daemon`); nothing else of them passes.

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

/// Whether the program is to be the guard of a file system that is frozen ([`freeze_guard`]).
#[must_use]
pub fn is_freeze_guard() -> bool {
    std::env::args_os().nth(1).is_some_and(|first| first == node::freeze::GUARD)
}

/// Holds a file system frozen as long as the adapter that started this process wants.
#[must_use]
pub fn freeze_guard() -> ExitCode {
    node::freeze::guard()
}
