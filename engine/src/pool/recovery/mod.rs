//! Opening a pool: load the newest superblock and its catalogue, replay the journal through the
//! same `apply` as the live path, write a checkpoint.

pub(in crate::pool) mod open;
pub(in crate::pool) mod recover;
#[cfg(test)]
mod recover_tests;
