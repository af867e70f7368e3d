//! ublk: a volume as `/dev/ublkbN`, which outlives the daemon.

use crate::error::{Error, ErrorKind, Result};
use crate::export::driver::{Attached, DeviceKind, DeviceSpec, Driver, Home, Left, Work};

/// Makes devices of this kind.
pub struct UblkDriver {
    _home: Home,
}

impl UblkDriver {
    /// For the devices of one pool.
    #[must_use]
    pub const fn new(home: Home) -> Self {
        Self { _home: home }
    }
}

fn not_built<'a, T: Send + 'a>() -> Work<'a, T> {
    let result: Result<T> = Err(Error::new(ErrorKind::Unsupported, "not built in"));
    Box::pin(std::future::ready(result))
}

impl Driver for UblkDriver {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Ublk
    }

    fn probe(&self) -> Work<'_, ()> {
        not_built()
    }

    fn attach(&self, _spec: DeviceSpec) -> Work<'_, Box<dyn Attached>> {
        not_built()
    }

    fn recover(
        &self,
        _left: Left,
        _spec: Option<DeviceSpec>,
    ) -> Work<'_, Option<Box<dyn Attached>>> {
        not_built()
    }
}
