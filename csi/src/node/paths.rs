//! Paths that the caller names: where something is to be mounted. Each directory on the way is
//! opened without following symbolic links, once; from then on the place is a descriptor of the
//! parent directory and a name in it, and whoever renames or replaces directories meanwhile
//! changes nothing. An id never becomes part of a path.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat2, unlinkat,
};
use rustix::io::Errno;
use tonic::Status;

use super::mountinfo::{self, Mount};

/// Bytes in a path: the kernel's PATH_MAX, with its end.
const PATH_BYTES_MAX: usize = 4095;

/// A name in an open directory.
#[derive(Debug)]
pub(crate) struct Place {
    parent: OwnedFd,
    name: OsString,
    shown: String,
}

impl Place {
    /// The place that `path` names; `None` if its parent directory does not exist. `what` names
    /// the field for messages.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`: relative, or with `..`, control characters or no last component;
    /// `FAILED_PRECONDITION`: there is a symbolic link on the way, or no directory.
    pub(crate) fn find(what: &str, path: &str) -> Result<Option<Self>, Status> {
        let refused = |why: &str| Status::invalid_argument(format!("{what} {path:?}: {why}"));
        if path.len() > PATH_BYTES_MAX {
            return Err(Status::invalid_argument(format!("{what}: longer than {PATH_BYTES_MAX}")));
        }
        if path.bytes().any(|byte| byte.is_ascii_control()) {
            return Err(refused("control characters in a path"));
        }
        let parsed = Path::new(path);
        if !parsed.is_absolute() {
            return Err(refused("not an absolute path"));
        }
        if parsed.components().any(|part| part == Component::ParentDir) {
            return Err(refused("'..' in a path"));
        }
        let (Some(parent), Some(name)) = (parsed.parent(), parsed.file_name()) else {
            return Err(refused("a path below / is needed"));
        };
        match open(CWD, parent.as_os_str(), OFlags::DIRECTORY) {
            Ok(parent) => Ok(Some(Self { parent, name: name.to_owned(), shown: path.to_owned() })),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(unusable(what, path, errno)),
        }
    }

    /// The same; the parent must be there.
    ///
    /// # Errors
    /// As [`Self::find`], and `FAILED_PRECONDITION` if there is no parent directory.
    pub(crate) fn of(what: &str, path: &str) -> Result<Self, Status> {
        let missing =
            || Status::failed_precondition(format!("{what} {path:?}: its parent does not exist"));
        Self::find(what, path)?.ok_or_else(missing)
    }

    /// What is there, what is mounted there included; `None` if nothing is. The descriptor is
    /// good for naming (`O_PATH`): no file system is asked, so a dead one does not matter.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION`: a symbolic link is there.
    pub(crate) fn open(&self) -> Result<Option<OwnedFd>, Status> {
        match open(&self.parent, &self.name, OFlags::empty()) {
            Ok(opened) => Ok(Some(opened)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(unusable("path", &self.shown, errno)),
        }
    }

    /// What is mounted there, the topmost of several; `None` if nothing is.
    ///
    /// # Errors
    /// As [`Self::open`]; `INTERNAL` if `/proc` cannot be read.
    pub(crate) fn mount(&self) -> Result<Option<Mount>, Status> {
        match self.open()? {
            Some(opened) => self.mount_of(&opened),
            None => Ok(None),
        }
    }

    /// The same of what was opened here: `None` if nothing was mounted on it.
    ///
    /// # Errors
    /// `ABORTED`: it was unmounted meanwhile; `INTERNAL` if `/proc` cannot be read.
    pub(crate) fn mount_of(&self, opened: &OwnedFd) -> Result<Option<Mount>, Status> {
        let (here, around) = (self.mount_id(opened)?, self.mount_id(&self.parent)?);
        if here == around {
            return Ok(None);
        }
        let mounts = mountinfo::mounts().map_err(|error| self.failed("mounts", &error))?;
        let found = mounts.into_iter().find(|mount| mount.id == here);
        // Unmounted since it was opened: what is there now is for the caller's next try.
        found.map(Some).ok_or_else(|| Status::aborted(format!("{}: it is changing", self.shown)))
    }

    fn mount_id(&self, opened: &OwnedFd) -> Result<u64, Status> {
        mountinfo::mount_id(opened.as_fd()).map_err(|error| self.failed("mount", &error))
    }

    /// Makes an empty directory there, unless there is one.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION`: something else is there; `INTERNAL`: it cannot be made.
    pub(crate) fn make_directory(&self) -> Result<OwnedFd, Status> {
        let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP;
        match mkdirat(&self.parent, &self.name, mode) {
            Ok(()) | Err(Errno::EXIST) => self.expect(FileType::Directory),
            Err(errno) => Err(self.failed("cannot make the directory", &errno)),
        }
    }

    /// Makes an empty file there, unless there is one; for a device node to be bound onto it.
    ///
    /// # Errors
    /// As [`Self::make_directory`].
    pub(crate) fn make_file(&self) -> Result<OwnedFd, Status> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        match rustix::fs::openat(&self.parent, &self.name, flags, mode) {
            Ok(_) | Err(Errno::EXIST) => self.expect(FileType::RegularFile),
            Err(errno) => Err(self.failed("cannot make the file", &errno)),
        }
    }

    fn expect(&self, expected: FileType) -> Result<OwnedFd, Status> {
        let opened = self.open()?.ok_or_else(|| self.failed("made", &Errno::NOENT))?;
        let found = fstat(&opened).map_err(|errno| self.failed("stat", &errno))?;
        if FileType::from_raw_mode(found.st_mode) == expected {
            return Ok(opened);
        }
        let wanted = if expected == FileType::Directory { "a directory" } else { "a file" };
        Err(Status::failed_precondition(format!("{}: not {wanted}", self.shown)))
    }

    /// Removes what publishing has made: an empty directory, a file, or nothing. Never a tree.
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

    /// The path as the caller wrote it.
    pub(crate) fn shown(&self) -> &str {
        &self.shown
    }

    /// A path that leads to the place through the open parent directory, and not by names.
    pub(crate) fn through_parent(&self) -> OsString {
        let mut path = OsString::from(format!("/proc/self/fd/{}/", self.parent.as_raw_fd()));
        path.push(&self.name);
        path
    }

    pub(crate) fn failed(&self, what: &str, error: &dyn std::fmt::Display) -> Status {
        Status::internal(format!("{}: {what}: {error}", self.shown))
    }
}

fn open(at: impl AsFd, path: &OsStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    // Not O_NOFOLLOW: with O_PATH that would open a link itself, which is refused so.
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    openat2(at, path.as_bytes(), flags, Mode::empty(), resolve)
}

fn unusable(what: &str, path: &str, errno: Errno) -> Status {
    let why = match errno {
        Errno::LOOP => "a symbolic link on the way is not followed; name the real path".to_owned(),
        Errno::NOTDIR => "a part of it is not a directory".to_owned(),
        errno => errno.to_string(),
    };
    Status::failed_precondition(format!("{what} {path:?}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tonic::Code;

    fn code(path: &str) -> Code {
        Place::of("target_path", path).unwrap_err().code()
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
        let place = Place::of("target_path", &path("link")).unwrap();
        for refused in [place.open().err(), place.make_directory().err(), place.make_file().err()] {
            assert_eq!(refused.unwrap().code(), Code::FailedPrecondition);
        }
        // The parent is open: replacing it by a link does not lead elsewhere.
        let place = Place::of("target_path", &path("real/target")).unwrap();
        std::fs::rename(path("real"), path("moved")).unwrap();
        symlink("/", path("real")).unwrap();
        place.make_directory().unwrap();
        assert!(Path::new(&path("moved/target")).is_dir());
    }

    #[test]
    fn makes_and_removes_what_publishing_needs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("target");
        let place = Place::of("target_path", path.to_str().unwrap()).unwrap();
        assert!(place.open().unwrap().is_none());
        for _ in 0..2 {
            place.make_directory().unwrap();
        }
        assert!(place.mount().unwrap().is_none(), "a directory is no mount");
        assert_eq!(place.make_file().unwrap_err().code(), Code::FailedPrecondition);
        std::fs::write(path.join("file"), "data").unwrap();
        assert_eq!(place.remove().unwrap_err().code(), Code::Internal);
        std::fs::remove_file(path.join("file")).unwrap();
        for _ in 0..2 {
            place.remove().unwrap();
        }
        for _ in 0..2 {
            place.make_file().unwrap();
        }
        assert_eq!(place.make_directory().unwrap_err().code(), Code::FailedPrecondition);
        place.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn knows_what_is_mounted() {
        let place = Place::of("path", "/proc").unwrap();
        assert_eq!(place.mount().unwrap().unwrap().fs, "proc");
    }
}
