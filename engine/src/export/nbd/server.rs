//! Listening sockets, and the life of the connections that come from them.
//!
//! ```text
//! listen_unix --> accept task --- round robin ---> shard: serve(connection)
//!                    ^    |                          |
//!                 stop()  +-- registry: socket of each connection <-- leaves at its end
//!
//! stop: no more accepts, socket file gone -> no more requests are read -> those in flight are
//!       answered -> after `drain` what is left is cut off
//! ```

use std::fs;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen,
    shutdown, socket_with,
};
use slab::Slab;
use tokio::sync::{Notify, watch};

use super::connection::{Entry, serve};
use super::handshake::Tls;
use super::transmit::Limits;
use crate::error::{Error, ErrorKind, Result};
use crate::export::ExportSource;
use crate::runtime::executor::spawn_local;
use crate::runtime::reactor::{accept, sleep};
use crate::runtime::shard::ShardHandle;

/// Connections that wait in the kernel to be accepted.
const BACKLOG: i32 = 128;
/// Pause after a failed accept: the usual cause is a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How a server behaves.
#[derive(Clone)]
pub struct ServerOptions {
    /// Connections at a time; more are closed at once.
    pub connections_max: usize,
    /// What each connection may hold.
    pub limits: Limits,
    /// Shards that serve the connections in turn; none: the shard that listens.
    pub shards: Vec<ShardHandle>,
    /// How long a stop waits for the replies to what is in flight.
    pub drain: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            connections_max: 256,
            limits: Limits::default(),
            shards: Vec::new(),
            drain: Duration::from_secs(10),
        }
    }
}

/// What the tasks of a server share.
struct Shared {
    listener: Arc<OwnedFd>,
    connections: Mutex<Slab<Arc<OwnedFd>>>,
    /// A connection has left.
    left: Notify,
    stopping: AtomicBool,
}

impl Shared {
    /// Ends one or both directions of every connection.
    fn shutdown_all(&self, how: Shutdown) {
        for (_, socket) in &*self.connections.lock() {
            // The peer may have left by itself.
            let _ignored = shutdown(socket, how);
        }
    }

    async fn wait_until_empty(&self) {
        loop {
            let left = self.left.notified();
            if self.connections.lock().is_empty() {
                return;
            }
            left.await;
        }
    }
}

/// A connection's place in the registry.
struct Registered {
    shared: Arc<Shared>,
    key: usize,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.shared.connections.lock().remove(self.key);
        self.shared.left.notify_one();
    }
}

/// How often a socket that may be one of a dead process is looked at, and how long apart: for three
/// seconds.
const STALE_LOOKS: u32 = 60;
const STALE_PAUSE: Duration = Duration::from_millis(50);

/// The socket's name in the file system; gone with this.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "nbd socket is not removed");
        }
    }
}

/// A listening NBD socket. Dropping the handle lets the server run on; see [`Self::stop`].
pub struct NbdServer {
    shared: Arc<Shared>,
    path: PathBuf,
    /// Closed when the accept task has ended.
    running: watch::Receiver<()>,
}

impl NbdServer {
    /// Listens on a unix socket at `path`, which only this user can connect to, and serves
    /// `source` there. A directory that is missing is made, a socket that a dead process left is
    /// replaced. Runs on a shard.
    ///
    /// # Errors
    /// `Busy` when another process serves at `path`, `Exists` when something else is there,
    /// `Invalid` when `path` is too long for a socket (107 bytes), or the system's error.
    pub async fn listen_unix(
        path: &Path,
        source: Arc<dyn ExportSource>,
        options: ServerOptions,
    ) -> Result<Self> {
        let listener = Arc::new(bind_unix(path).await?);
        let file = SocketFile(path.to_owned());
        let shared = Arc::new(Shared {
            listener,
            connections: Mutex::new(Slab::new()),
            left: Notify::new(),
            stopping: AtomicBool::new(false),
        });
        let (ended, running) = watch::channel(());
        let task = Arc::clone(&shared);
        spawn_local(async move {
            accept_all(&task, &source, &options).await;
            drop(file);
            drain(&task, options.drain).await;
            drop(ended);
        });
        tracing::info!(path = %path.display(), "nbd socket is listening");
        Ok(Self { shared, path: path.to_owned(), running })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Connections at present.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.lock().len()
    }

    /// Ends the server: removes the socket, answers what is in flight within the time of
    /// [`ServerOptions::drain`], and closes every connection. Can be awaited on any runtime.
    pub async fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        // Wakes the accept task. It fails when that has ended already.
        let _ignored = shutdown(&self.shared.listener, Shutdown::Both);
        let mut running = self.running.clone();
        while running.changed().await.is_ok() {}
    }
}

async fn accept_all(shared: &Arc<Shared>, source: &Arc<dyn ExportSource>, options: &ServerOptions) {
    let mut shards = options.shards.iter().cycle();
    let mut full = false;
    loop {
        let accepted = accept(&shared.listener).await;
        if shared.stopping.load(Ordering::Acquire) {
            return;
        }
        let socket = match accepted {
            Ok(socket) => Arc::new(socket),
            Err(error) => {
                tracing::warn!(%error, "nbd connection is not accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let key = {
            let mut connections = shared.connections.lock();
            if connections.len() >= options.connections_max {
                if !std::mem::replace(&mut full, true) {
                    tracing::warn!(max = options.connections_max, "nbd connections are refused");
                }
                continue;
            }
            connections.insert(Arc::clone(&socket))
        };
        full = false;
        let place = Registered { shared: Arc::clone(shared), key };
        let (source, limits) = (Arc::clone(source), options.limits);
        let connection = move || async move {
            let entry = Entry::Fresh(Tls::Refused);
            if let Err(error) = serve(socket, &*source, entry, limits).await {
                tracing::debug!(%error, "nbd connection ended");
            }
            drop(place);
        };
        match shards.next() {
            None => spawn_local(connection()),
            Some(shard) => {
                if let Err(error) = shard.spawn(connection) {
                    tracing::warn!(%error, "nbd connection is not served");
                }
            }
        }
    }
}

/// Lets the connections end in good order, and cuts off those that do not.
async fn drain(shared: &Shared, limit: Duration) {
    shared.shutdown_all(Shutdown::Read);
    if empty_within(shared, limit).await {
        return;
    }
    shared.shutdown_all(Shutdown::Both);
    if !empty_within(shared, limit).await {
        tracing::warn!("nbd connections are left behind: their volumes do not answer");
    }
}

async fn empty_within(shared: &Shared, limit: Duration) -> bool {
    let mut empty = pin!(shared.wait_until_empty());
    let mut timer = pin!(sleep(limit));
    poll_fn(|context| {
        if empty.as_mut().poll(context).is_ready() {
            return Poll::Ready(true);
        }
        timer.as_mut().poll(context).map(|()| false)
    })
    .await
}

/// A listening socket at `path` that only this user can connect to.
async fn bind_unix(path: &Path) -> Result<OwnedFd> {
    let failed = |error: io::Error| Error::io(format!("nbd socket {}", path.display()), error);
    if let Some(directory) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    }
    let address = SocketAddrUnix::new(path).map_err(|_| {
        Error::invalid(format!("nbd socket {}: choose a path below 108 bytes", path.display()))
    })?;
    let socket = new_socket().map_err(failed)?;
    match bind(&socket, &address) {
        Err(rustix::io::Errno::ADDRINUSE) => {
            remove_stale(path, &address).await?;
            bind(&socket, &address).map_err(|error| failed(error.into()))?;
        }
        result => result.map_err(|error| failed(error.into()))?,
    }
    // Nobody can connect before `listen`, so nobody comes in by wider permissions.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    listen(&socket, BACKLOG).map_err(|error| failed(error.into()))?;
    Ok(socket)
}

fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// Removes the socket of a process that is gone. The kernel ends the io_uring of a process that was
/// killed some time after the process, and until then its socket takes connections; so one that
/// does is asked again for a while.
async fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<()> {
    let name = format!("nbd socket {}", path.display());
    let failed = |error: io::Error| Error::io(name.clone(), error);
    let kind = fs::symlink_metadata(path).map_err(failed)?.file_type();
    if !kind.is_socket() {
        return Err(Error::new(ErrorKind::Exists, format!("{name}: something else is there")));
    }
    for _ in 0..STALE_LOOKS {
        if let Err(rustix::io::Errno::CONNREFUSED) =
            connect(&new_socket().map_err(failed)?, address)
        {
            return fs::remove_file(path).map_err(failed);
        }
        sleep(STALE_PAUSE).await;
    }
    Err(Error::new(ErrorKind::Busy, format!("{name}: another process serves there")))
}
