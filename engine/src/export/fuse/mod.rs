//! A volume as a loop device on a file that is served over FUSE: for kernels that have neither
//! ublk nor an NBD client.
//!
//! ```text
//!   /dev/loop0 --direct I/O--> <dir>/fuse/pando-<uuid>-7 --/dev/fuse--> files   one thread
//!                                                                         |
//!                              reply, from the shard <-- serve <-- queue -'
//! ```
//!
//! Loop devices end with the daemon that serves their files: what is written to one later gets
//! an error, and a restarted daemon makes new ones. So a device that a dead daemon has left is
//! released, and its mount taken away.
//!
//! Invariants:
//! * No page cache is between the device and the volume: the kernel is asked for direct I/O and
//!   asked again whether it does it. A flush of the device is a flush of the pool.
//! * Neither the shards nor the file system's thread ever touch the mount or a device: they would
//!   wait for themselves. That is done on threads that may block, and waited for with a limit.

mod files;
mod mount;
mod serve;

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuser::BackgroundSession;
use tokio::sync::Mutex;
use tracing::{info, warn};

use crate::error::{Error, ErrorKind, Result};
use crate::export::driver::{
    Attached, DeviceKind, DeviceNode, DeviceSpec, Driver, Home, Left, Work, blocking,
};
use crate::export::loopdev;
use files::{Files, FlatDirectory, Shown};

/// Where FUSE is had from.
const FUSE: &str = "/dev/fuse";
/// How long the kernel may take for one step: it asks this process, and that may have to flush.
const PATIENCE: Duration = Duration::from_secs(30);

/// Makes loop devices.
pub struct LoopDriver {
    home: Home,
    files: Arc<Files>,
    /// The mount, from the first device on.
    session: Mutex<Option<BackgroundSession>>,
}

impl LoopDriver {
    /// For the devices of one pool.
    #[must_use]
    pub fn new(home: Home) -> Self {
        Self { home, files: Arc::new(Files::new()), session: Mutex::const_new(None) }
    }

    fn directory(&self) -> PathBuf {
        self.home.dir.join("fuse")
    }

    /// The mount point of the files; they are mounted now at the latest.
    async fn mounted(&self) -> Result<PathBuf> {
        let mut session = self.session.lock().await;
        let directory = self.directory();
        // Somebody may have unmounted it.
        if session.as_ref().is_none_or(|session| session.guard.is_finished()) {
            let (at, files) = (directory.clone(), FlatDirectory(Arc::clone(&self.files)));
            let mounting = move || mount::mount(&at, files);
            *session = Some(blocking("mount".to_owned(), PATIENCE, mounting).await?);
        }
        Ok(directory)
    }

    async fn make(&self, spec: DeviceSpec) -> Result<Box<dyn Attached>> {
        let file = self.mounted().await?.join(&spec.identity);
        let shard = spec.shards.first().ok_or_else(|| Error::invalid("no shard serves devices"))?;
        let queue = serve::start(shard, spec.source).await?;
        let shown = self.files.show(spec.identity.clone(), spec.size_bytes, spec.read_only, queue);
        let what = format!("loop device of {}", spec.identity);
        let (path, identity) = (file.clone(), spec.identity.clone());
        let shape = (spec.read_only, spec.sector_bytes);
        let node = blocking(what, PATIENCE, move || attach(&path, &identity, shape)).await?;
        Ok(Box::new(LoopDevice { node, identity: spec.identity, file, shown }))
    }
}

/// Makes the file a device, and sees to it that it is the only one.
fn attach(file: &Path, identity: &str, shape: (bool, u32)) -> Result<DeviceNode> {
    for (node, _) in loopdev::find(identity).into_iter().filter(|(_, found)| found == identity) {
        // Of an attempt that took too long, or of a dead daemon and still mounted.
        loopdev::release(&node)?;
    }
    let mut options = File::options();
    options.read(true).write(!shape.0).custom_flags(libc::O_DIRECT);
    let opened = options.open(file);
    let opened = opened.map_err(|error| Error::io(file.display().to_string(), error))?;
    loopdev::attach(&opened, identity, shape)
}

/// Releases the devices of dead daemons, and takes their mount away.
fn sweep(home: &Home, directory: &Path) -> Result<()> {
    let mut failed = None;
    for (node, identity) in loopdev::find(&home.prefix) {
        let device = node.path.display();
        match loopdev::release(&node) {
            Ok(true) => info!(%device, identity, "loop device of an earlier pandod is removed"),
            Ok(false) => warn!(
                %device,
                identity,
                "loop device of an earlier pandod is dead and still in use: unmount it"
            ),
            Err(error) => failed = Some(error),
        }
    }
    mount::clear(directory)?;
    failed.map_or(Ok(()), Err)
}

impl Driver for LoopDriver {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Loop
    }

    fn probe(&self) -> Work<'_, ()> {
        Box::pin(async {
            for needed in [FUSE, loopdev::CONTROL] {
                // Opening it loads the module, if it is one.
                let opened = File::options().read(true).write(true).open(needed);
                opened.map_err(|error| {
                    Error::new(ErrorKind::Unsupported, format!("{needed}: {error}"))
                })?;
            }
            Ok(())
        })
    }

    fn sweep(&self) -> Work<'_, ()> {
        let (home, directory) = (self.home.clone(), self.directory());
        Box::pin(blocking("sweep".to_owned(), PATIENCE, move || sweep(&home, &directory)))
    }

    fn attach(&self, spec: DeviceSpec) -> Work<'_, Box<dyn Attached>> {
        Box::pin(self.make(spec))
    }

    fn recover(&self, _: Left, _: Option<DeviceSpec>) -> Work<'_, Option<Box<dyn Attached>>> {
        // The sweep has removed it.
        Box::pin(std::future::ready(Ok(None)))
    }

    fn close(&self) -> Work<'_, ()> {
        Box::pin(async {
            // Unmounts, unless a device is still there.
            let Some(session) = self.session.lock().await.take() else { return Ok(()) };
            let directory = self.directory();
            let closing = move || {
                drop(session);
                mount::clear(&directory)
            };
            blocking("unmount".to_owned(), PATIENCE, closing).await
        })
    }
}

/// A loop device and its file.
struct LoopDevice {
    node: DeviceNode,
    identity: String,
    file: PathBuf,
    shown: Shown,
}

impl Attached for LoopDevice {
    fn node(&self) -> &DeviceNode {
        &self.node
    }

    fn resize(&self, size_bytes: u64) -> Work<'_, ()> {
        self.shown.resize(size_bytes);
        let (node, file) = (self.node.clone(), self.file.clone());
        Box::pin(blocking("growth".to_owned(), PATIENCE, move || {
            // Older kernels take the size that they have seen last, so they shall see it.
            let seen = std::fs::metadata(&file);
            seen.map_err(|error| Error::io(file.display().to_string(), error))?;
            loopdev::resize(&node, size_bytes)
        }))
    }

    fn detach(&self) -> Work<'_, ()> {
        let (node, identity) = (self.node.clone(), self.identity.clone());
        Box::pin(blocking("detach".to_owned(), PATIENCE, move || loopdev::detach(&node, &identity)))
    }
}
