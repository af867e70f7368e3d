//! L5: the pool: data path and control operations.

mod types;

pub use types::{
    ChangedRun, CreateVolume, ModifyVolume, PoolCounters, PoolStatus, Source, SpaceReport,
    VolumeInfo,
};
