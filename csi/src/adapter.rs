//! What all services share: configuration, daemon, locks, and the look-up of ids.

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

/// Entries that one answer of the daemon has.
const STEP: u32 = 512;
/// Bytes of a token: the longest name in a pool.
const TOKEN_BYTES_MAX: usize = 253;

/// The parts that all services stand on.
pub(crate) struct Adapter {
    pub(crate) config: Config,
    pub(crate) daemon: Daemon,
    pub(crate) locks: Locks,
}

/// What the look-up of an id found.
#[derive(Debug)]
pub(crate) enum Found {
    /// It, and the device that it is, if any.
    Here(Box<v1::Volume>, Option<Box<v1::Attachment>>),
    /// It is of another node, and of a pool that is not here.
    Elsewhere,
    /// There is none: it was deleted, or its pool was replaced by another one on this node.
    Nowhere,
}

impl Adapter {
    /// From a configuration that was validated.
    ///
    /// # Errors
    /// The daemon's socket cannot be one.
    pub(crate) fn new(config: Config) -> Started<Self> {
        let daemon = Daemon::new(Path::new(&config.daemon_socket))?;
        Ok(Self { config, daemon, locks: Locks::default() })
    }

    /// Identity of the pool that the daemon serves now. Asked for each time: a daemon can come back
    /// with another pool, and an id of the old one must then name nothing.
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

    /// What an id of another pool names.
    pub(crate) fn other_pool(&self, id: &ids::Id) -> Found {
        if id.node == self.config.node_id { Found::Nowhere } else { Found::Elsewhere }
    }

    /// The answer to a call about an object of another node, which NOT_FOUND would report as lost.
    pub(crate) fn elsewhere(&self, what: &str, id: &str) -> Status {
        Status::failed_precondition(format!(
            "{what} {id:?} is on another node than {}: send the call to the adapter of that node",
            self.config.node_id
        ))
    }

    /// The volume of this id, and the device that it is, if any.
    ///
    /// # Errors
    /// NOT_FOUND if there is none, FAILED_PRECONDITION if it is another node's, or what the daemon
    /// answers.
    pub(crate) async fn volume(
        &self,
        id: &str,
    ) -> Result<(v1::Volume, Option<v1::Attachment>), Status> {
        let pool = self.pool_id().await?;
        match self.find_volume(&pool, id).await? {
            Found::Here(volume, attachment) => Ok((*volume, attachment.map(|a| *a))),
            Found::Elsewhere => Err(self.elsewhere("volume", id)),
            Found::Nowhere => Err(Status::not_found(format!("volume {id:?} does not exist"))),
        }
    }

    /// One page of a list, of `max` entries at most, and the token of the next, which is the name
    /// to go on behind.
    ///
    /// # Errors
    /// ABORTED for a token that is none, as CSI wants it, or what the daemon says.
    pub(crate) async fn list(
        &self,
        mut query: v1::ListVolumesRequest,
        max: u32,
        token: String,
    ) -> Result<(Vec<v1::Volume>, String), Status> {
        let possible = token.starts_with(ids::ANY_PREFIX) && token.len() <= TOKEN_BYTES_MAX;
        if !token.is_empty() && !possible {
            return Err(Status::aborted("starting_token is no token of this list"));
        }
        let mut volumes = Vec::new();
        let mut left = max;
        query.page_token = token;
        while left > 0 {
            query.page_size = left.min(STEP);
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

    /// Begins an operation on a volume or snapshot. Those of the node take the same lock.
    ///
    /// # Errors
    /// ABORTED while another one is under way.
    pub(crate) fn lock_volume(&self, number: u64) -> Result<Locked, Status> {
        self.locks.lock(format!("volume {number}"))
    }

    /// Where volumes of this adapter are accessible: on its node.
    pub(crate) fn topology(&self) -> Topology {
        let segments = BTreeMap::from([(self.config.topology_key(), self.config.node_id.clone())]);
        Topology { segments }
    }
}
