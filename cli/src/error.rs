//! A failure as it is told to the person at the terminal: what went wrong, and what to do next.

use std::fmt;
use std::io;

use pando_engine::error::ErrorKind;
use pando_proto::{ERRNO_KEY, ERROR_KIND_KEY};
use serde::Serialize;
use tonic::Status;

/// Result of a command.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// What went wrong, what to do next, and for programs the engine's kind of error and errno.
#[derive(Debug, Serialize)]
pub(crate) struct Error {
    #[serde(rename = "error")]
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    errno: Option<i32>,
}

impl Error {
    /// A failure without a hint.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, kind: None, errno: None }
    }

    /// A failed system call on `object`.
    pub(crate) fn io(object: impl fmt::Display, source: &io::Error) -> Self {
        Self { errno: source.raw_os_error(), ..Self::new(format!("{object}: {source}")) }
    }

    /// The same failure with advice.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\nhint: {hint}"),
            None => Ok(()),
        }
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let trailer = |key| status.metadata().get(key).and_then(|value| value.to_str().ok());
        let kind = trailer(ERROR_KIND_KEY).map(str::to_owned);
        let errno = trailer(ERRNO_KEY).and_then(|value| value.parse().ok());
        let Some(kind) = kind else {
            // Not the call failed but the connection.
            return Self::new(format!("the connection to pandod is lost: {}", status.message()))
                .hint("is pandod still running? its log says why it ended");
        };
        let hint = hint_for(&kind).map(str::to_owned);
        Self { message: status.message().to_owned(), hint, kind: Some(kind), errno }
    }
}

impl From<pando_engine::error::Error> for Error {
    fn from(error: pando_engine::error::Error) -> Self {
        let hint = match error.kind() {
            ErrorKind::NotAPool => Some("make it one with `pando pool create`"),
            ErrorKind::Busy => Some("is pandod running on it? leave out --offline, or stop pandod"),
            _ => None,
        };
        Self {
            errno: Some(error.errno()),
            hint: hint.map(str::to_owned),
            ..Self::new(error.to_string())
        }
    }
}

/// What to do about a failure of this kind that the daemon reported.
fn hint_for(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "not_found" => {
            "`pando volume list` shows what there is, `pando volume serve` what is exported"
        }
        "exists" => "choose another name, or delete the old one with `pando volume delete`",
        "no_space" => {
            "delete volumes or snapshots, raise the growth limit with `pando volume set`, \
             or enlarge the pool with `pando pool grow`"
        }
        "busy" => {
            "`pando volume serve --stop NAME` ends an export, `pando volume detach NAME` a device"
        }
        "read_only" => {
            "`pando volume set NAME --read-only false` allows writes; a snapshot can only be cloned"
        }
        "corrupt" | "checksum" => {
            "`pando pool check` and `pando pool scrub` tell how far the damage goes"
        }
        "poisoned" => {
            "look for a failing device in the kernel log, then restart pandod: it recovers the pool"
        }
        "shutdown" => "try again when pandod is back",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use tonic::metadata::MetadataMap;

    use super::*;

    #[test]
    fn says_what_to_do_next() {
        let mut trailers = MetadataMap::new();
        trailers.insert(ERROR_KIND_KEY, "not_found".parse().unwrap());
        trailers.insert(ERRNO_KEY, "2".parse().unwrap());
        let status =
            Status::with_metadata(tonic::Code::NotFound, "volume db does not exist", trailers);
        let error = Error::from(status);
        assert_eq!(
            error.to_string(),
            "error: volume db does not exist\nhint: `pando volume list` shows what there is, \
             `pando volume serve` what is exported"
        );
        assert_eq!(
            serde_json::to_value(&error).unwrap(),
            serde_json::json!({
                "error": "volume db does not exist", "kind": "not_found", "errno": 2,
                "hint": "`pando volume list` shows what there is, `pando volume serve` what is exported",
            })
        );
    }

    #[test]
    fn a_lost_connection_is_not_a_failed_call() {
        let error = Error::from(Status::unknown("transport error"));
        assert!(error.to_string().starts_with("error: the connection to pandod is lost: "));
    }

    #[test]
    fn offline_errors_have_hints_too() {
        let busy = pando_engine::error::Error::new(ErrorKind::Busy, "pool /p: in use");
        let text = Error::from(busy).to_string();
        assert!(text.starts_with("error: pool /p: in use\nhint: is pandod running"), "{text}");
    }
}
