//! Volumes that are not to stay: the snapshot that a read of one instant is made from, and a volume
//! that is being imported. Each carries the label `pando/temporary`, so that a daemon that was
//! killed leaves none behind: the next one deletes them before its first call.

use std::sync::Arc;

use tracing::{info, warn};

use crate::daemon::convert::now;
use crate::daemon::engine::Engine;
use crate::daemon::exports::Exports;
use crate::daemon::uses::Claim;
use crate::error::{Error, Result};
use crate::limits::LIST_PAGE_MAX;
use crate::pool::{CreateVolume, IoLimits, Source, VolumeInfo};
use crate::state::TEMPORARY_LABEL;

/// Whether a volume is not to stay.
pub(super) fn is_temporary(info: &VolumeInfo) -> bool {
    info.labels.contains_key(TEMPORARY_LABEL)
}

/// A snapshot for one read. It must be [deleted](Frozen::delete): dropping it leaves it to the next
/// daemon.
pub(super) struct Frozen {
    /// The snapshot.
    pub(super) info: VolumeInfo,
    /// Keeps other users away, which could outlast the read.
    claim: Claim,
}

impl Frozen {
    /// Freezes `source` as it is now.
    ///
    /// # Errors
    /// `NoSpace`, or the pool's.
    pub(super) async fn new(
        engine: &Engine,
        exports: &Exports,
        source: &VolumeInfo,
    ) -> Result<Self> {
        let request = CreateVolume {
            // The name of the source may already be as long as a name can be.
            name: format!("export-{}-{}", source.id.get(), uuid::Uuid::new_v4().simple()),
            size_bytes: None,
            source: Source::Volume(source.id),
            snapshot: true,
            read_only: true,
            reservation_bytes: 0,
            growth_limit_bytes: 0,
            io_limits: IoLimits::default(),
            labels: [(TEMPORARY_LABEL.to_owned(), "export".to_owned())].into(),
            created_at: now(),
        };
        let made = engine.control(move |pool| async move { pool.create(request).await }).await;
        let info = made.map_err(|error| named(error, source))?;
        let claim = exports.claim(info.id, &info.name).await?;
        Ok(Self { info, claim })
    }

    /// Deletes the snapshot.
    pub(super) async fn delete(self, engine: &Engine) {
        delete(engine, &self.info, &self.claim).await;
    }
}

/// The name of the snapshot means nothing to the person who reads the error.
fn named(error: Error, source: &VolumeInfo) -> Error {
    error.context(format!("snapshot of volume {} for the time of the read", source.name))
}

/// Deletes a temporary volume that `_claim` holds. If that fails the next daemon does it.
pub(super) async fn delete(engine: &Engine, info: &VolumeInfo, _claim: &Claim) {
    let (id, name) = (info.id, info.name.as_str());
    match engine.control(move |pool| async move { pool.delete(id).await }).await {
        Ok(()) => info!(volume = name, id = id.get(), "temporary volume deleted"),
        Err(error) => {
            warn!(volume = name, id = id.get(), %error, "temporary volume is left to the next start");
        }
    }
}

/// Deletes what an earlier daemon has left. One that is in use stays.
///
/// # Errors
/// The pool cannot be read.
pub(super) async fn sweep(engine: &Arc<Engine>, exports: &Exports) -> Result<()> {
    for info in left(engine).await? {
        match exports.claim(info.id, &info.name).await {
            Ok(claim) => delete(engine, &info, &claim).await,
            Err(error) => warn!(volume = info.name, %error, "temporary volume is left"),
        }
    }
    Ok(())
}

async fn left(engine: &Engine) -> Result<Vec<VolumeInfo>> {
    let mut found = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let from = after.take();
        let page = engine
            .control(move |pool| async move { Ok(pool.list(from.as_deref(), LIST_PAGE_MAX)) });
        let (page, next) = page.await?;
        found.extend(page.into_iter().filter(is_temporary));
        if next.is_none() {
            return Ok(found);
        }
        after = next;
    }
}
