//! One driver for each kind of device.

use crate::export::driver::{DeviceKind, Driver, Home};
use crate::export::fuse::LoopDriver;
use crate::export::nbd_device::NbdDeviceDriver;
use crate::export::ublk::UblkDriver;

/// The drivers of one pool.
pub(super) struct Drivers {
    ublk: UblkDriver,
    nbd: NbdDeviceDriver,
    on_loop: LoopDriver,
}

impl Drivers {
    pub(super) fn new(home: Home) -> Self {
        Self {
            ublk: UblkDriver::new(home.clone()),
            nbd: NbdDeviceDriver::new(home.clone()),
            on_loop: LoopDriver::new(home),
        }
    }

    /// The driver of one kind.
    pub(super) const fn of(&self, kind: DeviceKind) -> &dyn Driver {
        match kind {
            DeviceKind::Ublk => &self.ublk,
            DeviceKind::Nbd => &self.nbd,
            DeviceKind::Loop => &self.on_loop,
        }
    }

    /// All of them.
    pub(super) fn all(&self) -> [&dyn Driver; 3] {
        [&self.ublk, &self.nbd, &self.on_loop]
    }
}
