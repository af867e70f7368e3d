//! The one error of the engine: a small kind to match on, what it happened to, and its cause.
//!
//! ```text
//! Error = kind (stable, matchable, gives an errno)
//!       + what  ("volume db: size 1000 is not a multiple of 512")
//!       + source (the io::Error below it, if any)
//!       + hint (a command that helps, for the person at the terminal alone)
//! ```

use std::fmt;
use std::io;

/// Result of the engine's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// What sort of failure it was. Stable: programs match on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A volume, snapshot or export that does not exist.
    NotFound,
    /// A name that is taken by something else.
    Exists,
    /// A request that can never succeed: misaligned, out of range, malformed.
    Invalid,
    /// The pool, or the limit of one volume, has no room for growth.
    NoSpace,
    /// A documented limit of the engine is reached.
    Limit,
    /// A write to something read-only.
    ReadOnly,
    /// In use: by another process, or by an operation under way.
    Busy,
    /// What is on the disk is not a pool.
    NotAPool,
    /// A pool of a version or with a feature that this program does not know.
    Unsupported,
    /// A structure on the disk is damaged.
    Corrupt,
    /// A data block does not match its checksum.
    Checksum,
    /// The device or file below returned an error.
    Io,
    /// An earlier write or flush failed; the pool takes no change until it is opened again.
    Poisoned,
    /// The operation was given up because the daemon is stopping.
    Shutdown,
}

/// A failure: kind, object and cause.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    what: String,
    hint: Option<String>,
    source: Option<io::Error>,
}

impl Error {
    /// An error of `kind`; `what` names the object and says what to do, in lower case, no full stop.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), hint: None, source: None }
    }

    /// The device or file below failed with `source` while doing `what`.
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self { kind: ErrorKind::Io, what: what.into(), hint: None, source: Some(source) }
    }

    /// Shorthand for [`ErrorKind::Invalid`].
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, what)
    }

    /// Shorthand for [`ErrorKind::Corrupt`]; `what` names the structure and its place.
    pub fn corrupt(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, what)
    }

    /// The stable kind.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same error with the object it happened to put in front.
    #[must_use]
    pub fn context(mut self, object: impl fmt::Display) -> Self {
        self.what = format!("{object}: {}", self.what);
        self
    }

    /// The same error with advice for the command line. It is no part of the message, which other
    /// programs show, too.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The advice.
    #[must_use]
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The errno that a block device would answer with.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self.kind {
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::Exists => libc::EEXIST,
            ErrorKind::Invalid | ErrorKind::NotAPool => libc::EINVAL,
            ErrorKind::NoSpace | ErrorKind::Limit => libc::ENOSPC,
            ErrorKind::ReadOnly => libc::EPERM,
            ErrorKind::Busy => libc::EBUSY,
            ErrorKind::Unsupported => libc::EOPNOTSUPP,
            ErrorKind::Corrupt | ErrorKind::Checksum | ErrorKind::Poisoned => libc::EIO,
            ErrorKind::Io => {
                self.source.as_ref().and_then(io::Error::raw_os_error).unwrap_or(libc::EIO)
            }
            ErrorKind::Shutdown => libc::ESHUTDOWN,
        }
    }

    /// A copy for each of several waiters; the cause is kept as its errno.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        let source = self.source.as_ref().map(|e| match e.raw_os_error() {
            Some(errno) => io::Error::from_raw_os_error(errno),
            None => io::Error::new(e.kind(), e.to_string()),
        });
        Self { kind: self.kind, what: self.what.clone(), hint: self.hint.clone(), source }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "{}: {source}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|e| e as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_errno_and_object() {
        let error = Error::io("write of block 7", io::Error::from_raw_os_error(libc::ENOSPC));
        let error = error.context("pool /p");
        assert_eq!(error.errno(), libc::ENOSPC);
        assert!(error.to_string().starts_with("pool /p: write of block 7: "));
        assert_eq!(error.duplicate().errno(), libc::ENOSPC);
        let advised = error.hint("`df` shows it");
        assert!(!advised.to_string().contains("df"), "{advised}");
        assert_eq!(advised.duplicate().hint_text(), Some("`df` shows it"));
    }
}
