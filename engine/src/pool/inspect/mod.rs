//! Inspection of a pool: check, scrub, dump, exact space, differences between volumes. Each reads
//! what the last checkpoint made durable (`durable`), or walks a live map (`walk`).

pub(in crate::pool) mod check;
#[cfg(test)]
mod damage_tests;
pub(in crate::pool) mod dump;
pub(in crate::pool) mod durable;
pub(in crate::pool) mod scrub;
#[cfg(test)]
mod scrub_tests;
pub(in crate::pool) mod space_report;
pub(in crate::pool) mod walk;
#[cfg(test)]
mod walk_tests;
