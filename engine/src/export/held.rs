//! Whether anybody uses a block device, for kinds of devices that the kernel removes under their
//! users' feet, and small things that sysfs tells of one.

use std::fs::{self, File};
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{major, makedev, minor};

use crate::error::{Error, ErrorKind, Result};
use crate::export::driver::DeviceNode;

/// The first argument of a helper process, by which it is recognised.
pub(super) const HELPER_ARGUMENT: &str = "device-apart";
/// Whoever looks at a device that has just changed (udev) is gone by then.
const USE_PATIENCE: Duration = Duration::from_secs(1);
/// Whoever holds it for an earlier daemon is gone by then: when the kernel has looked after the
/// request that he waits for, which takes it [`LOOK_AFTER`], or 30 s.
const EARLIER_PATIENCE: Duration = Duration::from_secs(45);
/// How long the kernel or udev may take to make the file of a new device.
const NODE_PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);

/// Takes a device for this process alone, so that nobody mounts it any more, and writes back what
/// the kernel still holds for it; what that has met, if it fails. Blocks for as long as that takes,
/// so it is for the [helper process](super::helper).
///
/// # Errors
/// `Busy` while it is mounted, held by another device, or open in a program that can be seen.
pub(super) fn hold(node: &DeviceNode) -> Result<(File, Option<std::io::Error>)> {
    let begin = Instant::now();
    let mut since = begin;
    loop {
        let refused = match try_hold(node) {
            Err(error) if error.kind() == ErrorKind::Busy => error,
            result => return result,
        };
        if begin.elapsed() < EARLIER_PATIENCE && held_for_another_daemon(node) {
            // It can be gone by the next look and still be letting go of the device.
            since = Instant::now();
        }
        if since.elapsed() >= USE_PATIENCE {
            return Err(refused);
        }
        thread::sleep(PAUSE);
    }
}

/// Whether a process is a helper of a daemon.
fn is_helper(process: u32) -> bool {
    let words = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    words.split(|byte| *byte == 0).nth(1) == Some(HELPER_ARGUMENT.as_bytes())
}

fn held_for_another_daemon(node: &DeviceNode) -> bool {
    opened_by(makedev(node.major, node.minor)).is_some_and(is_helper)
}

fn try_hold(node: &DeviceNode) -> Result<(File, Option<std::io::Error>)> {
    let shown = node.path.display();
    let busy = |why: &str| {
        Err(Error::new(ErrorKind::Busy, format!("{shown} is {why}; unmount or close it first")))
    };
    let failed = |error| Error::io(shown.to_string(), error);
    let opened = File::options().read(true).custom_flags(libc::O_EXCL).open(&node.path);
    let file = match opened {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            return busy("mounted, or held by another device");
        }
        result => result.map_err(failed)?,
    };
    let metadata = file.metadata().map_err(failed)?;
    if (major(metadata.st_rdev()), minor(metadata.st_rdev())) != (node.major, node.minor) {
        return Err(Error::new(ErrorKind::Busy, format!("{shown} is another device by now")));
    }
    if let Some(process) = opened_by(metadata.st_rdev()) {
        return busy(&format!("open in process {process}"));
    }
    let lost = file.sync_all().err();
    Ok((file, lost))
}

/// A process, other than this, that has the device open.
fn opened_by(device: u64) -> Option<u32> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let own = std::process::id();
    let mut others = processes.filter_map(|entry| {
        let process = entry.file_name().to_str()?.parse::<u32>().ok()?;
        (process != own).then_some((process, entry.path()))
    });
    let has_open = |path: &Path| {
        let Ok(files) = fs::read_dir(path.join("fd")) else { return false };
        files.flatten().any(|file| {
            let opened = fs::metadata(file.path());
            opened.is_ok_and(|m| m.file_type().is_block_device() && m.st_rdev() == device)
        })
    };
    others.find(|(_, path)| has_open(path)).map(|(process, _)| process)
}

/// Waits for the file of a device that the kernel has just made, and compares its numbers.
///
/// # Errors
/// It does not come, or is of another device.
pub(super) fn await_node(node: &DeviceNode) -> Result<()> {
    let since = Instant::now();
    loop {
        let there = fs::metadata(&node.path);
        let right = there.as_ref().is_ok_and(|m| {
            let (device, block) = (m.st_rdev(), m.file_type().is_block_device());
            block && (major(device), minor(device)) == (node.major, node.minor)
        });
        if right {
            return Ok(());
        }
        if since.elapsed() >= NODE_PATIENCE {
            let (major, minor) = (node.major, node.minor);
            let what = format!("{}: no block device {major}:{minor}", node.path.display());
            return Err(Error::io(what, there.err().unwrap_or_else(|| libc_error(libc::ENXIO))));
        }
        thread::sleep(PAUSE);
    }
}

fn libc_error(errno: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(errno)
}

/// The directory of a device in sysfs.
pub(super) fn sysfs(node: &DeviceNode) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", node.major, node.minor))
}

/// How long the kernel waits for a request before it asks the driver about it: not longer than
/// the end of a server may go unnoticed. The driver lets the time begin again while the server is
/// alive. What the kernel has otherwise is 30 s, which is right as well.
pub(super) const LOOK_AFTER: Duration = Duration::from_secs(3);
/// Where it is set. Since 6.12 the kernel freezes the queue of the device for that: whoever writes
/// the file waits until all I/O under way has ended, and cannot be killed meanwhile.
pub(super) const LOOK_AFTER_FILE: &str = "queue/io_timeout";

/// Whether the file says [`LOOK_AFTER`] already.
pub(super) fn looks_early(file: &Path) -> bool {
    let shown = fs::read_to_string(file).unwrap_or_default();
    shown.trim_end() == LOOK_AFTER.as_millis().to_string()
}

/// Makes it say so. May block: see [`LOOK_AFTER_FILE`].
///
/// # Errors
/// The kernel's.
pub(super) fn write_look_after(file: &Path) -> std::io::Result<()> {
    fs::write(file, LOOK_AFTER.as_millis().to_string())
}

/// Says what it means that it does not say so.
pub(super) fn warn_of_late_looks(device: &Path) {
    let device = device.display();
    tracing::warn!(%device, "a restart of pandod may hold I/O up for 30 s: no leave to change that");
}
