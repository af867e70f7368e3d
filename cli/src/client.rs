//! The connection to the daemon.

use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};

use pando_proto::v1::VolumeRef;
use pando_proto::v1::pando_client::PandoClient;
use pando_proto::v1::volume_ref::By;
use tonic::transport::{Channel, Endpoint};

use crate::error::{Error, Result};

/// The generated client over a unix socket.
pub(crate) type Client = PandoClient<Channel>;

/// Where the daemon of the system listens.
const SYSTEM_SOCKET: &str = "/run/pando/pando.sock";

/// The socket to use when none was named: the user's own daemon if there is one, else the system's.
pub(crate) fn default_socket() -> PathBuf {
    std::env::var_os("XDG_RUNTIME_DIR")
        .map(|dir| PathBuf::from(dir).join("pando/pando.sock"))
        .filter(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from(SYSTEM_SOCKET))
}

/// Connects to the daemon that listens on `socket`.
pub(crate) async fn connect(socket: &Path) -> Result<Client> {
    let absolute =
        std::path::absolute(socket).map_err(|error| Error::io(socket.display(), &error))?;
    let endpoint = Endpoint::from_shared(format!("unix:{}", absolute.display()))
        .map_err(|error| Error::new(format!("socket {}: {error}", socket.display())))?;
    match endpoint.connect().await {
        Ok(channel) => Ok(Client::new(channel)),
        Err(error) => Err(explain(socket, &error)),
    }
}

/// Says why there is no connection: the transport's own words hide the cause in its sources.
fn explain(socket: &Path, error: &tonic::transport::Error) -> Error {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return explain_io(socket, error);
        }
        cause = error.source();
    }
    Error::new(format!("cannot talk to pandod on {}: {error}", socket.display()))
}

fn explain_io(socket: &Path, error: &io::Error) -> Error {
    let shown = socket.display();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            Error::new(format!("pandod is not running on {shown}")).hint(format!(
                "start it with `systemctl start pandod`, or `pandod --pool POOL --socket {shown}`; \
                 another socket is named with --socket or PANDO_SOCKET"
            ))
        }
        io::ErrorKind::PermissionDenied => Error::new(format!("no permission to use {shown}"))
            .hint("run this as root or as the user that runs pandod"),
        _ => Error::io(format!("cannot connect to {shown}"), error),
    }
}

/// A reference to a volume by its name.
#[expect(clippy::unnecessary_wraps, reason = "fields of messages are optional on the wire")]
pub(crate) fn by_name(name: impl Into<String>) -> Option<VolumeRef> {
    Some(VolumeRef { by: Some(By::Name(name.into())) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect_error(socket: &Path) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(connect(socket)).unwrap_err().to_string()
    }

    #[test]
    fn no_daemon_says_how_to_start_it() {
        let dir = tempfile::tempdir().unwrap();
        let text = connect_error(&dir.path().join("none.sock"));
        assert!(text.starts_with("error: pandod is not running on "), "{text}");
        assert!(text.contains("\nhint: start it with "), "{text}");
        // A socket that is left over from a daemon that was killed.
        let stale = dir.path().join("stale.sock");
        drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
        let text = connect_error(&stale);
        assert!(text.starts_with("error: pandod is not running on "), "{text}");
    }
}
