//! The mounts of this process's namespace, as the kernel lists them in `/proc/self/mountinfo`
//! (proc_pid_mountinfo(5)). A line of it:
//!
//! ```text
//! 36 35 98:0 /mnt1 /mnt2 rw,noatime shared:1 master:2 - ext3 /dev/root rw,errors=continue
//! id  |  dev  root point options     optional fields  |  fs  source    options of the superblock
//!   parent                                        separator
//! ```
//!
//! Blanks and backslashes in names are octal escapes. Names come from whoever mounts, so nothing
//! in a line is trusted: a line that is not understood is left out, and the text has a bound.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Dev, Mode, OFlags, makedev, open, stat};

/// Bytes of mountinfo that are read: some 400,000 mounts, four times what the kernel allows.
const BYTES_MAX: u64 = 64 << 20;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Identity of the mount, unique while it exists.
    pub(crate) id: u64,
    /// Device of the superblock; btrfs shows one that no device node has.
    pub(crate) dev: Dev,
    /// What of the file system is mounted.
    pub(crate) root: Vec<u8>,
    /// Where.
    pub(crate) point: Vec<u8>,
    /// The mount, or the file system on it, refuses writes.
    pub(crate) read_only: bool,
    /// Label of SELinux that all of it was given when it was mounted.
    pub(crate) context: Option<String>,
    /// Type of the file system.
    pub(crate) fs: String,
    /// What was named when it was mounted; for a disk its device.
    pub(crate) source: Vec<u8>,
}

impl Mount {
    /// Whether this is the file system on the block device `device`, whose number is `number`.
    /// The number alone does not do: btrfs has its own. The source alone does not do either:
    /// the node may by now be another device.
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
    /// Opens the root of what is mounted there.
    ///
    /// # Errors
    /// It cannot be opened, or something else was mounted over it.
    pub(crate) fn open_root(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = open(self.point.as_slice(), flags, Mode::empty())?;
        if mount_id(opened.as_fd())? == self.id {
            return Ok(opened);
        }
        Err(io::Error::other("its mount is covered by another"))
    }
}

fn path_bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_encoded_bytes()
}

/// All mounts, those mounted later after those they cover.
///
/// # Errors
/// `/proc` cannot be read, or is beyond the bound.
pub(crate) fn mounts() -> io::Result<Vec<Mount>> {
    let mut text = Vec::new();
    File::open("/proc/self/mountinfo")?.take(BYTES_MAX).read_to_end(&mut text)?;
    if text.len() as u64 == BYTES_MAX {
        return Err(io::Error::other("/proc/self/mountinfo: more mounts than can be"));
    }
    Ok(parse(&text))
}

/// The mount that a descriptor is on. `/proc` is asked and not the file: its file system may be
/// dead.
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

/// The mounts that a text lists.
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

/// The value of the option `context`, which has quotes around it if there is a comma in it.
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

/// Replaces `\ooo` by the byte; anything else is taken as it is.
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
    // A sign would be taken for part of a number.
    digits.iter().all(u8::is_ascii_digit).then_some(())?;
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
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
    fn reads_labels_of_selinux() {
        let of = |options: &[u8]| context(options);
        let label = "system_u:object_r:container_file_t:s0:c1,c2";
        assert_eq!(of(format!("rw,context=\"{label}\",nouuid").as_bytes()).as_deref(), Some(label));
        assert_eq!(of(b"context=a:b:c:s0,rw").as_deref(), Some("a:b:c:s0"));
        for none in [&b"rw,seclabel"[..], b"rw,fscontext=a", b"context=", b""] {
            assert_eq!(of(none), None);
        }
    }

    #[test]
    fn leaves_out_what_it_does_not_understand() {
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
    fn odd_escapes_are_taken_as_they_are() {
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
    fn sees_the_mounts_of_this_machine() {
        let mounts = mounts().unwrap();
        assert!(mounts.iter().any(|mount| mount.point == b"/proc" && mount.fs == "proc"));
    }
}
