//! The socket of the API: for its owner alone, and only peers that may use it get through.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};
use tracing::warn;

use crate::error::{Error, ErrorKind, Result};

/// A socket's name in the file system; gone with this.
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            warn!(path = %self.0.display(), %error, "socket is not removed");
        }
    }
}

/// Listens at `path`. A directory that is missing is made, for its owner alone; a socket that a
/// dead process left is replaced.
///
/// # Errors
/// `Busy` when another process listens there, `Exists` when something else is there.
pub(super) fn bind(path: &Path) -> Result<(UnixListener, SocketFile)> {
    let failed = |error: io::Error| Error::io(format!("socket {}", path.display()), error);
    if let Some(directory) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            UnixListener::bind(path).map_err(failed)?
        }
        result => result.map_err(failed)?,
    };
    // Who connects before this is still looked at by `peers`.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok((listener, SocketFile(path.to_owned())))
}

fn remove_stale(path: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::io(format!("socket {}", path.display()), error);
    if !fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket() {
        return Err(Error::new(
            ErrorKind::Exists,
            format!("socket {}: something else is there", path.display()),
        ));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        _ => Err(Error::new(
            ErrorKind::Busy,
            format!("socket {}: another pandod listens there", path.display()),
        )),
    }
}

/// Connections of root, of this process's user, and of the users in `allowed`; others are closed.
pub(super) fn peers(
    listener: UnixListener,
    allowed: Vec<u32>,
) -> impl Stream<Item = io::Result<UnixStream>> {
    let own = rustix::process::geteuid().as_raw();
    UnixListenerStream::new(listener).filter(move |accepted| match accepted {
        Ok(stream) => match stream.peer_cred() {
            Ok(peer) if may_use(peer.uid(), own, &allowed) => true,
            Ok(peer) => {
                warn!(uid = peer.uid(), pid = peer.pid(), "connection to the API is refused");
                false
            }
            Err(error) => {
                warn!(%error, "connection to the API is refused: its user is unknown");
                false
            }
        },
        Err(_) => true,
    })
}

fn may_use(uid: u32, own: u32, allowed: &[u32]) -> bool {
    uid == 0 || uid == own || allowed.contains(&uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_the_owner_and_listed_users() {
        assert!(may_use(0, 1000, &[]));
        assert!(may_use(1000, 1000, &[]));
        assert!(may_use(33, 1000, &[33]));
        assert!(!may_use(33, 1000, &[34]));
    }

    #[tokio::test]
    async fn the_socket_is_for_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/pando.sock");
        let (listener, file) = bind(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(path.parent().unwrap()), mode(&path)), (0o700, 0o600));
        assert_eq!(bind(&path).err().unwrap().kind(), ErrorKind::Busy);

        let connecting = UnixStream::connect(&path);
        let mut peers = std::pin::pin!(peers(listener, Vec::new()));
        let (connected, accepted) = tokio::join!(connecting, peers.next());
        connected.unwrap();
        accepted.unwrap().unwrap();
        drop(file);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn leftovers_are_replaced_and_other_files_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pando.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        drop(bind(&path).unwrap());
        fs::write(&path, "precious").unwrap();
        assert_eq!(bind(&path).err().unwrap().kind(), ErrorKind::Exists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
