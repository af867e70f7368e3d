//! A failure as it is told to the person at the terminal: what went wrong, and what to do next.
//! The hint comes from where the failure was met: its kind alone is not enough to advise.

use std::fmt;
use std::io;

use pando_proto::{ERRNO_KEY, ERROR_KIND_KEY, HINT_KEY};
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
    /// Failures of a command on several objects, behind the first.
    #[serde(skip)]
    more: Vec<Self>,
}

impl Error {
    /// A failure without a hint.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, kind: None, errno: None, more: Vec::new() }
    }

    /// A failed system call on `object`.
    pub(crate) fn io(object: impl fmt::Display, source: &io::Error) -> Self {
        Self { errno: source.raw_os_error(), ..Self::new(format!("{object}: {source}")) }
    }

    /// Something that does not exist, with the kind and errno of the daemon's errors.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        let (kind, errno) = (Some("not_found".to_owned()), Some(2));
        Self { kind, errno, ..Self::new(message) }
    }

    /// The failures of a command on several objects as one, if there are any.
    pub(crate) fn all(failures: Vec<Self>) -> Result<()> {
        let mut failures = failures.into_iter();
        match failures.next() {
            None => Ok(()),
            Some(first) => Err(Self { more: failures.collect(), ..first }),
        }
    }

    /// Each of its failures.
    pub(crate) fn each(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(&self.more)
    }

    /// Whether the connection failed, and not the call: another call would fail, too.
    pub(crate) const fn is_lost_connection(&self) -> bool {
        self.kind.is_none()
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
        let hint = trailer(HINT_KEY).map(str::to_owned);
        Self { hint, kind: Some(kind), errno, ..Self::new(status.message()) }
    }
}

impl From<pando_engine::error::Error> for Error {
    fn from(error: pando_engine::error::Error) -> Self {
        Self {
            errno: Some(error.errno()),
            hint: error.hint_text().map(str::to_owned),
            ..Self::new(error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::metadata::MetadataMap;

    use super::*;

    #[test]
    fn hints_belong_to_their_messages() {
        let mut trailers = MetadataMap::new();
        trailers.insert(ERROR_KIND_KEY, "busy".parse().unwrap());
        trailers.insert(ERRNO_KEY, "16".parse().unwrap());
        let status =
            |trailers| Status::with_metadata(tonic::Code::Internal, "it is used", trailers);
        let error = Error::from(status(trailers.clone()));
        assert_eq!(error.to_string(), "error: it is used", "nobody has given a hint");
        trailers.insert(HINT_KEY, "`pando volume detach db`".parse().unwrap());
        let error = Error::from(status(trailers));
        assert_eq!(error.to_string(), "error: it is used\nhint: `pando volume detach db`");
        assert_eq!(
            serde_json::to_value(&error).unwrap(),
            serde_json::json!({
                "error": "it is used", "kind": "busy", "errno": 16,
                "hint": "`pando volume detach db`",
            })
        );
    }

    #[test]
    fn several_failures_are_one() {
        Error::all(Vec::new()).unwrap();
        let all = Error::all(vec![Error::new("a"), Error::new("b"), Error::new("c")]).unwrap_err();
        let told: Vec<String> = all.each().map(ToString::to_string).collect();
        assert_eq!(told, ["error: a", "error: b", "error: c"]);
    }

    #[test]
    fn a_lost_connection_is_not_a_failed_call() {
        let error = Error::from(Status::unknown("transport error"));
        assert!(error.to_string().starts_with("error: the connection to pandod is lost: "));
    }

    #[test]
    fn errors_of_the_engine_bring_their_hints() {
        let busy = pando_engine::error::Error::invalid("pool /p: in use").hint("stop it");
        assert_eq!(Error::from(busy).to_string(), "error: pool /p: in use\nhint: stop it");
    }
}
