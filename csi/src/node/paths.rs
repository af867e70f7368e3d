//! Paths in requests, at which volumes are mounted. The parent directory is opened once, without
//! following symbolic links. From then on a place is the descriptor of that directory and a name in
//! it, so directories that are renamed or replaced meanwhile have no effect. An id never becomes
//! part of a path.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat2, unlinkat,
};
use rustix::io::Errno;
use tonic::Status;

use crate::validate;

use super::mountinfo::{self, Mount};

/// Maximum length of a path in bytes: the kernel's PATH_MAX without the terminating zero.
const PATH_BYTES_MAX: usize = 4095;

/// A name in an open directory.
#[derive(Debug)]
pub(crate) struct Place {
    parent: OwnedFd,
    name: OsString,
    shown: String,
}

impl Place {
    /// The place that `path` names; `None` if its parent directory does not exist. `field` is the
    /// name of the field, for messages.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`: relative, or with `..`, control characters or no last component;
    /// `FAILED_PRECONDITION`: a component is a symbolic link or not a directory.
    pub(crate) fn find(field: &str, path: &str) -> Result<Option<Self>, Status> {
        let refused = |why: &str| Status::invalid_argument(format!("{field} {path:?}: {why}"));
        validate::length(field, path.len(), PATH_BYTES_MAX)?;
        if path.bytes().any(|byte| byte.is_ascii_control()) {
            return Err(refused("contains control characters"));
        }
        let parsed = Path::new(path);
        if !parsed.is_absolute() {
            return Err(refused("not an absolute path"));
        }
        if parsed.components().any(|part| part == Component::ParentDir) {
            return Err(refused("contains '..'"));
        }
        let (Some(parent), Some(name)) = (parsed.parent(), parsed.file_name()) else {
            return Err(refused("must name a file below /"));
        };
        match open(CWD, parent.as_os_str(), OFlags::DIRECTORY) {
            Ok(parent) => Ok(Some(Self { parent, name: name.to_owned(), shown: path.to_owned() })),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(unusable(field, path, errno)),
        }
    }

    /// As [`Self::find`], but the parent directory must exist.
    ///
    /// # Errors
    /// As [`Self::find`]; `FAILED_PRECONDITION`: the parent directory does not exist.
    pub(crate) fn existing_parent(field: &str, path: &str) -> Result<Self, Status> {
        let missing = || {
            Status::failed_precondition(format!(
                "{field} {path:?}: its parent directory does not exist"
            ))
        };
        Self::find(field, path)?.ok_or_else(missing)
    }

    /// Opens the file or directory, or the root of a mount that covers it; `None` if it does not
    /// exist. The descriptor is `O_PATH`: no file system is accessed, so this works for a dead one.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION`: it is a symbolic link.
    pub(crate) fn open(&self) -> Result<Option<OwnedFd>, Status> {
        match open(&self.parent, &self.name, OFlags::empty()) {
            Ok(opened) => Ok(Some(opened)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(unusable("path", &self.shown, errno)),
        }
    }

    /// The topmost mount at the place; `None` if nothing is mounted there.
    ///
    /// # Errors
    /// As [`Self::open`]; `INTERNAL` if `/proc` cannot be read.
    pub(crate) fn mount(&self) -> Result<Option<Mount>, Status> {
        match self.open()? {
            Some(opened) => self.mount_of(&opened),
            None => Ok(None),
        }
    }

    /// The mount of a descriptor that was opened here; `None` if it is on the mount of the parent
    /// directory.
    ///
    /// # Errors
    /// `ABORTED`: it was unmounted meanwhile; `INTERNAL`: `/proc` cannot be read.
    pub(crate) fn mount_of(&self, opened: &OwnedFd) -> Result<Option<Mount>, Status> {
        let (own, parent) = (self.mount_id(opened)?, self.mount_id(&self.parent)?);
        if own == parent {
            return Ok(None);
        }
        let found = mountinfo::mounts()?.into_iter().find(|mount| mount.id == own);
        // Otherwise it was unmounted since it was opened; the caller retries with the new state.
        found.map(Some).ok_or_else(|| {
            Status::aborted(format!("{} was unmounted meanwhile, try again", self.shown))
        })
    }

    fn mount_id(&self, opened: &OwnedFd) -> Result<u64, Status> {
        mountinfo::mount_id(opened.as_fd())
            .map_err(|error| self.failed("cannot find its mount", &error))
    }

    /// Creates an empty directory, unless there is a directory.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION`: it is not a directory; `INTERNAL`: it cannot be created.
    pub(crate) fn create_directory(&self) -> Result<OwnedFd, Status> {
        let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP;
        match mkdirat(&self.parent, &self.name, mode) {
            Ok(()) | Err(Errno::EXIST) => self.expect(FileType::Directory),
            Err(errno) => Err(self.failed("cannot create the directory", &errno)),
        }
    }

    /// Creates an empty file, unless there is a file. A device node is bind mounted onto it.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION`: it is not a regular file; `INTERNAL`: it cannot be created.
    pub(crate) fn create_file(&self) -> Result<OwnedFd, Status> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        match rustix::fs::openat(&self.parent, &self.name, flags, mode) {
            Ok(_) | Err(Errno::EXIST) => self.expect(FileType::RegularFile),
            Err(errno) => Err(self.failed("cannot create the file", &errno)),
        }
    }

    fn expect(&self, expected: FileType) -> Result<OwnedFd, Status> {
        let opened = self.open()?.ok_or_else(|| self.failed("cannot open it", &Errno::NOENT))?;
        let found = fstat(&opened).map_err(|errno| self.failed("stat", &errno))?;
        if FileType::from_raw_mode(found.st_mode) == expected {
            return Ok(opened);
        }
        let wanted = if expected == FileType::Directory { "a directory" } else { "a file" };
        Err(Status::failed_precondition(format!("{} is not {wanted}", self.shown)))
    }

    /// Removes an empty directory or a file, as publishing creates them; succeeds if it does not exist.
    /// Never removes a tree.
    ///
    /// # Errors
    /// `INTERNAL`: it is not empty, or cannot be removed.
    pub(crate) fn remove(&self) -> Result<(), Status> {
        match unlinkat(&self.parent, &self.name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::NOTDIR) => {}
            Err(errno) => return Err(self.failed("cannot remove the directory", &errno)),
        }
        match unlinkat(&self.parent, &self.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(self.failed("cannot remove the file", &errno)),
        }
    }

    /// The path in the request.
    pub(crate) fn shown(&self) -> &str {
        &self.shown
    }

    /// A path to the place through the descriptor of the parent directory.
    pub(crate) fn through_parent(&self) -> OsString {
        let mut path = OsString::from(format!("/proc/self/fd/{}/", self.parent.as_raw_fd()));
        path.push(&self.name);
        path
    }

    /// The error of an operation on the place.
    pub(crate) fn failed(&self, what: &str, error: &dyn std::fmt::Display) -> Status {
        Status::internal(format!("{}: {what}: {error}", self.shown))
    }
}

fn open(at: impl AsFd, path: &OsStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    // Without O_NOFOLLOW a link is refused; with O_PATH and O_NOFOLLOW it would be opened itself.
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    openat2(at, path.as_bytes(), flags, Mode::empty(), resolve)
}

fn unusable(field: &str, path: &str, errno: Errno) -> Status {
    let why = match errno {
        Errno::LOOP => {
            "contains a symbolic link, which is not followed; use the real path".to_owned()
        }
        Errno::NOTDIR => "a component is not a directory".to_owned(),
        errno => errno.to_string(),
    };
    Status::failed_precondition(format!("{field} {path:?}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tonic::Code;

    fn code(path: &str) -> Code {
        Place::existing_parent("target_path", path).unwrap_err().code()
    }

    #[test]
    fn hostile_paths_are_refused() {
        let long = format!("/{}", "a".repeat(PATH_BYTES_MAX));
        for path in ["", "some/path", "../etc", "/a/../etc", "/a/..", "/", "/a\nb", "/a\0b", &long]
        {
            assert_eq!(code(path), Code::InvalidArgument, "{path:?}");
        }
        let none = Place::find("target_path", "/nonexistent/directory/target").unwrap();
        assert!(none.is_none());
    }

    #[test]
    fn symbolic_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::create_dir(path("real")).unwrap();
        symlink("real", path("link")).unwrap();
        assert_eq!(code(&path("link/target")), Code::FailedPrecondition);
        let place = Place::existing_parent("target_path", &path("link")).unwrap();
        for refused in
            [place.open().err(), place.create_directory().err(), place.create_file().err()]
        {
            assert_eq!(refused.unwrap().code(), Code::FailedPrecondition);
        }
        // The parent directory is open: replacing it by a link has no effect.
        let place = Place::existing_parent("target_path", &path("real/target")).unwrap();
        std::fs::rename(path("real"), path("moved")).unwrap();
        symlink("/", path("real")).unwrap();
        place.create_directory().unwrap();
        assert!(Path::new(&path("moved/target")).is_dir());
    }

    #[test]
    fn targets_are_created_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("target");
        let place = Place::existing_parent("target_path", path.to_str().unwrap()).unwrap();
        assert!(place.open().unwrap().is_none());
        for _ in 0..2 {
            place.create_directory().unwrap();
        }
        assert!(place.mount().unwrap().is_none(), "a directory is not a mount");
        assert_eq!(place.create_file().unwrap_err().code(), Code::FailedPrecondition);
        std::fs::write(path.join("file"), "data").unwrap();
        assert_eq!(place.remove().unwrap_err().code(), Code::Internal);
        std::fs::remove_file(path.join("file")).unwrap();
        for _ in 0..2 {
            place.remove().unwrap();
        }
        for _ in 0..2 {
            place.create_file().unwrap();
        }
        assert_eq!(place.create_directory().unwrap_err().code(), Code::FailedPrecondition);
        place.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn the_mount_at_a_place_is_found() {
        let place = Place::existing_parent("path", "/proc").unwrap();
        assert_eq!(place.mount().unwrap().unwrap().fs, "proc");
    }
}
