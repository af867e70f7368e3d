//! The mounts of the namespace of this process, from `/proc/self/mountinfo`
//! (proc_pid_mountinfo(5)). A line of it:
//!
//! ```text
//! 36 35 98:0 /mnt1 /mnt2 rw,noatime shared:1 master:2 - ext3 /dev/root rw,errors=continue
//! id  |  dev  root point options     optional fields  |  fs  source    options of the superblock
//!   parent                                        separator
//! ```
//!
//! Spaces and backslashes in names are octal escapes. Names come from any process that mounts, so
//! no line is trusted: lines that are not understood are skipped, and the length of the text is
//! limited.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Dev, Mode, OFlags, makedev, open, stat};
use tonic::Status;

/// Maximum length of mountinfo: some 400,000 mounts, four times the limit of the kernel.
const BYTES_MAX: u64 = 64 << 20;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Identity of the mount, unique while it exists.
    pub(crate) id: u64,
    /// Device of the superblock; that of a btrfs has no device node.
    pub(crate) dev: Dev,
    /// The directory of the file system that is mounted.
    pub(crate) root: Vec<u8>,
    /// The mount point.
    pub(crate) point: Vec<u8>,
    /// The mount or its file system is read-only.
    pub(crate) read_only: bool,
    /// SELinux label that was set for the whole mount.
    pub(crate) context: Option<String>,
    /// Type of the file system.
    pub(crate) fs: String,
    /// The source that was given to mount; the device, for a disk.
    pub(crate) source: Vec<u8>,
}

impl Mount {
    /// Whether this is the file system on the block device `device` with number `number`. The
    /// number alone is not enough, because a btrfs has a number of its own. The source alone is not
    /// enough either, because the node may be of another device by now.
    pub(crate) fn is_of(&self, device: &Path, number: Dev) -> bool {
        self.dev == number || (self.fs == "btrfs" && self.source == path_bytes(device))
    }

    /// Whether this is the device node `device` itself, bound onto a file.
    pub(crate) fn is_node(&self, device: &Path) -> bool {
        let name = device.file_name().map(std::ffi::OsStr::as_encoded_bytes);
        let bound = self.root.strip_prefix(b"/").is_some_and(|root| Some(root) == name);
        bound && stat(device).is_ok_and(|node| node.st_dev == self.dev)
    }
}

impl Mount {
    /// Opens the root of the mount.
    ///
    /// # Errors
    /// It cannot be opened, or another mount covers it.
    pub(crate) fn open_root(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = open(self.point.as_slice(), flags, Mode::empty())?;
        if mount_id(opened.as_fd())? == self.id {
            return Ok(opened);
        }
        Err(io::Error::other("another mount covers it"))
    }
}

fn path_bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_encoded_bytes()
}

/// All mounts. A mount comes after those that it covers.
///
/// # Errors
/// `INTERNAL`: `/proc` cannot be read, or the text is too long.
pub(crate) fn mounts() -> Result<Vec<Mount>, Status> {
    let text = read_all();
    let text = text.map_err(|error| Status::internal(format!("/proc/self/mountinfo: {error}")))?;
    Ok(parse(&text))
}

fn read_all() -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open("/proc/self/mountinfo")?.take(BYTES_MAX).read_to_end(&mut text)?;
    if text.len() as u64 == BYTES_MAX {
        return Err(io::Error::other(format!("longer than {BYTES_MAX} bytes")));
    }
    Ok(text)
}

/// Identity of the mount that a descriptor is on. It is read from `/proc` and not from the file,
/// whose file system may be dead.
///
/// # Errors
/// `/proc` cannot be read.
pub(crate) fn mount_id(opened: BorrowedFd<'_>) -> io::Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", opened.as_raw_fd());
    let text = std::fs::read_to_string(&path)?;
    let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    let id = id.and_then(|id| id.trim().parse().ok());
    id.ok_or_else(|| io::Error::other(format!("{path}: no mnt_id")))
}

/// Parses the lines of mountinfo.
fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n').filter_map(line).collect()
}

fn line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = number(fields.next()?)?;
    let _parent = number(fields.next()?)?;
    let dev = device(fields.next()?)?;
    let root = unescaped(fields.next()?);
    let point = unescaped(fields.next()?);
    let options = fields.next()?;
    fields.find(|field| *field == b"-")?;
    let fs = String::from_utf8_lossy(&unescaped(fields.next()?)).into_owned();
    let source = unescaped(fields.next()?);
    let of_superblock = fields.next()?;
    let read_only = has(options, b"ro") || has(of_superblock, b"ro");
    Some(Mount { id, dev, root, point, read_only, context: context(of_superblock), fs, source })
}

/// The value of the option `context`, which is quoted if it contains a comma.
fn context(options: &[u8]) -> Option<String> {
    let options = String::from_utf8(unescaped(options)).ok()?;
    let options = format!(",{options}");
    let (_, value) = options.split_once(",context=")?;
    let value = match value.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next(),
        None => value.split(',').next(),
    };
    value.filter(|value| !value.is_empty()).map(str::to_owned)
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn device(field: &[u8]) -> Option<Dev> {
    let (major, minor) = std::str::from_utf8(field).ok()?.split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

fn has(options: &[u8], option: &[u8]) -> bool {
    options.split(|byte| *byte == b',').any(|one| one == option)
}

/// Replaces `\ooo` by the byte; everything else is unchanged.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        match escape(rest) {
            Some(byte) => {
                bytes.push(byte);
                rest = &rest[4..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

fn escape(text: &[u8]) -> Option<u8> {
    let digits = text.get(..4)?.strip_prefix(b"\\")?;
    // `from_str_radix` would accept a sign.
    digits.iter().all(u8::is_ascii_digit).then_some(())?;
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_parsed() {
        let text = b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime shared:1 master:2 - ext3 /dev/r rw\n\
            29 1 0:26 / /sys ro,nosuid - sysfs none rw\n\
            40 1 7:3 / /v rw - xfs /dev/loop3 ro,nouuid\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 3);
        assert_eq!((mounts[0].id, mounts[0].dev), (36, makedev(98, 0)));
        assert_eq!((&*mounts[0].root, &*mounts[0].point), (&b"/mnt1"[..], &b"/mnt 2"[..]));
        assert_eq!((&*mounts[0].fs, &*mounts[0].source), ("ext3", &b"/dev/r"[..]));
        assert_eq!(mounts.iter().map(|m| m.read_only).collect::<Vec<_>>(), [false, true, true]);
    }

    #[test]
    fn selinux_labels_are_parsed() {
        let of = |options: &[u8]| context(options);
        let label = "system_u:object_r:container_file_t:s0:c1,c2";
        assert_eq!(of(format!("rw,context=\"{label}\",nouuid").as_bytes()).as_deref(), Some(label));
        assert_eq!(of(b"context=a:b:c:s0,rw").as_deref(), Some("a:b:c:s0"));
        for none in [&b"rw,seclabel"[..], b"rw,fscontext=a", b"context=", b""] {
            assert_eq!(of(none), None);
        }
    }

    #[test]
    fn invalid_lines_are_skipped() {
        let texts: [&[u8]; 8] = [
            b"",
            b"\n\n",
            b"x 35 98:0 / / rw - a b c",
            b"36 35 98 / / rw - a b c",
            b"36 35 98:99999999999 / / rw - a b c",
            b"36 35 98:0 / / rw shared:1",
            b"36 35 98:0 / / rw - a",
            b"18446744073709551616 35 98:0 / / rw - a b c",
        ];
        for text in texts {
            assert_eq!(parse(text), [], "{}", String::from_utf8_lossy(text));
        }
        let cut = b"36 35 98:0 /mnt1 /mnt\\0402 rw shared:1 - ext3 /dev/r rw";
        for end in 0..cut.len() {
            assert!(parse(&cut[..end]).len() <= 1, "a text that ends anywhere");
        }
    }

    #[test]
    fn invalid_escapes_are_unchanged() {
        for (field, bytes) in [
            (&b"a\\134b"[..], &b"a\\b"[..]),
            (b"\\", b"\\"),
            (b"\\04", b"\\04"),
            (b"\\999", b"\\999"),
            (b"\\777", b"\\777"),
            (b"\\+40", b"\\+40"),
        ] {
            assert_eq!(unescaped(field), bytes);
        }
    }

    #[test]
    fn the_mounts_of_this_machine_are_found() {
        let mounts = mounts().unwrap();
        assert!(mounts.iter().any(|mount| mount.point == b"/proc" && mount.fs == "proc"));
    }
}
