//! The life of one device: made or taken back, resized, suspended, removed.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::abi::{self, DevInfo, Params, attribute, feature, param, state};
use super::control::Control;
use super::queue::{self, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::export::driver::{Attached, DeviceNode, DeviceSpec, Work, blocking};
use crate::export::held;
use crate::export::helper::{self, Held};
use crate::units::{BLOCK_BYTES, SECTOR_BYTES, to_u32, to_u64};

/// Features without which there is no device of this kind.
const NEEDED: u64 = feature::USER_RECOVERY
    | feature::USER_RECOVERY_REISSUE
    | feature::CMD_IOCTL_ENCODE
    | feature::USER_COPY;
/// Requests in a queue.
const DEPTH: u16 = 128;
/// Queues of a device at most; there is one for each shard.
const QUEUES_MAX: usize = 16;
/// Kernels with this feature can take a device back from a daemon that was killed while it was taking
/// it back. Older ones (before 6.15) fault if some of its queues were ready by then, and some were not:
/// there a device has one queue.
const RECOVERS_HALF_DONE: u64 = feature::UPDATE_SIZE;
/// Bytes of data in one request.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Bytes that one discard unmaps: a change of the map, not of data.
const DISCARD_BYTES_MAX: u64 = 1 << 30;
/// Bytes that one request fills with zeros, perhaps by writing them.
const WRITE_ZEROES_BYTES_MAX: u64 = 32 << 20;

/// Longest time for one step in the kernel. Some kernels have let `ADD_DEV` hang for ever.
const STEP_TIME_MAX: Duration = Duration::from_secs(60);
/// How long the end of an earlier server may take to be noticed; [`held::LOOK_AFTER`], or the
/// kernel's own 30 s, and some.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(45);
/// How long `/dev/ublkcN` may take to appear.
const CHAR_PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(10);

/// A device that is served.
pub(super) struct UblkDevice {
    node: DeviceNode,
    number: u32,
    digest: u64,
    suspended: Arc<AtomicBool>,
    /// Closed when the last queue has let go of `/dev/ublkcN`.
    served: tokio::sync::Mutex<mpsc::Receiver<()>>,
}

/// What has been made of a device so far.
struct Started {
    suspended: Arc<AtomicBool>,
    served: mpsc::Receiver<()>,
}

/// The control device, for one step that blocks.
pub(super) async fn control<T: Send + 'static>(
    what: String,
    step: impl FnOnce(&Control) -> io::Result<T> + Send + 'static,
) -> Result<T> {
    blocking(what, STEP_TIME_MAX, move || {
        let done = Control::open().and_then(|control| step(&control));
        done.map_err(|error| Error::io("ublk", error))
    })
    .await
}

/// Whether this machine can do it.
///
/// # Errors
/// `Unsupported`, saying what is missing.
pub(super) fn probe() -> Result<()> {
    let unsupported = |why: String| Error::new(ErrorKind::Unsupported, why);
    let control = Control::open().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            unsupported("no /dev/ublk-control: load the kernel's module ublk_drv".to_owned())
        }
        _ => unsupported(format!("/dev/ublk-control: {error}")),
    })?;
    let features = control.features().unwrap_or_default();
    if features & NEEDED != NEEDED {
        let what =
            format!("ublk of this kernel has features {features:#x}, needed are {NEEDED:#x}");
        return Err(unsupported(what + ": Linux 6.5 has them"));
    }
    Ok(())
}

fn params(spec: &DeviceSpec) -> Params {
    let sectors = |bytes: u64| to_u32(bytes / SECTOR_BYTES);
    let shift = |bytes: u32| u8::try_from(bytes.trailing_zeros()).unwrap_or_default();
    let block_shift = shift(to_u32(BLOCK_BYTES));
    let read_only = if spec.read_only { attribute::READ_ONLY } else { 0 };
    let discards = if spec.read_only { 0 } else { param::DISCARD };
    Params {
        types: param::BASIC | discards,
        attributes: attribute::VOLATILE_CACHE | attribute::FUA | read_only,
        logical_shift: shift(spec.sector_bytes),
        physical_shift: block_shift,
        io_min_shift: block_shift,
        io_opt_shift: shift(REQUEST_BYTES_MAX),
        sectors_max: sectors(REQUEST_BYTES_MAX.into()),
        sectors: spec.size_bytes / SECTOR_BYTES,
        discard_granularity: to_u32(BLOCK_BYTES),
        discard_sectors_max: sectors(DISCARD_BYTES_MAX),
        write_zeroes_sectors_max: sectors(WRITE_ZEROES_BYTES_MAX),
        discard_segments_max: 1,
        ..Params::default()
    }
}

fn node(number: u32, params: &Params) -> DeviceNode {
    let path = PathBuf::from(format!("/dev/ublkb{number}"));
    DeviceNode { path, major: params.disk_major, minor: params.disk_minor }
}

/// Makes a device.
///
/// # Errors
/// Nothing is left of it, unless the kernel does not answer.
pub(super) async fn attach(spec: DeviceSpec) -> Result<UblkDevice> {
    let queues = u16::try_from(spec.shards.len().clamp(1, QUEUES_MAX)).unwrap_or(1);
    let wished = DevInfo {
        depth: DEPTH,
        request_bytes_max: REQUEST_BYTES_MAX,
        device: abi::ANY_DEVICE,
        server_flags: abi::digest(&spec.identity),
        ..DevInfo::default()
    };
    let added = control("creation of a ublk device".to_owned(), move |control| {
        let offered = control.features()?;
        let queues = if offered & RECOVERS_HALF_DONE == 0 { 1 } else { queues };
        let features = NEEDED | offered & feature::UPDATE_SIZE;
        let mut info = DevInfo { features, queues, ..wished };
        control.add(&mut info)?;
        Ok(info)
    });
    let info = added.await?;
    let number = info.device;
    let mut started = None;
    let shape = params(&spec);
    let made = async {
        let what = format!("shape of ublk device {number}");
        control(what, move |control| control.set_params(number, shape)).await?;
        let served = started.insert(serve(info, &spec).await?);
        let what = format!("start of ublk device {number}");
        control(what, move |control| control.start(number)).await?;
        finish(number, served.suspended.clone()).await
    };
    match made.await {
        Ok((node, suspended)) => {
            let served = started.map(|started| started.served).expect("it is served");
            let served = tokio::sync::Mutex::new(served);
            Ok(UblkDevice { node, number, digest: info.server_flags, suspended, served })
        }
        Err(error) => {
            if let Err(left) = remove(number, started.map(|started| started.served), None).await {
                tracing::error!(number, error = %left, "ublk device is left behind");
            }
            Err(error)
        }
    }
}

/// The node of a device that has been started.
async fn finish(number: u32, suspended: Arc<AtomicBool>) -> Result<(DeviceNode, Arc<AtomicBool>)> {
    let what = format!("node of ublk device {number}");
    let params = control(what, move |control| control.params(number)).await?;
    let node = node(number, &params);
    let waited = node.clone();
    blocking(format!("ublk device {number}"), STEP_TIME_MAX, move || {
        held::await_node(&waited)?;
        helper::look_early(&waited);
        Ok(())
    })
    .await?;
    Ok((node, suspended))
}

/// Opens `/dev/ublkcN` and serves its queues on the shards.
async fn serve(info: DevInfo, spec: &DeviceSpec) -> Result<Started> {
    let path = PathBuf::from(format!("/dev/ublkc{}", info.device));
    let fd = blocking(path.display().to_string(), STEP_TIME_MAX, move || {
        open_char(&path).map_err(|error| Error::io("open", error))
    });
    let (alive, served) = mpsc::channel(1);
    let suspended = Arc::new(AtomicBool::new(false));
    let shared = Shared { fd: Arc::new(fd.await?), suspended: suspended.clone(), _alive: alive };
    let shards = spec.shards.iter().cycle();
    let mut queues = VecDeque::new();
    for (number, shard) in (0..info.queues).zip(shards) {
        let (shared, source) = (shared.clone(), Arc::clone(&spec.source));
        let work = move || queue::serve(shared, source, (number, info.depth));
        queues.push_back(shard.call(work));
    }
    while let Some(queue) = queues.pop_front() {
        queue.await??;
    }
    Ok(Started { suspended, served })
}

/// Opens the file of a device's requests: it may not be there yet, or still be an earlier
/// server's.
fn open_char(path: &std::path::Path) -> io::Result<OwnedFd> {
    let since = Instant::now();
    loop {
        match File::options().read(true).write(true).open(path) {
            Ok(file) => return Ok(file.into()),
            Err(error) if since.elapsed() >= CHAR_PATIENCE => return Err(error),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EBUSY)) => {
                thread::sleep(PAUSE);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Removes a device, whatever state it is in. `held` keeps others away until its disk is gone.
async fn remove(number: u32, served: Option<mpsc::Receiver<()>>, held: Option<Held>) -> Result<()> {
    let stop = control(format!("stop of ublk device {number}"), move |c| c.stop(number));
    stop.await?;
    // Nobody can open it any more. The removal waits for those who have, so for this.
    let_go(number, held).await?;
    if let Some(mut served) = served {
        // Nobody sends: it ends with the last queue.
        let ended = tokio::time::timeout(STEP_TIME_MAX, served.recv()).await;
        ended.map_err(|_| {
            Error::io(
                format!("ublk device {number}: its requests do not end"),
                io::Error::from_raw_os_error(libc::ETIMEDOUT),
            )
        })?;
    }
    control(format!("removal of ublk device {number}"), move |c| c.delete(number)).await
}

async fn let_go(number: u32, held: Option<Held>) -> Result<()> {
    let what = format!("use of ublk device {number}");
    blocking(what, STEP_TIME_MAX, move || {
        drop(held);
        Ok(())
    })
    .await
}

/// The device with the number, if it is that of `digest`.
pub(super) fn find(control: &Control, number: u32, digest: u64) -> io::Result<Option<DevInfo>> {
    let info = control.info(number)?;
    Ok(info.filter(|info| info.server_flags == digest && info.features & NEEDED == NEEDED))
}

/// Takes a device back, or removes it when there is no volume for it or it was never started.
///
/// # Errors
/// It is still there.
pub(super) async fn recover(info: DevInfo, spec: Option<DeviceSpec>) -> Result<Option<UblkDevice>> {
    let number = info.device;
    let Some(spec) = spec.filter(|_| info.state != state::DEAD) else {
        remove(number, None, None).await?;
        return Ok(None);
    };
    let what = format!("recovery of ublk device {number}");
    blocking(what, RECOVERY_PATIENCE + STEP_TIME_MAX, move || start_recovery(number)).await?;
    let Started { suspended, served } = serve(info, &spec).await?;
    let what = format!("end of the recovery of ublk device {number}");
    control(what, move |control| control.end_recovery(number)).await?;
    let (node, suspended) = finish(number, suspended).await?;
    let served = tokio::sync::Mutex::new(served);
    Ok(Some(UblkDevice { node, number, digest: info.server_flags, suspended, served }))
}

/// Waits until the kernel has noticed that the earlier server is gone, and begins.
fn start_recovery(number: u32) -> Result<()> {
    let failed = |error| Error::io("ublk", error);
    let control = Control::open().map_err(failed)?;
    let since = Instant::now();
    loop {
        let state = control.info(number).map_err(failed)?.map(|info| info.state);
        let begun = match state {
            Some(state::QUIESCED) => match control.start_recovery(number) {
                // A daemon has begun, and was killed before the kernel had a queue of it: to such a
                // kernel this is still the beginning.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
                begun => begun,
            },
            _ => Err(io::Error::from_raw_os_error(libc::EBUSY)),
        };
        match begun {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                if since.elapsed() >= RECOVERY_PATIENCE {
                    let what = format!("its earlier server does not end (state {state:?})");
                    return Err(Error::io(what, error));
                }
                thread::sleep(PAUSE);
            }
            result => return result.map_err(failed),
        }
    }
}

impl Attached for UblkDevice {
    fn node(&self) -> &DeviceNode {
        &self.node
    }

    fn can_resize(&self, size_bytes: u64) -> Work<'_, ()> {
        let (number, shown) = (self.number, self.node.path.display().to_string());
        Box::pin(async move {
            let sectors = size_bytes / SECTOR_BYTES;
            let what = format!("size of {shown}");
            let possible = control(what, move |control| {
                Ok(control.params(number)?.sectors == sectors
                    || control.features()? & feature::UPDATE_SIZE != 0)
            });
            if possible.await? {
                return Ok(());
            }
            let what = format!(
                "{shown} keeps its size: ublk of this kernel cannot change it (Linux 6.16 can); \
                 detach the volume first"
            );
            Err(Error::new(ErrorKind::Unsupported, what))
        })
    }

    fn resize(&self, size_bytes: u64) -> Work<'_, ()> {
        let (number, what) = (self.number, format!("size of {}", self.node.path.display()));
        Box::pin(async move {
            self.can_resize(size_bytes).await?;
            let sectors = size_bytes / SECTOR_BYTES;
            control(what, move |control| {
                if control.params(number)?.sectors == sectors {
                    return Ok(());
                }
                control.update_size(number, sectors)
            })
            .await
        })
    }

    fn detach(&self) -> Work<'_, ()> {
        Box::pin(async move {
            let (number, digest, node) = (self.number, self.digest, self.node.clone());
            let what = node.path.display().to_string();
            if control(what.clone(), move |c| find(c, number, digest)).await?.is_none() {
                // Somebody else has removed it.
                return Ok(());
            }
            let held = blocking(what, STEP_TIME_MAX, move || helper::hold(&node)).await?;
            let (_alive, nothing) = mpsc::channel(1);
            let served = std::mem::replace(&mut *self.served.lock().await, nothing);
            remove(number, Some(served), Some(held)).await
        })
    }

    fn suspend(&self) -> Work<'_, bool> {
        self.suspended.store(true, Ordering::Release);
        Box::pin(std::future::ready(Ok(true)))
    }
}

/// Numbers of all devices of the machine.
pub(super) fn numbers() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/sys/class/ublk-char") else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut numbers: Vec<u32> =
        names.filter_map(|name| name.strip_prefix("ublkc")?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

const _: () = assert!(DISCARD_BYTES_MAX.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(REQUEST_BYTES_MAX <= crate::limits::REQUEST_BYTES_MAX);
const _: () = assert!(to_u64(QUEUES_MAX) <= 1 << 12, "the kernel's bound");
