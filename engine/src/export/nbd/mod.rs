//! NBD server: newstyle handshake, structured replies, block status.

pub mod handshake;
pub mod proto;
pub mod reply;
pub mod request;
