//! The kernel's NBD client on a socket of the daemon: a volume as `/dev/nbdN`.
//!
//! ```text
//!   /dev/nbdN -- kernel -- socket pair -- transmission phase of the NBD server, on a shard
//!                  ^  CONNECT | RECONFIGURE | DISCONNECT
//!   mod, kernel ---'  by netlink; what it shows is in /sys/block/nbdN
//! ```
//!
//! **Restart.** When the daemon ends, its end of the pair is closed and the kernel lets I/O wait,
//! ten minutes at most. The next daemon finds the device by its identity and gives it a new socket
//! (the kernel compares the identity as well). The kernel then sends again what it had no answer
//! to. That this is safe has the reasons of [`ublk`](crate::export::ublk), and one more: a device
//! has **one connection and no time-out for requests**. With several connections, or with a
//! time-out, the kernel would send a slow request a second time to a daemon that is still doing
//! it; the first one could then land behind a newer write. As it is, only a new socket makes it
//! send again, and a daemon gives one only when the earlier daemon is dead or when its own end of
//! the last connection has finished everything that it had taken.
//!
//! The kernel looks for requests to send again when it wonders about them, which is why that time
//! is made short (`held::LOOK_AFTER`). An error other than success reaches its users as EIO: the
//! driver has no other.
//!
//! **What freezes the queue** of a device waits in the kernel until all its I/O under way has ended,
//! and if the daemon is killed meanwhile, it waits for ever: see [`helper`]. So the time above is set
//! before a device is connected, and never again. A change of size cannot be done otherwise, and not
//! from another process either, since the kernel takes no new socket meanwhile. It lasts as long as
//! the requests that are being served; those that the kernel has to send again are waited for
//! before.
//!
//! A connection can end at any moment, that of the kernel's taking it included: its old receiver,
//! which is late, takes the new socket for its own. So whoever has made a connection keeps it from
//! then on, before anything else that takes time.
//!
//! **Identity.** `/sys/block/nbdN/backend`.

mod kernel;
mod netlink;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::{error, warn};

use crate::error::{Error, ErrorKind, Result};
use crate::export::driver::{
    Attached, DeviceKind, DeviceNode, DeviceSpec, Driver, Home, Left, Work, blocking,
};
use crate::export::nbd::connection::serve_transmission;
use crate::export::{held, helper};
use crate::runtime::executor::spawn_local;

/// Longest time for one step in the kernel.
const STEP_TIME_MAX: Duration = Duration::from_secs(60);
/// Pause before a connection that has ended is replaced: the kernel notices its end by itself.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// How long the kernel may take to be done with a device.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// Unused devices that are tried, in turn with others who look for one.
const CONNECT_ATTEMPTS: usize = 8;

/// Makes devices of this kind. It keeps nothing: the kernel does.
pub struct NbdDeviceDriver;

impl NbdDeviceDriver {
    /// For the devices of one pool.
    #[must_use]
    pub fn new(_home: Home) -> Self {
        Self
    }
}

/// Runs one step that may block.
async fn step<T: Send + 'static>(
    what: impl Into<String>,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T> {
    let work = move || work().map_err(|error| Error::io("nbd", error));
    blocking(what.into(), STEP_TIME_MAX, work).await
}

fn probe() -> Result<()> {
    kernel::probe().map_err(|error| {
        let why = match error.kind() {
            io::ErrorKind::NotFound => "no NBD client: load its module nbd".into(),
            _ => format!("the kernel's NBD client: {error}"),
        };
        Error::new(ErrorKind::Unsupported, why)
    })
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// A connection that is served on a shard.
struct Connection {
    /// The daemon's end.
    own: Arc<OwnedFd>,
    /// The kernel's end, until the kernel has it.
    kernel: OwnedFd,
    /// Sent when everything that came in on it is done with.
    ended: oneshot::Receiver<()>,
}

impl Connection {
    /// Begins to serve the volume on a new pair of sockets.
    async fn start(spec: &DeviceSpec) -> Result<Self> {
        let (own, kernel) = pair().map_err(|error| Error::io("pair of sockets", error))?;
        let own = Arc::new(own);
        let (end, ended) = oneshot::channel();
        let (socket, source) = (Arc::clone(&own), Arc::clone(&spec.source));
        let identity = spec.identity.clone();
        let started = spec.shards[0].call(move || async move {
            let export = source.open("").await?;
            spawn_local(async move {
                if let Err(error) = serve_transmission(socket, export.device).await {
                    tracing::debug!(identity, %error, "connection of the kernel's NBD client ended");
                }
                // Whoever waits may have given up.
                let _ignored = end.send(());
            });
            Ok(())
        });
        started.await??;
        Ok(Self { own, kernel, ended })
    }
}

/// What a device and the task that keeps it connected share.
struct State {
    number: u32,
    spec: DeviceSpec,
    /// The device is being removed or left to the next daemon: it gets no more connections.
    ending: AtomicBool,
    /// The daemon's end of the present connection.
    own: Mutex<Arc<OwnedFd>>,
    /// When the device was taken back, if it was.
    taken_back: Option<Instant>,
}

impl State {
    /// Gives the device a connection, unless it has one that lives.
    async fn reconnect(&self) -> Result<oneshot::Receiver<()>> {
        let connection = Connection::start(&self.spec).await?;
        let (number, identity) = (self.number, self.spec.identity.clone());
        let kernel = connection.kernel;
        *self.own.lock() = connection.own;
        let what = format!("connection of /dev/nbd{number}");
        step(what, move || kernel::reconnect(number, &identity, &kernel)).await?;
        Ok(connection.ended)
    }

    /// Whether the kernel still has the device.
    fn is_ours(&self) -> bool {
        kernel::identity(self.number).is_some_and(|found| found == self.spec.identity)
    }

    /// Waits until the kernel has sent everything again that an earlier daemon has not answered:
    /// it looks for that once, and is late by a second at most.
    async fn settled(&self) {
        let look = kernel::look_after(self.number).unwrap_or_default() + Duration::from_secs(1);
        let left = self.taken_back.and_then(|then| look.checked_sub(then.elapsed()));
        tokio::time::sleep(left.unwrap_or_default()).await;
    }

    /// Replaces connections that have ended, until the device is to end or is gone.
    async fn keep(self: Arc<Self>, ended: oneshot::Receiver<()>) {
        let mut connected = Some(ended);
        loop {
            if let Some(ended) = connected.take() {
                // An error says the same: the shard has stopped.
                let _ignored = ended.await;
            }
            if self.ending.load(Ordering::Acquire) {
                return;
            }
            if !self.is_ours() {
                error!(number = self.number, "nbd device was removed by somebody else");
                return;
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
            match self.reconnect().await {
                Ok(ended) => connected = Some(ended),
                Err(error) => warn!(number = self.number, %error, "nbd device is not connected"),
            }
            if self.ending.load(Ordering::Acquire) {
                self.silence();
            }
        }
    }

    /// Nothing is answered any more on the present connection.
    fn silence(&self) {
        // The kernel may have closed it already.
        let _ignored = shutdown(&**self.own.lock(), Shutdown::Both);
    }
}

/// A device that is served.
struct NbdDevice {
    node: DeviceNode,
    state: Arc<State>,
    keeper: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

impl NbdDevice {
    /// Keeps a device connected that has been connected.
    async fn new(state: State, ended: oneshot::Receiver<()>) -> Result<Self> {
        let (number, state) = (state.number, Arc::new(state));
        let keeper = tokio::spawn(Arc::clone(&state).keep(ended));
        let found = blocking(format!("nbd device {number}"), STEP_TIME_MAX, move || {
            let node = kernel::node(number).map_err(|error| Error::io("its numbers", error))?;
            held::await_node(&node)?;
            Ok(node)
        });
        match found.await {
            Ok(node) => Ok(Self { node, state, keeper: tokio::sync::Mutex::new(Some(keeper)) }),
            Err(error) => {
                state.ending.store(true, Ordering::Release);
                state.silence();
                Err(error)
            }
        }
    }

    /// Waits until everything is done with that came in on the last connection.
    async fn ended(&self) -> Result<()> {
        let Some(keeper) = self.keeper.lock().await.take() else { return Ok(()) };
        match tokio::time::timeout(END_PATIENCE, keeper).await {
            Ok(_) => Ok(()),
            Err(_) => {
                let what = format!("{}: its requests do not end", self.node.path.display());
                Err(Error::io(what, io::Error::from_raw_os_error(libc::ETIMEDOUT)))
            }
        }
    }
}

async fn attach(spec: DeviceSpec) -> Result<NbdDevice> {
    let connection = Connection::start(&spec).await?;
    let (wished, kernel) = (spec.clone(), connection.kernel);
    let connected = step("creation of an nbd device", move || connect(&wished, &kernel)).await?;
    let state = State {
        number: connected,
        spec,
        ending: AtomicBool::new(false),
        own: Mutex::new(connection.own),
        taken_back: None,
    };
    match NbdDevice::new(state, connection.ended).await {
        Ok(device) => Ok(device),
        Err(error) => {
            if let Err(left) = remove(connected).await {
                error!(number = connected, error = %left, "nbd device is left behind");
            }
            Err(error)
        }
    }
}

/// Connects an unused device, having adjusted it.
fn connect(spec: &DeviceSpec, socket: &OwnedFd) -> io::Result<u32> {
    let mut passed_over = Vec::new();
    for _ in 0..CONNECT_ATTEMPTS {
        let number = match kernel::unused(&passed_over) {
            Some(number) => number,
            None => make_unused(spec)?,
        };
        kernel::look_early(number);
        match kernel::connect(spec, Some(number), socket) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => passed_over.push(number),
            connected => return connected,
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

/// Lets the kernel make one more device, which it does only for a connection. If this is killed in
/// between, the next daemon finds the device by its identity.
fn make_unused(spec: &DeviceSpec) -> io::Result<u32> {
    let (_own, socket) = pair()?;
    let number = kernel::connect(spec, None, &socket)?;
    end(number)?;
    Ok(number)
}

/// Ends a device and waits until the kernel is done with it.
async fn remove(number: u32) -> Result<()> {
    step(format!("end of /dev/nbd{number}"), move || end(number)).await
}

fn end(number: u32) -> io::Result<()> {
    kernel::disconnect(number)?;
    let since = Instant::now();
    while kernel::identity(number).is_some() && since.elapsed() < END_PATIENCE {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

async fn recover(left: Left, spec: Option<DeviceSpec>) -> Result<Option<Box<dyn Attached>>> {
    let found = step("nbd devices", move || Ok(kernel::find(&left.identity))).await?;
    let Some(number) = found else { return Ok(None) };
    let Some(spec) = spec else {
        remove(number).await?;
        return Ok(None);
    };
    let connection = Connection::start(&spec).await?;
    let (identity, kernel) = (spec.identity.clone(), connection.kernel);
    let what = format!("connection of /dev/nbd{number}");
    step(what, move || kernel::reconnect(number, &identity, &kernel)).await?;
    let state = State {
        number,
        spec,
        ending: AtomicBool::new(false),
        own: Mutex::new(connection.own),
        taken_back: Some(Instant::now()),
    };
    let device = NbdDevice::new(state, connection.ended).await?;
    Ok(Some(Box::new(device)))
}

impl Attached for NbdDevice {
    fn node(&self) -> &DeviceNode {
        &self.node
    }

    fn resize(&self, size_bytes: u64) -> Work<'_, ()> {
        let (number, identity) = (self.state.number, self.state.spec.identity.clone());
        let what = format!("size of {}", self.node.path.display());
        Box::pin(async move {
            if kernel::size_bytes(number) == Some(size_bytes) {
                return Ok(());
            }
            self.state.settled().await;
            step(what, move || kernel::resize(number, &identity, size_bytes)).await
        })
    }

    fn detach(&self) -> Work<'_, ()> {
        Box::pin(async move {
            let (node, number) = (self.node.clone(), self.state.number);
            let what = node.path.display().to_string();
            if !self.state.is_ours() {
                // Somebody else has removed it.
                return Ok(());
            }
            let held = blocking(what.clone(), STEP_TIME_MAX, move || helper::hold(&node)).await?;
            self.state.ending.store(true, Ordering::Release);
            let ended = step(format!("end of {what}"), move || kernel::disconnect(number)).await;
            if let Err(error) = ended {
                self.state.ending.store(false, Ordering::Release);
                return Err(error);
            }
            // The kernel keeps the device until its last user has closed it: that is this.
            let close = move || {
                drop(held);
                Ok(())
            };
            blocking(what, STEP_TIME_MAX, close).await?;
            self.ended().await
        })
    }

    fn suspend(&self) -> Work<'_, bool> {
        Box::pin(async move {
            self.state.ending.store(true, Ordering::Release);
            self.state.silence();
            self.ended().await.map(|()| true)
        })
    }
}

impl Driver for NbdDeviceDriver {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Nbd
    }

    fn probe(&self) -> Work<'_, ()> {
        Box::pin(blocking("this kernel".to_owned(), STEP_TIME_MAX, probe))
    }

    fn attach(&self, spec: DeviceSpec) -> Work<'_, Box<dyn Attached>> {
        Box::pin(async {
            let device: Box<dyn Attached> = Box::new(attach(spec).await?);
            Ok(device)
        })
    }

    fn recover(&self, left: Left, spec: Option<DeviceSpec>) -> Work<'_, Option<Box<dyn Attached>>> {
        Box::pin(recover(left, spec))
    }
}
