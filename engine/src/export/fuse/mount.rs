//! The FUSE mount itself: its options, and what is left of one whose daemon is dead.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use fuser::{BackgroundSession, Config, InitFlags, KernelConfig, MountOption, Session, SessionACL};
use rustix::mount::{UnmountFlags, unmount};

use super::files::FlatDirectory;
use crate::error::{Error, Result};

/// Bytes of a request: the largest that a loop device makes.
const REQUEST_BYTES: u32 = 1 << 20;
/// Requests that the kernel has under way, of all files together.
pub(super) const REQUESTS_MAX: u16 = 512;
/// Mounts on top of each other that are cleared away.
const LAYERS_MAX: usize = 64;

/// Mounts the files at `directory`, which is made with mode 0700.
///
/// # Errors
/// The kernel's.
pub(super) fn mount(directory: &Path, files: FlatDirectory) -> Result<BackgroundSession> {
    let failed = |error: io::Error| Error::io(format!("FUSE at {}", directory.display()), error);
    clear(directory)?;
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    let mut config = Config::default();
    config.acl = SessionACL::Owner;
    config.mount_options = vec![
        MountOption::FSName("pando".to_owned()),
        MountOption::Subtype("pando".to_owned()),
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
    ];
    Session::new(files, directory, &config).and_then(Session::spawn).map_err(failed)
}

/// What is agreed on with the kernel at the mount.
///
/// # Errors
/// The kernel lacks what a loop device with direct I/O stands on.
pub(super) fn configure(config: &mut KernelConfig) -> io::Result<()> {
    let lacks = |what: &str| io::Error::new(io::ErrorKind::Unsupported, what.to_owned());
    // Without it, direct I/O waits for each request.
    let needed = InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_MAX_PAGES;
    config.add_capabilities(needed).map_err(|_| lacks("FUSE without asynchronous direct I/O"))?;
    config.set_max_write(REQUEST_BYTES).map_err(|_| lacks("FUSE with small writes"))?;
    config.set_max_background(REQUESTS_MAX).map_err(|_| lacks("FUSE with few requests"))?;
    Ok(())
}

/// Takes away every mount at `directory`, also those whose daemon is dead and that answer
/// nothing any more. Files in them that are still open stay usable to who has them.
///
/// # Errors
/// The kernel's.
pub(super) fn clear(directory: &Path) -> Result<()> {
    for _ in 0..LAYERS_MAX {
        if !mounts()?.iter().any(|place| place == directory) {
            break;
        }
        unmount(directory, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).map_err(|error| {
            Error::io(format!("dead mount {}", directory.display()), error.into())
        })?;
    }
    Ok(())
}

/// All mount points of this process' namespace.
fn mounts() -> Result<Vec<PathBuf>> {
    let table = "/proc/self/mountinfo";
    let lines = fs::read(table).map_err(|error| Error::io(table, error))?;
    Ok(lines.split(|byte| *byte == b'\n').filter_map(mount_point).collect())
}

/// The fifth field of a line, in which blanks and backslashes are written in octal.
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    let field = line.split(|byte| *byte == b' ').nth(4)?;
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = (byte == b'\\').then(|| after.get(..3)).flatten().and_then(octal);
        path.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() { &after[3..] } else { after };
    }
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(&path)))
}

fn octal(digits: &[u8]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        let point = |text: &str| mount_point(text.as_bytes());
        let line = r"36 35 98:0 / /run/a\040b\134c rw,noatime - fuse.pando pando rw";
        assert_eq!(point(line), Some(PathBuf::from(r"/run/a b\c")));
        assert_eq!(point(r"1 2 3 / /x\9zz\1 rw"), Some(PathBuf::from(r"/x\9zz\1")));
        assert_eq!(point("1 2 3"), None);
        assert_eq!(point(""), None);
        assert!(mounts().unwrap().contains(&PathBuf::from("/")));
    }
}
