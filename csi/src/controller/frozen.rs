//! Clones and snapshots of mounted volumes. Copies are crash-consistent by themselves; they are
//! clean if the file systems are frozen while the copies are created.
//!
//! ```text
//!  freeze -- copy, labelled "unproven" -- thaw -- was it frozen all the time? -- label off
//! ```
//!
//! The caller has got no answer about a copy with that label. If adapter or daemon are killed in
//! between, the repeated call deletes the copy and creates another.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};

use pando_proto::v1;
use pando_proto::v1::volume_ref::By;
use tonic::Status;

use crate::adapter::Adapter;
use crate::daemon::{by_name, by_number, present};
use crate::labels;
use crate::locks::Locked;
use crate::node::{freeze, set_label};

/// The future that creates the copies.
type Work<'a> = Pin<Box<dyn Future<Output = Result<Vec<v1::Volume>, Status>> + Send + 'a>>;

/// Whether the file system of a volume must be frozen while the volume is copied.
pub(crate) fn is_wanted(volume: &v1::Volume) -> bool {
    volume.labels.get(labels::FREEZE).is_some_and(|value| value == labels::TRUE)
}

/// Whether a copy must be clean, but has not been proven to be.
pub(crate) fn is_unproven(copy: &v1::Volume) -> bool {
    copy.labels.get(labels::UNPROVEN).is_some_and(|value| value == labels::TRUE)
}

/// The volume or snapshot with this name that an earlier call created. An unproven one is deleted,
/// and `None` is returned.
pub(crate) async fn created_before(
    adapter: &Adapter,
    name: &str,
) -> Result<Option<v1::Volume>, Status> {
    match adapter.daemon.find(by_name(name)).await? {
        Some((copy, _)) if is_unproven(&copy) => {
            tracing::warn!(copy = copy.name, "deleting a copy that may not be clean");
            adapter.daemon.delete(copy.id).await?;
            Ok(None)
        }
        found => Ok(found.map(|(copy, _)| copy)),
    }
}

/// Creates volumes or snapshots at one instant, while the file systems that are mounted from
/// `sources` are frozen. If one of them did not stay frozen, the copies are deleted.
///
/// # Errors
/// Errors of the daemon; a file system cannot be frozen; ABORTED: a source is being staged.
pub(crate) async fn create(
    adapter: &Adapter,
    sources: &[u64],
    mut requests: Vec<v1::CreateVolumeRequest>,
) -> Result<Vec<v1::Volume>, Status> {
    let mut held = BTreeMap::new();
    let mut devices = Vec::new();
    for source in sources {
        let Some((_, Some(_))) = adapter.daemon.find(by_number(*source)).await? else { continue };
        // Under the lock no other call mounts or unmounts it.
        held.insert(*source, adapter.lock_volume(*source)?);
        let found = adapter.daemon.find(by_number(*source)).await?;
        devices.extend(found.and_then(|(_, device)| device));
    }
    mark_unformatted(adapter, &mut requests, &mut held).await?;
    if devices.is_empty() {
        return send(adapter, requests).await;
    }
    for request in &mut requests {
        request.labels.insert(labels::UNPROVEN.to_owned(), labels::TRUE.to_owned());
        // An existing one was created at another time, when nothing was frozen.
        request.must_be_new = true;
    }
    let names: Vec<_> = requests.iter().map(|request| request.name.clone()).collect();
    let refused = AtomicBool::new(false);
    let work = async {
        let created = send(adapter, requests).await;
        refused.store(created.is_err(), Ordering::Relaxed);
        created
    };
    let created = while_all_frozen(adapter, &devices, Box::pin(work)).await;
    match &created {
        Ok(copies) => {
            for copy in copies {
                set_label(adapter, copy.id, labels::UNPROVEN, "").await?;
            }
        }
        // The daemon created nothing; objects of these names are not of this call.
        Err(_) if refused.load(Ordering::Relaxed) => {}
        Err(_) => {
            for name in names {
                created_before(adapter, &name).await?;
            }
        }
    }
    created
}

/// Locks sources that the node may be about to format, because a copy of a partly formatted volume
/// could neither be mounted nor formatted. An interrupted format leaves a label, which the copies
/// get as well.
///
/// # Errors
/// ABORTED: a source is being staged; errors of the daemon.
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
        let may_be_formatted = found.as_ref().is_some_and(|(volume, _)| {
            !volume.snapshot && !raw(volume) && (volume.mapped_bytes == 0 || formatting(volume))
        });
        if may_be_formatted {
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

/// [`create`] for one volume or snapshot.
///
/// # Errors
/// As [`create`].
pub(crate) async fn create_one(
    adapter: &Adapter,
    source: Option<u64>,
    request: v1::CreateVolumeRequest,
) -> Result<v1::Volume, Status> {
    present(create(adapter, source.as_slice(), vec![request]).await?.pop())
}

async fn send(
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

/// Freezes the file systems one after another, then does the work.
fn while_all_frozen<'a>(
    adapter: &'a Adapter,
    devices: &'a [v1::Attachment],
    work: Work<'a>,
) -> Work<'a> {
    match devices {
        [] => work,
        [first, rest @ ..] => {
            let inner = while_all_frozen(adapter, rest, work);
            Box::pin(async move { freeze::frozen(adapter, first, inner).await? })
        }
    }
}
