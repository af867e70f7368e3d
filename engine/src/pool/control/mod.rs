//! Control operations: formatting a pool; creating, changing and deleting volumes.

pub(in crate::pool) mod create;
pub(in crate::pool) mod volumes;
