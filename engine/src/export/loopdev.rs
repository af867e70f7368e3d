//! Loop devices: the kernel's own calls, without a crate (`linux/loop.h`).
//!
//! ```text
//!   attach   LOOP_CTL_GET_FREE -> LOOP_CONFIGURE(file, direct I/O, sectors) -> GET_STATUS64
//!   resize   LOOP_SET_CAPACITY: the kernel asks the file for its size again
//!   detach   open O_EXCL (refused while mounted) -> LOOP_CLR_FD -> GET_STATUS64: gone, or still
//!            there since others have it open, and then it is left as it was
//! ```
//!
//! A device is known by the last part of its backing file's path, as sysfs shows it: the
//! identity of the volume. Everything here may block, for as long as the file's server does.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{major, minor};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Ioctl, IoctlOutput, NoArg, Opcode, Setter, ioctl};
use zerocopy::{FromZeros, Immutable, IntoBytes};

use crate::error::{Error, ErrorKind, Result};
use crate::export::driver::DeviceNode;

/// Where devices without a file are asked for.
pub(super) const CONTROL: &str = "/dev/loop-control";
/// Free devices that others may snatch away before one is ours.
const FREE_ATTEMPTS: usize = 64;
/// Looks at a device that is in use, before it is believed: programs that only want to know what
/// is on a new device open it for a moment.
const USE_ATTEMPTS: usize = 10;
/// Pause between them.
const USE_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of a name in [`Info`], its end included.
const NAME_BYTES: usize = 64;

const LOOP_CLR_FD: Opcode = 0x4C01;
const LOOP_SET_STATUS64: Opcode = 0x4C04;
const LOOP_GET_STATUS64: Opcode = 0x4C05;
const LOOP_SET_CAPACITY: Opcode = 0x4C07;
const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LOOP_CTL_GET_FREE: Opcode = 0x4C82;

/// The device refuses writes.
const FLAG_READ_ONLY: u32 = 1;
/// The device lets go of its file when the last user closes it.
const FLAG_AUTOCLEAR: u32 = 4;
/// The file is read and written past the page cache.
const FLAG_DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[derive(Clone, FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; NAME_BYTES],
    crypt_name: [u8; NAME_BYTES],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[derive(FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct Configuration {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Info>() == 232);
const _: () = assert!(size_of::<Configuration>() == 304);

/// `LOOP_CTL_GET_FREE`: the number is what the call itself returns.
struct GetFree;

// SAFETY: the call takes no argument, and its answer is no pointer.
unsafe impl Ioctl for GetFree {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        LOOP_CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(
        number: IoctlOutput,
        _: *mut rustix::ffi::c_void,
    ) -> rustix::io::Result<i32> {
        Ok(number)
    }
}

/// Makes one of the calls below. Private, since only these fit a loop device.
fn call<I: Ioctl>(device: impl AsFd, operation: I) -> std::result::Result<I::Output, Errno> {
    // SAFETY: each operation of this module has the type that `linux/loop.h` gives its number,
    // and a file that is no loop device refuses the number.
    unsafe { ioctl(device, operation) }
}

fn configure(device: &File, configuration: Configuration) -> std::result::Result<(), Errno> {
    // SAFETY: the number takes a `struct loop_config`.
    let operation = unsafe { Setter::<LOOP_CONFIGURE, Configuration>::new(configuration) };
    call(device, operation)
}

fn status(device: &File) -> std::result::Result<Info, Errno> {
    // SAFETY: the number fills a `struct loop_info64`.
    let operation = unsafe { Getter::<LOOP_GET_STATUS64, Info>::new() };
    call(device, operation)
}

fn set_status(device: &File, info: Info) -> std::result::Result<(), Errno> {
    // SAFETY: the number takes a `struct loop_info64`.
    let operation = unsafe { Setter::<LOOP_SET_STATUS64, Info>::new(info) };
    call(device, operation)
}

fn clear(device: &File) -> std::result::Result<(), Errno> {
    // SAFETY: the number takes no argument.
    let operation = unsafe { NoArg::<LOOP_CLR_FD>::new() };
    call(device, operation)
}

fn set_capacity(device: &File) -> std::result::Result<(), Errno> {
    // SAFETY: the number takes no argument.
    let operation = unsafe { NoArg::<LOOP_SET_CAPACITY>::new() };
    call(device, operation)
}

/// Makes `file` a loop device that goes past the page cache.
///
/// # Errors
/// `Limit` when all devices are taken again and again, `Unsupported` when the kernel does not do
/// direct I/O on the file, or its own error.
pub(super) fn attach(
    file: &File,
    identity: &str,
    (read_only, sector_bytes): (bool, u32),
) -> Result<DeviceNode> {
    let control = File::options().read(true).write(true).open(CONTROL);
    let control = control.map_err(|error| Error::io(CONTROL, error))?;
    for _ in 0..FREE_ATTEMPTS {
        let number = call(&control, GetFree).map_err(|error| Error::io(CONTROL, error.into()))?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let failed = |error: io::Error| Error::io(path.display().to_string(), error);
        let device = File::options().read(true).write(!read_only).open(&path).map_err(failed)?;
        match configure(&device, configuration(file, identity, read_only, sector_bytes)) {
            Ok(()) => {}
            // Another program was faster.
            Err(Errno::BUSY) => continue,
            Err(error) => return Err(failed(error.into())),
        }
        let flags = status(&device).map_err(|error| failed(error.into()))?.flags;
        if flags & FLAG_DIRECT_IO == 0 {
            clear(&device).map_err(|error| failed(error.into()))?;
            let what = format!("{}: the kernel does no direct I/O on FUSE files", path.display());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let rdev = device.metadata().map_err(failed)?.rdev();
        return Ok(DeviceNode { path, major: major(rdev), minor: minor(rdev) });
    }
    Err(Error::new(ErrorKind::Limit, format!("{CONTROL}: no free loop device can be had")))
}

fn configuration(file: &File, identity: &str, read_only: bool, sector_bytes: u32) -> Configuration {
    let mut configuration = Configuration::new_zeroed();
    // A descriptor that is open is not negative.
    configuration.fd = file.as_fd().as_raw_fd().cast_unsigned();
    configuration.block_size = sector_bytes;
    let info = &mut configuration.info;
    info.flags = FLAG_DIRECT_IO | if read_only { FLAG_READ_ONLY } else { 0 };
    // Only shown; what is compared is the path of the file.
    let shown = identity.len().min(NAME_BYTES - 1);
    info.file_name[..shown].copy_from_slice(&identity.as_bytes()[..shown]);
    configuration
}

/// Lets the device ask its file for its size again. The file system that has the file must know
/// the new size already.
///
/// # Errors
/// The kernel's; `Io` when the device has another size after all.
pub(super) fn resize(node: &DeviceNode, size_bytes: u64) -> Result<()> {
    let failed = |error: io::Error| Error::io(format!("size of {}", node.path.display()), error);
    let device = File::open(&node.path).map_err(failed)?;
    set_capacity(&device).map_err(|error| failed(error.into()))?;
    let sectors = fs::read_to_string(sysfs(node).join("size")).map_err(failed)?;
    let shown = sectors.trim().parse::<u64>().unwrap_or_default().saturating_mul(512);
    if shown == size_bytes {
        return Ok(());
    }
    let what = format!("it is {shown} bytes instead of {size_bytes}");
    Err(failed(io::Error::other(what)))
}

/// Removes a device; one that is no longer `identity`'s has been removed by somebody else.
///
/// # Errors
/// `Busy` while it is mounted, held by another device, or open; it then goes on as before. Or the
/// kernel's own error.
pub(super) fn detach(node: &DeviceNode, identity: &str) -> Result<()> {
    let mut why = "";
    for attempt in 0..USE_ATTEMPTS {
        if attempt > 0 {
            thread::sleep(USE_PAUSE);
        }
        let tried = try_detach(node, identity);
        match tried.map_err(|error| Error::io(node.path.display().to_string(), error))? {
            None => return Ok(()),
            Some(in_use) => why = in_use,
        }
    }
    let what = format!("{} is {why}; unmount or close it first", node.path.display());
    Err(Error::new(ErrorKind::Busy, what))
}

/// Removes a device, or says how it is in use.
fn try_detach(node: &DeviceNode, identity: &str) -> io::Result<Option<&'static str>> {
    if backing(&sysfs(node)).as_deref() != Some(identity) {
        return Ok(None);
    }
    // Exclusive, so that nobody mounts it from here on.
    let device = File::options().read(true).custom_flags(libc::O_EXCL).open(&node.path);
    let device = match device {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            return Ok(Some("mounted, or held by another device"));
        }
        device => device?,
    };
    if let Err(error) = device.sync_all() {
        // Who wrote it without asking for more will not hear of it; it must not stay for that.
        tracing::warn!(device = %node.path.display(), %error, "device is removed with writes lost");
    }
    match clear(&device) {
        Ok(()) | Err(Errno::NXIO) => {}
        Err(error) => return Err(error.into()),
    }
    match status(&device) {
        // Nobody else has it open, and nobody can open it any more. It goes when it is closed.
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
        Ok(mut info) => {
            // Without this it would go when the others close it.
            info.flags &= !FLAG_AUTOCLEAR;
            set_status(&device, info)?;
            Ok(Some("open in a program"))
        }
    }
}

/// The devices on files whose names begin with `prefix`, with these names.
pub(super) fn find(prefix: &str) -> Vec<(DeviceNode, String)> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names
        .filter_map(|name| {
            let minor = name.strip_prefix("loop")?.parse().ok()?;
            let identity = backing(&Path::new("/sys/block").join(&name))?;
            let path = Path::new("/dev").join(&name);
            identity
                .starts_with(prefix)
                .then_some((DeviceNode { path, major: LOOP_MAJOR, minor }, identity))
        })
        .collect()
}

/// Lets go of the file of a device that nobody serves any more: at once, or when its last user
/// closes it. Whether it is gone at once.
///
/// # Errors
/// The kernel's.
pub(super) fn release(node: &DeviceNode) -> Result<bool> {
    let failed = |error: io::Error| Error::io(node.path.display().to_string(), error);
    let device = File::open(&node.path).map_err(failed)?;
    match clear(&device) {
        Ok(()) | Err(Errno::NXIO) => {}
        Err(error) => return Err(failed(error.into())),
    }
    // Of a device that is still there it may return what the dead server makes of its question.
    Ok(status(&device).is_err_and(|error| error == Errno::NXIO))
}

/// Device number of all loop devices.
const LOOP_MAJOR: u32 = 7;

fn sysfs(node: &DeviceNode) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", node.major, node.minor))
}

/// The name of the file behind a device, as sysfs shows it; `None` for a device without.
fn backing(sysfs: &Path) -> Option<String> {
    let shown = fs::read_to_string(sysfs.join("loop/backing_file")).ok()?;
    Some(file_name(&shown).to_owned())
}

/// The last part of a path as the kernel writes it.
fn file_name(shown: &str) -> &str {
    let path = shown.trim_end_matches('\n');
    let path = path.strip_suffix(" (deleted)").unwrap_or(path);
    path.rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_as_the_kernel_shows_them() {
        assert_eq!(file_name("/run/pando/fuse/pando-00-7\n"), "pando-00-7");
        assert_eq!(file_name("/pando-00-7 (deleted)\n"), "pando-00-7");
        assert_eq!(file_name("\n"), "");
    }

    #[test]
    fn the_longest_identity_is_shown_whole() {
        let identity = format!("pando-{}-{}", uuid::Uuid::nil(), u64::MAX);
        assert_eq!(identity.len(), NAME_BYTES - 1);
        let file = File::open("/dev/null").unwrap();
        let configuration = configuration(&file, &identity, true, 4096);
        assert_eq!(&configuration.info.file_name[..NAME_BYTES - 1], identity.as_bytes());
        assert_eq!(configuration.info.file_name[NAME_BYTES - 1], 0);
        assert_eq!(configuration.info.flags, FLAG_DIRECT_IO | FLAG_READ_ONLY);
    }
}
