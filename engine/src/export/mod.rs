//! L7: volumes offered to the outside.
//!
//! ```text
//! daemon -- implements --> ExportSource (names -> BlockDevice)
//!                              ^
//!          nbd/ ---------------+   a server for clients of any kind
//!          ublk/ --------------+
//!          nbd_device/ --------+   block devices of this machine: driver.rs
//!          fuse/ + loopdev ----'
//! ```
//!
//! An export sees volumes through [`crate::device::BlockDevice`] alone and never names the pool.

use std::rc::Rc;
use std::sync::Arc;

use crate::device::BlockDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::LocalFuture;

#[cfg(feature = "daemon")]
pub mod driver;
#[cfg(feature = "daemon")]
pub mod fuse;
#[cfg(feature = "daemon")]
mod held;
#[cfg(feature = "daemon")]
pub mod helper;
#[cfg(feature = "daemon")]
mod loopdev;
pub mod nbd;
#[cfg(feature = "daemon")]
pub mod nbd_device;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(feature = "daemon")]
pub mod ublk;

/// A volume that was opened for one connection.
pub struct Export {
    /// Canonical name.
    pub name: String,
    /// Text for people; may be empty.
    pub description: String,
    /// The volume.
    pub device: Rc<dyn BlockDevice>,
}

/// Where exports come from. Shared by the threads that serve; `open` runs on the thread that will
/// use the device.
pub trait ExportSource: Send + Sync {
    /// Names to show to a client that asks for a list.
    fn list(&self) -> Vec<String>;

    /// Opens the export `name`; `NotFound` if it does not exist. The empty name is the default export.
    fn open<'a>(&'a self, name: &'a str) -> LocalFuture<'a, Result<Export>>;
}

/// A source narrowed to one export, which is its default as well: what is behind a socket that
/// belongs to one volume.
pub struct OnlyExport {
    name: String,
    source: Arc<dyn ExportSource>,
}

impl OnlyExport {
    /// Nothing of `source` but `name`.
    pub fn new(name: impl Into<String>, source: Arc<dyn ExportSource>) -> Self {
        Self { name: name.into(), source }
    }
}

impl ExportSource for OnlyExport {
    fn list(&self) -> Vec<String> {
        vec![self.name.clone()]
    }

    fn open<'a>(&'a self, name: &'a str) -> LocalFuture<'a, Result<Export>> {
        if name.is_empty() || name == self.name {
            return self.source.open(&self.name);
        }
        let error = Error::new(
            ErrorKind::NotFound,
            format!("export {name}: this socket serves {} only", self.name),
        );
        Box::pin(std::future::ready(Err(error)))
    }
}
