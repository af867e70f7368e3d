//! Copies of what is mounted: crash-consistent by themselves, clean if the file systems are frozen
//! while the copies are made.
//!
//! ```text
//!  freeze -- copy, labelled "unproven" -- thaw -- was it frozen all the time? -- label off
//! ```
//!
//! A copy with that label was promised to nobody: its caller has had no answer. Whatever kills
//! adapter or daemon in between, the call that comes again deletes it and makes another.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};

use pando_proto::v1;
use pando_proto::v1::volume_ref::By;
use tonic::Status;

use crate::adapter::Adapter;
use crate::daemon::{by_name, by_number};
use crate::labels;
use crate::locks::Locked;
use crate::node::{freeze, set_label};

/// What makes the copies.
type Work<'a> = Pin<Box<dyn Future<Output = Result<Vec<v1::Volume>, Status>> + Send + 'a>>;

/// Whether a volume was made to be frozen while it is copied.
pub(crate) fn wanted(volume: &v1::Volume) -> bool {
    volume.labels.get(labels::FREEZE).is_some_and(|value| value == labels::TRUE)
}

/// Whether it is unknown if a copy is clean, as it was to be.
pub(crate) fn unproven(copy: &v1::Volume) -> bool {
    copy.labels.get(labels::UNPROVEN).is_some_and(|value| value == labels::TRUE)
}

/// The volume or snapshot of this name that a call has made before. One that is unproven is
/// deleted, and so is none.
pub(crate) async fn made(adapter: &Adapter, name: &str) -> Result<Option<v1::Volume>, Status> {
    match adapter.daemon.find(by_name(name)).await? {
        Some((copy, _)) if unproven(&copy) => {
            tracing::warn!(copy = copy.name, "deletes what was to be clean and may not be");
            adapter.daemon.delete(copy.id).await?;
            Ok(None)
        }
        found => Ok(found.map(|(copy, _)| copy)),
    }
}

/// Makes volumes or snapshots at one instant, while the file systems that are mounted from
/// `sources` are frozen. If one of them did not stay so, what was made is deleted.
///
/// # Errors
/// What the daemon says, or that something cannot be frozen; ABORTED while a source is staged.
pub(crate) async fn make(
    adapter: &Adapter,
    sources: &[u64],
    mut requests: Vec<v1::CreateVolumeRequest>,
) -> Result<Vec<v1::Volume>, Status> {
    let mut held = BTreeMap::new();
    let mut devices = Vec::new();
    for source in sources {
        let Some((_, Some(_))) = adapter.daemon.find(by_number(*source)).await? else { continue };
        // From here on nobody mounts or unmounts it.
        held.insert(*source, adapter.lock_volume(*source)?);
        let found = adapter.daemon.find(by_number(*source)).await?;
        devices.extend(found.and_then(|(_, device)| device));
    }
    mark_unformatted(adapter, &mut requests, &mut held).await?;
    if devices.is_empty() {
        return create(adapter, requests).await;
    }
    for request in &mut requests {
        request.labels.insert(labels::UNPROVEN.to_owned(), labels::TRUE.to_owned());
        // An equal one was made at another time, when nothing was frozen.
        request.must_be_new = true;
    }
    let names: Vec<_> = requests.iter().map(|request| request.name.clone()).collect();
    let refused = AtomicBool::new(false);
    let work = async {
        let made = create(adapter, requests).await;
        refused.store(made.is_err(), Ordering::Relaxed);
        made
    };
    let made = all(adapter, &devices, Box::pin(work)).await;
    match &made {
        Ok(copies) => {
            for copy in copies {
                set_label(adapter, copy.id, labels::UNPROVEN, "").await?;
            }
        }
        // What the daemon refused to make was not made; of these names there may be others'.
        Err(_) if refused.load(Ordering::Relaxed) => {}
        Err(_) => {
            for name in names {
                self::made(adapter, &name).await?;
            }
        }
    }
    made
}

/// Keeps the node from formatting the sources while they are copied: a copy of half a file system
/// could neither be mounted nor formatted. A format that was interrupted has left a mark, which the
/// copies get as well.
///
/// # Errors
/// ABORTED while a source is staged; what the daemon says.
async fn mark_unformatted(
    adapter: &Adapter,
    requests: &mut [v1::CreateVolumeRequest],
    held: &mut BTreeMap<u64, Locked>,
) -> Result<(), Status> {
    let formatting = |volume: &v1::Volume| {
        volume.labels.get(labels::FORMATTING).is_some_and(|v| v == labels::TRUE)
    };
    let raw = |volume: &v1::Volume| {
        volume.labels.get(labels::ACCESS).is_some_and(|v| v == labels::ACCESS_BLOCK)
    };
    for request in requests {
        let Some(By::Id(source)) = request.source.as_ref().and_then(|source| source.by.as_ref())
        else {
            continue;
        };
        let mut found = adapter.daemon.find(by_number(*source)).await?;
        let changes = found.as_ref().is_some_and(|(volume, _)| {
            !volume.snapshot && !raw(volume) && (volume.mapped_bytes == 0 || formatting(volume))
        });
        if changes {
            if !held.contains_key(source) {
                held.insert(*source, adapter.lock_volume(*source)?);
            }
            found = adapter.daemon.find(by_number(*source)).await?;
        }
        if found.is_some_and(|(volume, _)| formatting(&volume)) {
            request.labels.insert(labels::FORMATTING.to_owned(), labels::TRUE.to_owned());
        }
    }
    Ok(())
}

/// [`make`] for one volume or snapshot.
///
/// # Errors
/// As those of [`make`].
pub(crate) async fn make_one(
    adapter: &Adapter,
    source: Option<u64>,
    request: v1::CreateVolumeRequest,
) -> Result<v1::Volume, Status> {
    let mut made = make(adapter, source.as_slice(), vec![request]).await?;
    made.pop().ok_or_else(|| Status::internal("pandod answers without saying anything"))
}

async fn create(
    adapter: &Adapter,
    mut requests: Vec<v1::CreateVolumeRequest>,
) -> Result<Vec<v1::Volume>, Status> {
    match requests.pop() {
        Some(only) if requests.is_empty() => Ok(vec![adapter.daemon.create(only).await?]),
        last => {
            requests.extend(last);
            adapter.daemon.create_group(requests).await
        }
    }
}

/// Freezes the first, then the others, then works.
fn all<'a>(adapter: &'a Adapter, devices: &'a [v1::Attachment], work: Work<'a>) -> Work<'a> {
    match devices {
        [] => work,
        [first, rest @ ..] => {
            let inner = all(adapter, rest, work);
            Box::pin(async move { freeze::frozen(adapter, first, inner).await? })
        }
    }
}
