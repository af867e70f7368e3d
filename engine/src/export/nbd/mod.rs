//! NBD server: fixed newstyle handshake, structured replies, block status.
//!
//! ```text
//! server       sockets, limits, drain            L7, on the shards' rings
//! connection   handshake, then transmit
//! transmit     requests in, replies out    stream   the bytes that come in
//! ------------------------------------------------------------------------
//! handshake    option -> answer                  pure: bytes in, bytes out
//! request      header -> operation or errno
//! reply        outcome -> bytes
//! proto        the wire
//! ```

pub mod connection;
pub mod handshake;
pub mod proto;
pub mod reply;
pub mod request;
mod server;
mod stream;
mod transmit;

pub use server::{NbdServer, ServerOptions};
pub use transmit::Limits;
