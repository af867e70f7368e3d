//! L5: the pool, by topic.
//!
//! ```text
//!   data/        reads, writes, flushes, discards          core    an open pool and its lock
//!   control/     format; create, change, delete volumes    types   requests and answers
//!   checkpoint/  the durable state: seal, write, publish
//!   recovery/    open and close
//!   inspect/     check, scrub, dump, space, differences
//! ```

pub(crate) mod checkpoint;
mod control;
mod core;
mod data;
mod inspect;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod probe;
mod recovery;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod types;

pub(crate) use self::core::count;
pub use self::core::{Core, OpenOptions, Pool};
pub use control::create::FormatOptions;
pub(crate) use data::live::LiveVolume;
pub(crate) use data::write::Outcome;
pub use inspect::check::{CheckReport, FINDINGS_MAX, Finding, FindingKind, Policy, check_offline};
pub use inspect::dump::{DumpForm, dump_offline};
pub use inspect::scrub::{ScrubError, ScrubStep};
pub use types::{
    ChangedRun, CreateVolume, IoLimits, ModifyVolume, PoolCounters, PoolStatus, Source,
    SpaceReport, VolumeInfo,
};
