//! L5: the pool: data path and control operations.

mod control;
mod core;
mod create;
mod fetch;
mod flush;
mod open;
mod place;
mod read;
mod record;
#[cfg(test)]
mod tests;
mod types;
mod walk;
mod write;

pub(crate) use self::core::count;
pub use self::core::{Core, OpenOptions, Pool};
pub use create::FormatOptions;
pub use types::{
    ChangedRun, CreateVolume, ModifyVolume, PoolCounters, PoolStatus, Source, SpaceReport,
    VolumeInfo,
};
pub(crate) use write::Outcome;
