//! The connection to the daemon.

use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};

use pando_proto::socket_in;
use pando_proto::v1::pando_client::PandoClient;
use pando_proto::v1::volume_ref::By;
use pando_proto::v1::{Volume, VolumeRef};
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::{Channel, Endpoint};

use crate::args::Daemon;
use crate::error::{Error, Result};

/// The generated client over a unix socket.
pub(crate) type Client = PandoClient<Channel>;

/// The variable that names the socket if no option does.
const SOCKET_VARIABLE: &str = "PANDO_SOCKET";

/// The socket of the daemon that was named, else that in the user's run directory.
fn socket(daemon: &Daemon) -> Result<PathBuf> {
    let variable = || std::env::var_os(SOCKET_VARIABLE).map(PathBuf::from);
    if let Some(socket) = &daemon.socket {
        return Ok(socket.clone());
    }
    if let Some(run_dir) = &daemon.run_dir {
        return Ok(socket_in(run_dir));
    }
    variable().map_or_else(own_socket, Ok)
}

/// The socket in the user's run directory.
fn own_socket() -> Result<PathBuf> {
    let run_dir = pando_proto::run_dir().map_err(|missing| {
        Error::new(missing).hint(format!(
            "name that of the daemon with --run-dir, or its socket with --socket or {SOCKET_VARIABLE}"
        ))
    })?;
    Ok(socket_in(&run_dir))
}

/// Connects to the daemon.
pub(crate) async fn connect(daemon: &Daemon) -> Result<Client> {
    connect_to(&socket(daemon)?).await
}

/// Connects to the daemon that listens on `socket`.
async fn connect_to(socket: &Path) -> Result<Client> {
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
                "start it with {}; another daemon is named with --run-dir, --socket or \
                 {SOCKET_VARIABLE}",
                start(socket)
            ))
        }
        io::ErrorKind::PermissionDenied => Error::new(format!("no permission to use {shown}"))
            .hint("run this as root or as the user that runs pandod"),
        _ => Error::io(format!("cannot connect to {shown}"), error),
    }
}

/// The commands that start a daemon on `socket`.
fn start(socket: &Path) -> String {
    let run_dir = socket.parent().filter(|run_dir| socket_in(run_dir) == socket);
    match run_dir {
        Some(_) if own_socket().is_ok_and(|own| own == socket) => {
            "`systemctl start pandod`, or `pandod --pool POOL`".to_owned()
        }
        Some(run_dir) => format!("`pandod --pool POOL --run-dir {}`", run_dir.display()),
        None => format!("`pandod --pool POOL --socket {}`", socket.display()),
    }
}

/// A reference to a volume by its name.
#[expect(clippy::unnecessary_wraps, reason = "fields of messages are optional on the wire")]
pub(crate) fn by_name(name: impl Into<String>) -> Option<VolumeRef> {
    Some(VolumeRef { by: Some(By::Name(name.into())) })
}

/// A reference to a volume that an answer has shown.
pub(crate) fn by_id(volume: &Volume) -> Option<VolumeRef> {
    Some(VolumeRef { by: Some(By::Id(volume.id)) })
}

/// Waits for Ctrl-C or SIGTERM, so that a long command can clean up.
pub(crate) async fn interrupted() {
    match signal(SignalKind::terminate()) {
        Ok(mut terminated) => tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminated.recv() => {}
        },
        Err(_) => tokio::signal::ctrl_c().await.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect_error(socket: &Path) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(connect_to(socket)).unwrap_err().to_string()
    }

    #[test]
    fn no_daemon_says_how_to_start_it() {
        let dir = tempfile::tempdir().unwrap();
        let text = connect_error(&dir.path().join("none.sock"));
        assert!(text.starts_with("error: pandod is not running on "), "{text}");
        assert!(text.contains("\nhint: start it with `pandod --pool POOL --socket "), "{text}");
        let text = connect_error(&dir.path().join("pando.sock"));
        assert!(text.contains(&format!("--run-dir {}`", dir.path().display())), "{text}");
        // A socket that is left over from a daemon that was killed.
        let stale = dir.path().join("stale.sock");
        drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
        let text = connect_error(&stale);
        assert!(text.starts_with("error: pandod is not running on "), "{text}");
    }

    #[test]
    fn an_option_names_the_socket() {
        let named = Daemon { socket: Some("/s".into()), run_dir: None };
        assert_eq!(socket(&named).unwrap(), Path::new("/s"));
        let named = Daemon { socket: None, run_dir: Some("/r".into()) };
        assert_eq!(socket(&named).unwrap(), Path::new("/r/pando.sock"));
    }
}
