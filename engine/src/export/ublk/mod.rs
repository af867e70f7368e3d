//! ublk: a volume as `/dev/ublkbN`, which outlives the daemon.
//!
//! ```text
//! mod      the driver: finds, makes, takes back
//! device   the life of a device        control   commands on a thread that may block
//! queue    its requests, on the shards
//! abi      the kernel's numbers and structures
//! ```
//!
//! **Restart.** When the daemon ends, killed or not, the kernel keeps the device: requests wait,
//! those that the daemon had taken and not answered as well. The next daemon takes the device back
//! and gets all of them, the taken ones a second time. That is safe, because
//!
//! 1. *A request that is repeated does the same again.* Reads, writes of given data to a given
//!    place, discards, zeroes and flushes are all idempotent.
//! 2. *What is repeated was never acknowledged*: to answer it and to end it is one command
//!    (`COMMIT_AND_FETCH`), so the kernel repeats exactly what it has had no answer to. A newer
//!    write that has to come after an older one is sent after the older one's acknowledgement. So
//!    no write that a repeated one could undo was ordered behind it; among requests in flight at
//!    the same time a disk owes no order.
//! 3. *No late write of the earlier daemon lands behind that.* Its threads are gone. Writes that it
//!    had handed to the pool's disk may still be under way, but they hold the pool's file open and
//!    with it the pool's lock, and the next daemon cannot open the pool before; besides, they go to
//!    blocks that no record names.
//! 4. *A daemon that ends in good order* suspends its devices first. From then on it answers
//!    nothing, in particular none of the errors of a pool that is being closed; what it was doing
//!    is repeated by the next.
//!
//! **Identity.** `ublksrv_flags` of the device, which the kernel keeps for the server, is the
//! digest of the identity. A device is touched only when that is right.
//!
//! **Namespaces.** The daemon must not hold the last mount namespace in which its own devices are
//! mounted: its end would then unmount them, and wait for the I/O that nobody serves any more.

mod abi;
mod control;
mod device;
mod queue;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

use crate::error::{Error, Result};
use crate::export::driver::{Attached, DeviceKind, DeviceSpec, Driver, Home, Left, Work, blocking};

/// Makes devices of this kind. It keeps nothing: the kernel does.
pub struct UblkDriver;

impl UblkDriver {
    /// For the devices of one pool.
    #[must_use]
    pub fn new(_home: Home) -> Self {
        Self
    }
}

/// How long the probe may take.
const PROBE_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(5);

async fn recover(left: Left, spec: Option<DeviceSpec>) -> Result<Option<Box<dyn Attached>>> {
    let digest = abi::digest(&left.identity);
    let noted = left
        .node
        .and_then(|node| node.path.to_str()?.strip_prefix("/dev/ublkb")?.parse::<u32>().ok());
    let found = blocking("ublk devices".to_owned(), PROBE_TIME_MAX, move || {
        // Without the driver there are no devices.
        let Ok(control) = control::Control::open() else { return Ok(None) };
        for number in noted.into_iter().chain(device::numbers()) {
            let found = device::find(&control, number, digest);
            let found = found.map_err(|error| Error::io(format!("ublk device {number}"), error))?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    });
    let Some(info) = found.await? else { return Ok(None) };
    let device = device::recover(info, spec).await?;
    Ok(device.map(|device| -> Box<dyn Attached> { Box::new(device) }))
}

impl Driver for UblkDriver {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Ublk
    }

    fn probe(&self) -> Work<'_, ()> {
        Box::pin(blocking("this kernel".to_owned(), PROBE_TIME_MAX, device::probe))
    }

    fn attach(&self, spec: DeviceSpec) -> Work<'_, Box<dyn Attached>> {
        Box::pin(async {
            let device: Box<dyn Attached> = Box::new(device::attach(spec).await?);
            Ok(device)
        })
    }

    fn recover(&self, left: Left, spec: Option<DeviceSpec>) -> Work<'_, Option<Box<dyn Attached>>> {
        Box::pin(recover(left, spec))
    }
}
