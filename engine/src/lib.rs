//! Pando's engine: thin volumes, constant-time clones, and nothing acknowledged is ever lost.
//!
//! ```text
//!          daemon: config, rpc, metrics
//!          export/   nbd
//!          volume    device: the narrow waist
//!          pool/     data path, control, checkpoint, recovery, inspection
//!          journal/  the ring of records
//!          state/    catalogue, apply(): the one door
//!          map/      B+tree of extents          space/   groups, reference counts, checksums
//!          format/   bytes                      disk/    files, block devices, simulated
//!                                               runtime/ thread, ring, executor, locks
//!          units, limits, error, crc
//! ```
//!
//! Arrows only point down; `tests/tidy.rs` enforces it. The layout on disk is `docs/FORMAT.md`.

pub mod crc;
#[cfg(feature = "daemon")]
pub mod daemon;
pub mod device;
pub mod disk;
pub mod error;
pub mod export;
pub mod format;
pub mod journal;
pub mod limits;
pub mod map;
pub mod pool;
pub mod runtime;
pub mod space;
pub mod state;
pub mod units;
pub mod volume;
