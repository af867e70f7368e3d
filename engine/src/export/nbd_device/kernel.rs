//! The kernel's NBD client: its commands, and what it shows of a device in `/sys/block/nbdN`.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::netlink::{Attributes, Family};
use crate::export::driver::{DeviceNode, DeviceSpec};
use crate::export::held;
use crate::export::nbd::proto::export_flag;
use crate::units::SECTOR_BYTES;

const FAMILY: &str = "nbd";

const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;

const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const DEAD_CONNECTION_TIMEOUT: u16 = 8;
const BACKEND_IDENTIFIER: u16 = 10;

const SOCKET_ITEM: u16 = 1;
const SOCKET_FD: u16 = 1;

/// How long I/O waits for a daemon that is gone, before it fails.
const DEAD_CONNECTION_SECONDS: u64 = 600;

fn sockets(socket: &OwnedFd) -> Attributes {
    let fd = socket.as_raw_fd().unsigned_abs();
    let item = Attributes::default().u32(SOCKET_FD, fd);
    Attributes::default().nested(SOCKET_ITEM, &item)
}

fn flags(read_only: bool) -> u64 {
    let served = export_flag::HAS_FLAGS | export_flag::SEND_FLUSH | export_flag::SEND_FUA;
    let more = if read_only {
        export_flag::READ_ONLY
    } else {
        export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES
    };
    u64::from(served | more)
}

/// Whether the kernel has the client.
///
/// # Errors
/// `NotFound`, or the system's.
pub(super) fn probe() -> io::Result<()> {
    Family::open(FAMILY).map(drop)
}

/// Makes a device whose requests come out of the other end of `socket`: that of the number, or any
/// unused one, which the kernel makes if it has none. Returns its number.
///
/// # Errors
/// `ResourceBusy` when somebody else has that one by now, or the kernel's.
pub(super) fn connect(spec: &DeviceSpec, number: Option<u32>, socket: &OwnedFd) -> io::Result<u32> {
    // Without a time-out for requests: see the module's documentation. To name none leaves what
    // `look_early` has set; to name 0 would set it to 30 s.
    let attributes = Attributes::default()
        .u64(SIZE_BYTES, spec.size_bytes)
        .u64(BLOCK_SIZE_BYTES, spec.sector_bytes.into())
        .u64(DEAD_CONNECTION_TIMEOUT, DEAD_CONNECTION_SECONDS)
        .u64(SERVER_FLAGS, flags(spec.read_only))
        .text(BACKEND_IDENTIFIER, &spec.identity)
        .nested(SOCKETS, &sockets(socket));
    let attributes = match number {
        Some(number) => attributes.u32(INDEX, number),
        None => attributes,
    };
    let answer = Family::open(FAMILY)?.call(CONNECT, &attributes)?;
    let number = answer.get(INDEX).and_then(|index| index.try_into().ok()).map(u32::from_ne_bytes);
    number.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Gives a device whose connection is dead a new one; the kernel compares the identity. It keeps
/// silent when the old connection is not dead yet, and lets `socket` go.
pub(super) fn reconnect(number: u32, identity: &str, socket: &OwnedFd) -> io::Result<()> {
    let attributes = Attributes::default()
        .u32(INDEX, number)
        .u64(DEAD_CONNECTION_TIMEOUT, DEAD_CONNECTION_SECONDS)
        .text(BACKEND_IDENTIFIER, identity)
        .nested(SOCKETS, &sockets(socket));
    Family::open(FAMILY)?.call(RECONFIGURE, &attributes).map(drop)
}

/// Gives a device another size.
pub(super) fn resize(number: u32, identity: &str, size_bytes: u64) -> io::Result<()> {
    let attributes = Attributes::default()
        .u32(INDEX, number)
        .u64(SIZE_BYTES, size_bytes)
        .text(BACKEND_IDENTIFIER, identity);
    Family::open(FAMILY)?.call(RECONFIGURE, &attributes).map(drop)
}

/// Ends a device: what is in flight fails.
pub(super) fn disconnect(number: u32) -> io::Result<()> {
    let attributes = Attributes::default().u32(INDEX, number);
    Family::open(FAMILY)?.call(DISCONNECT, &attributes).map(drop)
}

fn directory(number: u32) -> PathBuf {
    PathBuf::from(format!("/sys/block/nbd{number}"))
}

fn read(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end().to_owned())
}

/// The identity that a device was made with; `None` when it is not in use.
pub(super) fn identity(number: u32) -> Option<String> {
    read(&directory(number).join("backend"))
}

/// Its present size.
pub(super) fn size_bytes(number: u32) -> Option<u64> {
    read(&directory(number).join("size"))?.parse::<u64>().ok()?.checked_mul(SECTOR_BYTES)
}

/// Where it is.
///
/// # Errors
/// The kernel does not show it.
pub(super) fn node(number: u32) -> io::Result<DeviceNode> {
    let shown = fs::read_to_string(directory(number).join("dev"))?;
    let numbers = shown.trim_end().split_once(':');
    let numbers = numbers.and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let (major, minor) = numbers.ok_or(io::ErrorKind::InvalidData)?;
    Ok(DeviceNode { path: PathBuf::from(format!("/dev/nbd{number}")), major, minor })
}

fn numbers() -> impl Iterator<Item = u32> {
    let names = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    names.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("nbd")?.parse::<u32>().ok())
}

/// The device of an identity.
pub(super) fn find(wanted: &str) -> Option<u32> {
    numbers().find(|number| identity(*number).is_some_and(|found| found == wanted))
}

/// The first device that nobody has connected, other than these.
pub(super) fn unused(passed_over: &[u32]) -> Option<u32> {
    let connected = |number: u32| directory(number).join("pid").exists();
    numbers().filter(|number| !passed_over.contains(number) && !connected(*number)).min()
}

/// Lets the kernel look early after requests of a device that nobody has connected: it has none
/// now, and there must be none (see [`held::LOOK_AFTER_FILE`]).
pub(super) fn look_early(number: u32) {
    let directory = directory(number);
    let file = directory.join(held::LOOK_AFTER_FILE);
    if !held::looks_early(&file) && held::write_look_after(&file).is_err() {
        held::warn_of_late_looks(&directory);
    }
}

/// How long it is until the kernel has looked after every request that it has sent.
pub(super) fn look_after(number: u32) -> Option<Duration> {
    let milliseconds = read(&directory(number).join(held::LOOK_AFTER_FILE))?.parse().ok()?;
    Some(Duration::from_millis(milliseconds))
}
