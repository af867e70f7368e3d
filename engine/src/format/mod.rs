//! L1: the structures on disk, as bytes: encoding, decoding and nothing else. Drawn in
//! `docs/FORMAT.md`. No decoder panics, whatever it is given.

pub mod catalogue;
pub mod codec;
pub mod geometry;
pub mod group;
pub mod layout;
pub mod node;
pub mod record;
pub mod superblock;
