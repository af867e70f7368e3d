//! The data path: reads, writes, flushes and discards of blocks.
//!
//! ```text
//!   write     gathers the writes of one turn, admits, places and records them
//!    `- place     reserves and promises: which write may have blocks, which waits or is refused
//!    `- record    appends a record to the journal and applies it
//!   read      looks extents up, reads, verifies checksums
//!    `- fetch     loads the nodes and table pages that an operation lacks
//!   flush     makes everything before it durable        throttle  limits of a volume's I/O
//!   live      what handles of a volume read without the lock
//!   discard   gives free blocks back to the device, in the background
//! ```

pub(in crate::pool) mod discard;
#[cfg(test)]
mod discard_tests;
pub(in crate::pool) mod fetch;
pub(in crate::pool) mod flush;
#[cfg(test)]
mod gate_tests;
pub(in crate::pool) mod live;
pub(in crate::pool) mod place;
pub(in crate::pool) mod read;
pub(in crate::pool) mod record;
pub(in crate::pool) mod throttle;
#[cfg(test)]
mod throttle_tests;
pub(in crate::pool) mod write;
