//! What makes a volume a block device of this machine, in the words that the kinds of devices
//! share.
//!
//! ```text
//!   daemon::attach -- picks a kind, keeps records --> dyn Driver: ublk | nbd | loop
//!                                                        | attach, recover
//!                                                        v
//!                                                     dyn Attached: node, resize, detach, suspend
//!                                                        | requests
//!                                                        v
//!                            DeviceSpec::source.open("") on a shard -> BlockDevice
//! ```
//!
//! Drivers run on the runtime of the control plane. What may block goes through [`blocking`]; the
//! requests of a device go to the [`BlockDevice`](crate::device::BlockDevice) on a shard.
//!
//! Invariants:
//! * A device carries the identity of its volume where the kernel shows it, and a driver touches
//!   a device that it finds only after it has compared that.
//! * A device that outlives the daemon is never served by two: the lock of the pool sees to it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::export::ExportSource;
use crate::runtime::shard::ShardHandle;
use crate::units::VolumeId;

/// What a driver's operation returns.
pub type Work<'a, T> = BoxFuture<'a, Result<T>>;

/// The kinds of devices, in the order in which they are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// `/dev/ublkbN`.
    Ublk,
    /// `/dev/nbdN`, the kernel's NBD client.
    Nbd,
    /// `/dev/loopN` on a file that is served over FUSE.
    Loop,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ublk => "ublk",
            Self::Nbd => "nbd",
            Self::Loop => "loop",
        })
    }
}

/// Where drivers of one pool keep what they need, and how they know the pool's devices.
#[derive(Clone, Debug)]
pub struct Home {
    /// A directory for this pool alone, mode 0700. Records of devices are `*.toml` in it; the
    /// rest is the drivers' own.
    pub dir: PathBuf,
    /// What every identity of the pool's devices begins with: `pando-<uuid>-`.
    pub prefix: String,
}

/// A volume that is to become a device.
#[derive(Clone)]
pub struct DeviceSpec {
    /// The volume.
    pub volume: VolumeId,
    /// Its name, for messages.
    pub name: String,
    /// `pando-<uuid of the pool>-<id of the volume>`: at most 63 bytes.
    pub identity: String,
    /// Its present size, a multiple of `sector_bytes`.
    pub size_bytes: u64,
    /// Whether the device refuses writes.
    pub read_only: bool,
    /// Logical sectors: 512 or 4096. The physical ones are 4096.
    pub sector_bytes: u32,
    /// Opens the volume, whatever name is asked for; on each shard that serves the device.
    pub source: Arc<dyn ExportSource>,
    /// All shards, the volume's own first.
    pub shards: Vec<ShardHandle>,
}

/// Where a device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceNode {
    /// For example `/dev/loop0`.
    pub path: PathBuf,
    /// Device number.
    pub major: u32,
    /// Device number.
    pub minor: u32,
}

/// What an earlier daemon has written down of a device. It tells where to look, not what is
/// there: the kernel's own view is compared.
#[derive(Clone, Debug)]
pub struct Left {
    /// The identity that the device has, if it is still the one.
    pub identity: String,
    /// `None`: the daemon ended while it was making it.
    pub node: Option<DeviceNode>,
}

/// One kind of device.
pub trait Driver: Send + Sync {
    /// Which.
    fn kind(&self) -> DeviceKind;

    /// Whether this machine can do it: the kernel has it, the process may use it. Asked before
    /// each attach, so it is quick.
    ///
    /// # Errors
    /// `Unsupported`, saying what is missing.
    fn probe(&self) -> Work<'_, ()>;

    /// Called once, before [`Self::recover`]: removes what an earlier daemon left that cannot be
    /// taken back, found by [`Home::prefix`] in the kernel's own view.
    fn sweep(&self) -> Work<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Makes a device. When it fails, nothing is left of it.
    ///
    /// # Errors
    /// With `Unsupported`, `Io` or `Limit` the next kind is tried, if any will do.
    fn attach(&self, spec: DeviceSpec) -> Work<'_, Box<dyn Attached>>;

    /// Takes a device back that an earlier daemon served, with the I/O that waits in it; or, when
    /// that is impossible, or `spec` is `None` since the volume is gone, removes it. `None` when
    /// there is no such device (any more).
    ///
    /// # Errors
    /// The device is still there, and neither was possible.
    fn recover(&self, left: Left, spec: Option<DeviceSpec>) -> Work<'_, Option<Box<dyn Attached>>>;

    /// Called once at the end, when every device has been detached or suspended, or is given up.
    fn close(&self) -> Work<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// A device that is served. Calls to one come one at a time.
pub trait Attached: Send + Sync {
    /// Where it is.
    fn node(&self) -> &DeviceNode;

    /// Whether [`Attached::resize`] can give it this size. Asked before the volume grows.
    ///
    /// # Errors
    /// `Unsupported`: the device keeps the size that it has.
    fn can_resize(&self, _size_bytes: u64) -> Work<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Shows a larger size to whoever uses it.
    ///
    /// # Errors
    /// The device still has its old size, or users see the new one only when it is attached
    /// again; the error says which.
    fn resize(&self, size_bytes: u64) -> Work<'_, ()>;

    /// Removes the device; what was written to it has reached the volume.
    ///
    /// # Errors
    /// `Busy` while it is mounted, open or held, and then it goes on as if never asked.
    fn detach(&self) -> Work<'_, ()>;

    /// The daemon is about to end. `true`: the device stays with the kernel, its I/O waits, and
    /// [`Driver::recover`] takes it back. `false`: this kind cannot outlive the daemon, so it is
    /// to be detached, and nothing has been done.
    ///
    /// # Errors
    /// It could have stayed, but cannot.
    fn suspend(&self) -> Work<'_, bool> {
        Box::pin(std::future::ready(Ok(false)))
    }
}

/// Runs `work` on a thread where it may block, and waits for it at most as long as `limit`. A
/// thread that the kernel does not let go is left behind.
///
/// # Errors
/// What `work` returns; `Io` with `ETIMEDOUT` when it takes too long.
pub async fn blocking<T: Send + 'static>(
    what: String,
    limit: Duration,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let task = tokio::task::spawn_blocking(work);
    match tokio::time::timeout(limit, task).await {
        Ok(Ok(result)) => result.map_err(|error| error.context(what)),
        Ok(Err(_)) => Err(Error::new(ErrorKind::Shutdown, format!("{what}: given up"))),
        Err(_) => {
            let late = std::io::Error::from_raw_os_error(libc::ETIMEDOUT);
            let seconds = limit.as_secs();
            Err(Error::io(format!("{what}: no answer of the kernel in {seconds} s"), late))
        }
    }
}
