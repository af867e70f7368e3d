//! The types of `pando.v1`, generated from `proto/pando/v1/pando.proto` when the crate is built:
//! messages, the client [`v1::pando_client::PandoClient`] and the server trait
//! [`v1::pando_server::Pando`]; their documentation is in the protocol file. Beside them is what
//! the daemons and their clients must agree on: where they meet, and how sizes are written.

#![forbid(unsafe_code)]

mod place;
mod size;

pub use place::{run_dir, socket_in};
pub use size::{SIZE_FORM, parse_size};

/// Trailer of a failed call: the engine's kind of error.
pub const ERROR_KIND_KEY: &str = "pando-error-kind";
/// Trailer of a failed call: the errno that goes with it.
pub const ERRNO_KEY: &str = "pando-errno";

/// Trailer of a failed call: advice for the person at the command line, if there is any.
pub const HINT_KEY: &str = "pando-hint";

/// Label of a volume or snapshot that is not to stay: the snapshot that an export reads from, and a
/// volume that is being imported. The daemon deletes what has it at its next start.
pub const TEMPORARY_LABEL: &str = "pando/temporary";

/// Package `pando.v1`.
#[expect(missing_docs, reason = "generated code; what it means is said in the protocol file")]
pub mod v1 {
    tonic::include_proto!("pando.v1");
}
