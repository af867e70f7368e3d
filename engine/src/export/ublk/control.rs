//! Commands for `/dev/ublk-control`. Each blocks its thread until the kernel has answered; see
//! [`blocking`](crate::export::driver::blocking).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode, squeue};
use zerocopy::IntoBytes;

use super::abi::{ANY_DEVICE, CtrlCmd, DevInfo, NO_QUEUE, PARAMS_SET_BYTES, Params, ctrl};
use crate::units::{to_u32, to_u64};

const PATH: &str = "/dev/ublk-control";

/// The control device.
pub(super) struct Control {
    file: File,
}

impl Control {
    /// Opens it.
    ///
    /// # Errors
    /// The system's: `NotFound` without the driver.
    pub(super) fn open() -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(PATH)?;
        Ok(Self { file })
    }

    /// What the driver can do.
    pub(super) fn features(&self) -> io::Result<u64> {
        let mut features = 0_u64;
        self.command(ctrl::GET_FEATURES, 0, 0, Some(features.as_mut_bytes()))?;
        Ok(features)
    }

    /// Makes a device; `info` is what is wished for and then what it became.
    pub(super) fn add(&self, info: &mut DevInfo) -> io::Result<()> {
        self.command(ctrl::ADD_DEV, ANY_DEVICE, 0, Some(info.as_mut_bytes()))
    }

    /// What the kernel knows of a device; `None` when there is none of that number.
    pub(super) fn info(&self, device: u32) -> io::Result<Option<DevInfo>> {
        let mut info = DevInfo::default();
        match self.command(ctrl::GET_DEV_INFO, device, 0, Some(info.as_mut_bytes())) {
            Ok(()) => Ok(Some(info)),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Shapes a device that has not been started.
    pub(super) fn set_params(&self, device: u32, mut params: Params) -> io::Result<()> {
        params.len = PARAMS_SET_BYTES;
        self.command(ctrl::SET_PARAMS, device, 0, Some(params.as_mut_bytes()))
    }

    /// The shape of a device.
    pub(super) fn params(&self, device: u32) -> io::Result<Params> {
        let len = to_u32(to_u64(size_of::<Params>()));
        let mut params = Params { len, ..Params::default() };
        self.command(ctrl::GET_PARAMS, device, 0, Some(params.as_mut_bytes()))?;
        Ok(params)
    }

    /// Starts a device; waits until every tag of every queue has been fetched for.
    pub(super) fn start(&self, device: u32) -> io::Result<()> {
        self.command(ctrl::START_DEV, device, std::process::id().into(), None)
    }

    /// Stops a device: its disk goes, then all that waits for requests gets `ENODEV`.
    pub(super) fn stop(&self, device: u32) -> io::Result<()> {
        self.command(ctrl::STOP_DEV, device, 0, None)
    }

    /// Deletes a device; waits until nobody has `/dev/ublkcN` open.
    pub(super) fn delete(&self, device: u32) -> io::Result<()> {
        self.command(ctrl::DEL_DEV, device, 0, None)
    }

    /// Begins to take a device over whose server is gone; `EBUSY` while that is still going.
    pub(super) fn start_recovery(&self, device: u32) -> io::Result<()> {
        self.command(ctrl::START_USER_RECOVERY, device, 0, None)
    }

    /// Ends it; waits as [`Self::start`] does, and lets the I/O flow.
    pub(super) fn end_recovery(&self, device: u32) -> io::Result<()> {
        self.command(ctrl::END_USER_RECOVERY, device, std::process::id().into(), None)
    }

    /// Gives a running device another size.
    pub(super) fn update_size(&self, device: u32, sectors: u64) -> io::Result<()> {
        self.command(ctrl::UPDATE_SIZE, device, sectors, None)
    }

    fn command(
        &self,
        operation: u32,
        device: u32,
        data: u64,
        argument: Option<&mut [u8]>,
    ) -> io::Result<()> {
        let mut command = CtrlCmd { device, queue: NO_QUEUE, data, ..CtrlCmd::default() };
        if let Some(bytes) = argument {
            command.address = to_u64(bytes.as_mut_ptr().expose_provenance());
            command.len = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        }
        let mut bytes = [0; 80];
        bytes[..size_of::<CtrlCmd>()].copy_from_slice(command.as_bytes());
        let fd = Fd(self.file.as_raw_fd());
        let entry = opcode::UringCmd80::new(fd, operation).cmd(bytes).build();

        // Commands are rare: a ring for each is the simplest that can be.
        let mut ring = IoUring::<squeue::Entry128, cqueue::Entry>::builder().build(1)?;
        // SAFETY: the descriptor and the argument are borrowed until this returns, and that is
        // not before the command has completed.
        let pushed = unsafe { ring.submission().push(&entry) };
        pushed.map_err(io::Error::other)?;
        loop {
            match ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            if let Some(completion) = ring.completion().next() {
                return match completion.result() {
                    0.. => Ok(()),
                    errno => Err(io::Error::from_raw_os_error(-errno)),
                };
            }
        }
    }
}
