//! The state that all services share (configuration, client of the daemon, locks) and the lookup of
//! ids.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result as Started;
use pando_proto::v1;
use tonic::Status;

use crate::config::Config;
use crate::daemon::{Daemon, by_number};
use crate::ids::{self, PoolId};
use crate::locks::{Locked, Locks};
use crate::proto::csi::Topology;

/// Entries per page that is requested from the daemon.
const DAEMON_PAGE: u32 = 512;
/// Maximum length of a token in bytes: that of a name in a pool.
const TOKEN_BYTES_MAX: usize = 253;

/// The state that all services share.
pub(crate) struct Adapter {
    pub(crate) config: Config,
    pub(crate) daemon: Daemon,
    pub(crate) locks: Locks,
}

/// The result of looking up an id.
#[derive(Debug)]
pub(crate) enum Found {
    /// The object, and its device if it is attached.
    Here(Box<v1::Volume>, Option<Box<v1::Attachment>>),
    /// The id belongs to another node and to a pool that is not on this node.
    Elsewhere,
    /// No such object: it was deleted, or its pool was replaced by another one on this node.
    Nowhere,
}

impl Adapter {
    /// `config` must have been validated.
    ///
    /// # Errors
    /// The path of the daemon's socket is invalid.
    pub(crate) fn new(config: Config) -> Started<Self> {
        let daemon = Daemon::new(Path::new(&config.daemon_socket))?;
        Ok(Self { config, daemon, locks: Locks::default() })
    }

    /// The identity of the pool that the daemon serves now. It is read for each call: a restarted
    /// daemon can serve another pool, and then an id of the old pool must name nothing.
    pub(crate) async fn pool_id(&self) -> Result<PoolId, Status> {
        Ok(PoolId::new(&self.daemon.pool().await?.uuid))
    }

    /// The id of a volume or snapshot.
    pub(crate) fn id(&self, pool: &PoolId, number: u64) -> String {
        pool.id(&self.config.node_id, number)
    }

    /// Looks up the id of a volume.
    pub(crate) async fn find_volume(&self, pool: &PoolId, id: &str) -> Result<Found, Status> {
        self.find(pool, id, ids::is_volume).await
    }

    /// Looks up the id of a snapshot.
    pub(crate) async fn find_snapshot(&self, pool: &PoolId, id: &str) -> Result<Found, Status> {
        self.find(pool, id, ids::is_snapshot).await
    }

    async fn find(
        &self,
        pool: &PoolId,
        id: &str,
        wanted: fn(&v1::Volume) -> bool,
    ) -> Result<Found, Status> {
        let Some(parsed) = ids::parse(id) else { return Ok(Found::Nowhere) };
        if parsed.pool != *pool {
            return Ok(self.other_pool(&parsed));
        }
        let found = self.daemon.find(by_number(parsed.number)).await?;
        Ok(match found {
            Some((volume, attachment)) if wanted(&volume) => {
                Found::Here(Box::new(volume), attachment.map(Box::new))
            }
            _ => Found::Nowhere,
        })
    }

    /// The result of looking up an id of a pool that is not here.
    pub(crate) fn other_pool(&self, id: &ids::Id) -> Found {
        if id.node == self.config.node_id { Found::Nowhere } else { Found::Elsewhere }
    }

    /// The error for an id that names nothing on this node. `what` is the kind of object.
    pub(crate) fn not_found(&self, what: &str, id: &str) -> Status {
        let node = &self.config.node_id;
        Status::not_found(format!("{what} {id:?} does not exist on node {node}"))
    }

    /// The error for an object of another node. NOT_FOUND would report the object as lost.
    pub(crate) fn elsewhere(&self, what: &str, id: &str) -> Status {
        Status::failed_precondition(format!(
            "{what} {id:?} is on another node than {}: send the call to the adapter of that node",
            self.config.node_id
        ))
    }

    /// The volume with this id, and its device if it is attached.
    ///
    /// # Errors
    /// NOT_FOUND: no such volume; FAILED_PRECONDITION: it is on another node; errors of the daemon.
    pub(crate) async fn volume(
        &self,
        id: &str,
    ) -> Result<(v1::Volume, Option<v1::Attachment>), Status> {
        let pool = self.pool_id().await?;
        match self.find_volume(&pool, id).await? {
            Found::Here(volume, attachment) => Ok((*volume, attachment.map(|a| *a))),
            Found::Elsewhere => Err(self.elsewhere("volume", id)),
            Found::Nowhere => Err(self.not_found("volume", id)),
        }
    }

    /// Reads again a volume that the caller has found before, and its device if it is attached.
    ///
    /// # Errors
    /// NOT_FOUND: it was deleted; errors of the daemon.
    pub(crate) async fn read_again(
        &self,
        number: u64,
    ) -> Result<(v1::Volume, Option<v1::Attachment>), Status> {
        let found = self.daemon.find(by_number(number)).await?;
        found.ok_or_else(|| Status::not_found(format!("volume {number} was deleted meanwhile")))
    }

    /// One page of a list with at most `max` entries, and the token of the next page. A token is
    /// the last name of the page before.
    ///
    /// # Errors
    /// ABORTED for an invalid token, as CSI requires; errors of the daemon.
    pub(crate) async fn list(
        &self,
        mut query: v1::ListVolumesRequest,
        max: u32,
        token: String,
    ) -> Result<(Vec<v1::Volume>, String), Status> {
        let valid = token.starts_with(ids::ANY_PREFIX) && token.len() <= TOKEN_BYTES_MAX;
        if !token.is_empty() && !valid {
            return Err(Status::aborted("starting_token is not a token of this list"));
        }
        let mut volumes = Vec::new();
        let mut left = max;
        query.page_token = token;
        while left > 0 {
            query.page_size = left.min(DAEMON_PAGE);
            let answer = self.daemon.list(query.clone()).await?;
            left -= query.page_size;
            volumes.extend(answer.volumes);
            query.page_token = answer.next_page_token;
            if query.page_token.is_empty() {
                break;
            }
        }
        Ok((volumes, query.page_token))
    }

    /// Begins an operation on a volume or snapshot. Controller and node take the same lock.
    ///
    /// # Errors
    /// ABORTED: another operation on it is under way.
    pub(crate) fn lock_volume(&self, number: u64) -> Result<Locked, Status> {
        self.locks.lock(format!("volume {number}"))
    }

    /// The topology of volumes of this adapter: they are accessible on its node only.
    pub(crate) fn topology(&self) -> Topology {
        let segments = BTreeMap::from([(self.config.topology_key(), self.config.node_id.clone())]);
        Topology { segments }
    }
}
