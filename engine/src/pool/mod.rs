//! L5: the pool: data path and control operations.

mod check;
mod control;
mod core;
mod create;
#[cfg(test)]
mod damage_tests;
mod discard;
#[cfg(test)]
mod discard_tests;
mod dump;
mod durable;
mod fetch;
mod flush;
#[cfg(test)]
mod gate_tests;
mod open;
mod place;
mod read;
mod record;
mod recover;
#[cfg(test)]
mod recover_tests;
mod scrub;
#[cfg(test)]
mod scrub_tests;
mod space_report;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod throttle;
#[cfg(test)]
mod throttle_tests;
mod types;
mod walk;
#[cfg(test)]
mod walk_tests;
mod write;

pub(crate) use self::core::count;
pub use self::core::{Core, OpenOptions, Pool};
pub use check::{CheckReport, FINDINGS_MAX, Finding, FindingKind, Policy, check_offline};
pub use create::FormatOptions;
pub use dump::{DumpForm, dump_offline};
pub use scrub::{ScrubError, ScrubStep};
pub(crate) use throttle::Throttle;
pub use types::{
    ChangedRun, CreateVolume, IoLimits, ModifyVolume, PoolCounters, PoolStatus, Source,
    SpaceReport, VolumeInfo,
};
pub(crate) use write::Outcome;
