//! L1: bytes: how every structure lies on the disk, and the verification of what is read.

pub mod node;
