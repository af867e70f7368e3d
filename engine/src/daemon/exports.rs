//! The exports: which volumes are offered where, and who uses them.
//!
//! ```text
//!   StartExport db --> nbd_dir/7.sock   OnlyExport("db") --+
//!   export_all     --> nbd_dir/all.sock                    +--> Volumes --> Uses --> pool
//!   nbd_tls        --> TCP                                 |
//! ```
//!
//! A volume is either offered, by any number of connections, or claimed by one operation that
//! needs it for itself (delete, import), never both: [`Uses`] decides.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pando_proto::v1;
use parking_lot::Mutex;

use crate::daemon::config::Config;
use crate::daemon::engine::{Engine, pool_here};
use crate::daemon::offered::Offered;
use crate::disk::LocalFuture;
use crate::error::{Error, ErrorKind, Result};
use crate::export::nbd::{NbdServer, ServerOptions};
use crate::export::{Export, ExportSource, OnlyExport};
use crate::limits::LIST_PAGE_MAX;
use crate::pool::VolumeInfo;
use crate::shard::ShardHandle;
use crate::units::VolumeId;

/// Who uses a volume at present.
enum Use {
    /// Exports: open connections.
    Connections(usize),
    /// One operation, for itself.
    Claimed,
}

/// Who uses which volume.
#[derive(Default)]
pub(super) struct Uses {
    volumes: Mutex<BTreeMap<VolumeId, Use>>,
}

impl Uses {
    /// One connection more to the volume.
    fn connect(self: &Arc<Self>, info: &VolumeInfo) -> Result<Connected> {
        match self.volumes.lock().entry(info.id).or_insert(Use::Connections(0)) {
            Use::Connections(count) => *count += 1,
            Use::Claimed => return Err(claimed(&info.name)),
        }
        Ok(Connected { uses: Arc::clone(self), id: info.id })
    }

    /// Takes an unused volume for one operation.
    fn claim(self: &Arc<Self>, id: VolumeId, name: &str) -> Result<Claim> {
        let mut volumes = self.volumes.lock();
        match volumes.get(&id) {
            None => {}
            Some(Use::Claimed) => return Err(claimed(name)),
            Some(Use::Connections(count)) => {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("volume {name}: {count} NBD connections use it; disconnect them first"),
                ));
            }
        }
        volumes.insert(id, Use::Claimed);
        Ok(Claim { uses: Arc::clone(self), id })
    }

    fn check_unclaimed(&self, info: &VolumeInfo) -> Result<()> {
        match self.volumes.lock().get(&info.id) {
            Some(Use::Claimed) => Err(claimed(&info.name)),
            _ => Ok(()),
        }
    }

    /// Connections to all volumes.
    fn connections(&self) -> usize {
        let volumes = self.volumes.lock();
        volumes
            .values()
            .map(|one| match one {
                Use::Connections(count) => *count,
                Use::Claimed => 0,
            })
            .sum()
    }
}

fn claimed(name: &str) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!(
            "volume {name}: another operation needs it for itself; try again when that is done"
        ),
    )
}

/// A connection to a volume, until it is dropped.
pub(super) struct Connected {
    uses: Arc<Uses>,
    id: VolumeId,
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut volumes = self.uses.volumes.lock();
        if let Some(Use::Connections(count)) = volumes.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                volumes.remove(&self.id);
            }
        }
    }
}

/// A volume that one operation has for itself, until this is dropped.
pub(super) struct Claim {
    uses: Arc<Uses>,
    id: VolumeId,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.uses.volumes.lock().remove(&self.id);
    }
}

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
            let device = Offered::new(pool.device(info.id)?, self.read_only, connected);
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
    everything: Option<NbdServer>,
}

impl Exports {
    /// None yet, but the socket for all volumes if that is configured.
    ///
    /// # Errors
    /// That socket cannot be made.
    pub(super) async fn new(engine: Arc<Engine>, config: &Config) -> Result<Self> {
        let uses = Arc::new(Uses::default());
        let everything = if config.export_all {
            let source = Arc::new(Volumes { uses: Arc::clone(&uses), read_only: false });
            Some(listen(&engine, config.nbd_dir.join("all.sock"), source).await?)
        } else {
            None
        };
        let started = tokio::sync::Mutex::new(BTreeMap::new());
        Ok(Self { engine, dir: config.nbd_dir.clone(), uses, started, everything })
    }

    /// Every volume by its name, for a listener of another kind.
    pub(super) fn source(&self) -> Arc<dyn ExportSource> {
        Arc::new(Volumes { uses: Arc::clone(&self.uses), read_only: false })
    }

    /// Offers a volume over NBD on a unix socket, or returns the export that does.
    ///
    /// # Errors
    /// `Busy` when it is offered already with the other access, or claimed by an operation.
    pub(super) async fn start(&self, info: &VolumeInfo, read_only: bool) -> Result<v1::Export> {
        let mut started = self.started.lock().await;
        // Under the lock of `started`, as the claim is: one of the two sees the other.
        self.uses.check_unclaimed(info)?;
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

    /// Ends the export of a volume.
    ///
    /// # Errors
    /// `NotFound` when it has none.
    pub(super) async fn stop(&self, id: VolumeId, name: &str) -> Result<()> {
        // Held until it has ended: a new one would want the same socket.
        let mut started = self.started.lock().await;
        let Some(running) = started.remove(&id) else {
            return Err(Error::new(ErrorKind::NotFound, format!("volume {name} is not exported")));
        };
        running.server.stop().await;
        Ok(())
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

    /// Ends all exports in good order.
    pub(super) async fn stop_all(&self) {
        if let Some(server) = &self.everything {
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
}

async fn listen(
    engine: &Engine,
    path: PathBuf,
    source: Arc<dyn ExportSource>,
) -> Result<NbdServer> {
    let shards: Vec<ShardHandle> = engine.shards().to_vec();
    let server = shards[0].clone().call(move || async move {
        NbdServer::listen_unix(&path, source, ServerOptions { shards, ..ServerOptions::default() })
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
    use crate::pool::{IoLimits, Source};

    fn volume(id: u64) -> VolumeInfo {
        VolumeInfo {
            id: VolumeId::new(id),
            name: format!("v{id}"),
            size_bytes: 4096,
            snapshot: false,
            read_only: false,
            source: Source::Empty,
            reservation_bytes: 0,
            growth_limit_bytes: 0,
            io_limits: IoLimits::default(),
            labels: BTreeMap::new(),
            created_at: 0,
            mapped_bytes: 0,
            own_bytes: 0,
        }
    }

    #[test]
    fn a_volume_is_offered_or_claimed_never_both() {
        let uses = Arc::new(Uses::default());
        let (one, two) = (volume(1), volume(2));
        let first = uses.connect(&one).unwrap();
        let second = uses.connect(&one).unwrap();
        let refused = uses.claim(one.id, &one.name).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(refused.to_string().contains("volume v1: 2 NBD connections"), "{refused}");
        let other = uses.claim(two.id, &two.name).unwrap();
        assert_eq!(uses.connections(), 2);
        drop((first, second));
        let claim = uses.claim(one.id, &one.name).unwrap();
        assert_eq!(uses.connect(&one).err().unwrap().kind(), ErrorKind::Busy);
        assert_eq!(uses.check_unclaimed(&one).unwrap_err().kind(), ErrorKind::Busy);
        drop((claim, other));
        drop(uses.connect(&one).unwrap());
        assert!(uses.volumes.lock().is_empty(), "nothing is remembered of unused volumes");
    }

    #[test]
    fn addresses_are_escaped() {
        assert_eq!(
            uri("db", Path::new("/run/my pando/7.sock")),
            "nbd+unix:///db?socket=/run/my%20pando/7.sock"
        );
    }
}
