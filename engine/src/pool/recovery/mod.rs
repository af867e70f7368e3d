//! Opening a pool: the newest superblock, the catalogue, the journal through the same `apply` as
//! the live path, and a checkpoint.

pub(in crate::pool) mod open;
pub(in crate::pool) mod recover;
#[cfg(test)]
mod recover_tests;
