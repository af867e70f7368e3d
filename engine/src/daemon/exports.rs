//! The exports: which volumes are offered where.
//!
//! ```text
//!   StartExport db --> nbd_dir/7.sock   OnlyExport("db") --+
//!   export_all     --> nbd_dir/all.sock                    +--> Volumes --> Uses --> pool
//!   nbd_tls        --> TCP                                 |
//! ```
//!
//! Who may use a volume beside whom is in [`super::uses`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use pando_proto::v1;

use crate::daemon::engine::{Engine, pool_here};
use crate::daemon::offered::Offered;
use crate::daemon::uses::{Claim, Uses};
use crate::error::{Error, ErrorKind, Result};
use crate::export::nbd::{NbdServer, ServerOptions};
use crate::export::{Export, ExportSource, OnlyExport};
use crate::limits::LIST_PAGE_MAX;
use crate::pool::VolumeInfo;
use crate::runtime::LocalFuture;
use crate::runtime::shard::ShardHandle;
use crate::units::VolumeId;

/// All volumes by their names.
struct Volumes {
    uses: Arc<Uses>,
    read_only: bool,
}

impl ExportSource for Volumes {
    fn list(&self) -> Vec<String> {
        let Ok(pool) = pool_here() else { return Vec::new() };
        let mut names = Vec::new();
        let mut after = None;
        loop {
            let (page, next) = pool.list(after.as_deref(), LIST_PAGE_MAX);
            names.extend(page.into_iter().map(|info| info.name));
            if next.is_none() {
                return names;
            }
            after = next;
        }
    }

    fn open<'a>(&'a self, name: &'a str) -> LocalFuture<'a, Result<Export>> {
        Box::pin(async move {
            let pool = pool_here()?;
            let info = pool.find(name)?;
            let connected = self.uses.connect(&info)?;
            let device = Offered::new(pool.device(info.id)?, self.read_only, Some(connected));
            Ok(Export {
                name: info.name,
                description: String::new(),
                device: std::rc::Rc::new(device),
            })
        })
    }
}

/// A started export.
struct Running {
    server: NbdServer,
    export: v1::Export,
}

/// All exports.
pub(super) struct Exports {
    engine: Arc<Engine>,
    dir: PathBuf,
    uses: Arc<Uses>,
    started: tokio::sync::Mutex<BTreeMap<VolumeId, Running>>,
    /// The socket that offers every volume, if configured.
    everything: OnceLock<NbdServer>,
}

impl Exports {
    /// None yet; their sockets will be in `dir`.
    pub(super) fn new(engine: Arc<Engine>, dir: &Path) -> Self {
        Self {
            engine,
            dir: dir.to_owned(),
            uses: Arc::default(),
            started: tokio::sync::Mutex::default(),
            everything: OnceLock::new(),
        }
    }

    /// Opens the socket that offers every volume.
    ///
    /// # Errors
    /// It cannot be made.
    pub(super) async fn offer_everything(&self) -> Result<()> {
        let server = listen(&self.engine, self.dir.join("all.sock"), self.source()).await?;
        self.everything.set(server).unwrap_or_default();
        Ok(())
    }

    /// Every volume by its name, for a listener of another kind.
    pub(super) fn source(&self) -> Arc<dyn ExportSource> {
        Arc::new(Volumes { uses: Arc::clone(&self.uses), read_only: false })
    }

    /// Offers a volume over NBD on a unix socket, or returns the export that does.
    ///
    /// # Errors
    /// `Busy` when it is offered already with the other access, attached, or claimed by an operation.
    pub(super) async fn start(&self, info: &VolumeInfo, read_only: bool) -> Result<v1::Export> {
        let mut started = self.started.lock().await;
        // Under the lock of `started`, as a claim is: one of the two sees the other.
        self.uses.check_shareable(info)?;
        let read_only = read_only || info.read_only || info.snapshot;
        if let Some(running) = started.get(&info.id) {
            if running.export.read_only == read_only {
                return Ok(running.export.clone());
            }
            return Err(exported(&info.name, &running.export));
        }
        // Names can be longer than the path of a socket may be; ids cannot.
        let path = self.dir.join(format!("{}.sock", info.id.get()));
        let source = Arc::new(Volumes { uses: Arc::clone(&self.uses), read_only });
        let only = Arc::new(OnlyExport::new(info.name.clone(), source));
        let server = listen(&self.engine, path.clone(), only).await?;
        let export = v1::Export {
            volume_id: info.id.get(),
            volume_name: info.name.clone(),
            kind: v1::ExportKind::NbdUnix.into(),
            uri: uri(&info.name, &path),
            path: path.display().to_string(),
            read_only,
        };
        started.insert(info.id, Running { server, export: export.clone() });
        Ok(export)
    }

    /// Ends the export of a volume and returns it.
    ///
    /// # Errors
    /// `NotFound` when it has none.
    pub(super) async fn stop(&self, id: VolumeId, name: &str) -> Result<v1::Export> {
        // Held until it has ended: a new one would want the same socket.
        let mut started = self.started.lock().await;
        let Some(running) = started.remove(&id) else {
            let what = format!("volume {name} is not exported");
            return Err(Error::new(ErrorKind::NotFound, what)
                .hint("`pando volume serve` lists what is exported"));
        };
        running.server.stop().await;
        Ok(running.export)
    }

    /// The exports, of one volume or of all.
    pub(super) async fn list(&self, id: Option<VolumeId>) -> Vec<v1::Export> {
        let started = self.started.lock().await;
        started
            .iter()
            .filter(|(volume, _)| id.is_none_or(|id| id == **volume))
            .map(|(_, running)| running.export.clone())
            .collect()
    }

    /// Exports and connections at present.
    pub(super) async fn counts(&self) -> (usize, usize) {
        (self.started.lock().await.len(), self.uses.connections())
    }

    /// Takes a volume for one operation, for as long as the claim lives.
    ///
    /// # Errors
    /// `Busy`, naming the export, when it is offered or connected to.
    pub(super) async fn claim(&self, id: VolumeId, name: &str) -> Result<Claim> {
        let started = self.started.lock().await;
        match started.get(&id) {
            Some(running) => Err(exported(name, &running.export)),
            None => self.uses.claim(id, name),
        }
    }

    /// Takes a volume for a block device, for as long as what is returned lives.
    ///
    /// # Errors
    /// `Busy`, naming who has it, when it is offered, connected to or claimed.
    pub(super) async fn use_as_device(&self, info: &VolumeInfo) -> Result<Claim> {
        let started = self.started.lock().await;
        match started.get(&info.id) {
            Some(running) => Err(exported(&info.name, &running.export)),
            None => self.uses.attach(info.id, &info.name),
        }
    }

    /// Ends all exports in good order.
    pub(super) async fn stop_all(&self) {
        if let Some(server) = self.everything.get() {
            server.stop().await;
        }
        for (_, running) in std::mem::take(&mut *self.started.lock().await) {
            running.server.stop().await;
        }
    }
}

fn exported(name: &str, export: &v1::Export) -> Error {
    let access = if export.read_only { "read-only" } else { "read-write" };
    Error::new(
        ErrorKind::Busy,
        format!("volume {name}: it is exported {access} as {}; stop that first", export.uri),
    )
    .hint(format!("`pando volume serve --stop {name}`"))
}

async fn listen(
    engine: &Engine,
    path: PathBuf,
    source: Arc<dyn ExportSource>,
) -> Result<NbdServer> {
    let shards: Vec<ShardHandle> = engine.shards().to_vec();
    let server = shards[0].clone().call(move || async move {
        let options = ServerOptions { shards, ..ServerOptions::default() };
        NbdServer::listen_unix(&path, source, options).await
    });
    server.await?
}

/// The address of an export as NBD clients write it. Names of volumes need no escapes; a path
/// may.
fn uri(name: &str, path: &Path) -> String {
    use std::fmt::Write;
    use std::os::unix::ffi::OsStrExt;
    let mut uri = format!("nbd+unix:///{name}?socket=");
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            // Writing into a string cannot fail.
            write!(uri, "%{byte:02X}").unwrap_or_default();
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_escaped() {
        assert_eq!(
            uri("db", Path::new("/run/my pando/7.sock")),
            "nbd+unix:///db?socket=/run/my%20pando/7.sock"
        );
    }
}
