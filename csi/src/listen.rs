//! The adapter's sockets. Only their owner can access them, and only connections of root and of the
//! adapter's own user are accepted.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};
use tracing::warn;

use crate::authority::Lenient;

/// The file of a socket; removed when dropped.
pub(crate) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            warn!(path = %self.0.display(), %error, "cannot remove a socket");
        }
    }
}

/// Listens at `path`. Returns the connections of users that are allowed. Creates a missing
/// directory with access for its owner only, and replaces the socket of a process that has ended.
///
/// # Errors
/// Another process listens at `path`, or it is not a socket.
pub(crate) fn bind(
    path: &Path,
) -> Result<(impl Stream<Item = io::Result<Lenient>> + use<>, SocketFile)> {
    let context = || format!("socket {}", path.display());
    if let Some(directory) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o700).create(directory).with_context(context)?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            UnixListener::bind(path)
        }
        bound => bound,
    };
    let listener = listener.with_context(context)?;
    let file = SocketFile(path.to_owned());
    // A peer that connects before this is still checked below.
    fs::set_permissions(path, Permissions::from_mode(0o600)).with_context(context)?;
    let own = rustix::process::geteuid().as_raw();
    let peers = UnixListenerStream::new(listener).filter(move |accepted| match accepted {
        Ok(stream) => match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 || peer.uid() == own => true,
            Ok(peer) => {
                warn!(uid = peer.uid(), pid = peer.pid(), "connection refused");
                false
            }
            Err(error) => {
                warn!(%error, "connection refused: its user is unknown");
                false
            }
        },
        Err(_) => true,
    });
    Ok((peers.map(|accepted| accepted.map(Lenient::new)), file))
}

fn remove_stale(path: &Path) -> Result<()> {
    let context = || format!("socket {}", path.display());
    if !fs::symlink_metadata(path).with_context(context)?.file_type().is_socket() {
        bail!("socket {}: a file that is not a socket exists there", path.display());
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).with_context(context)
        }
        _ => bail!("socket {}: another pando-csi listens there", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixStream;

    #[tokio::test]
    async fn only_the_owner_can_access_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/csi.sock");
        let (peers, file) = bind(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(path.parent().unwrap()), mode(&path)), (0o700, 0o600));
        let second = bind(&path).err().unwrap().to_string();
        assert!(second.contains("another pando-csi"), "{second}");

        let connecting = UnixStream::connect(&path);
        let mut peers = std::pin::pin!(peers);
        let (connected, accepted) = tokio::join!(connecting, peers.next());
        connected.unwrap();
        accepted.unwrap().unwrap();
        drop(file);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn leftovers_are_replaced_and_other_files_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csi.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        drop(bind(&path).unwrap());
        fs::write(&path, "precious").unwrap();
        assert!(bind(&path).err().unwrap().to_string().contains("not a socket"));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
