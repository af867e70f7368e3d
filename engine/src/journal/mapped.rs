//! The journal's ring as memory mapped from the pool: it is made by the pool's file.

pub use crate::disk::mapped::MappedRing;
