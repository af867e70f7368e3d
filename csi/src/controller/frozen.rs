//! Copies of what is mounted: crash-consistent by themselves, clean if the file systems are frozen
//! while the copies are made.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};

use pando_proto::v1;
use tonic::Status;

use crate::adapter::Adapter;
use crate::daemon::by_name;
use crate::labels;
use crate::node::freeze;

/// What makes the copies.
type Work<'a, T> = Pin<Box<dyn Future<Output = Result<T, Status>> + Send + 'a>>;

/// Whether a volume was made to be frozen while it is copied.
pub(crate) fn wanted(volume: &v1::Volume) -> bool {
    volume.labels.get(labels::FREEZE).is_some_and(|value| value == labels::TRUE)
}

/// Runs `work`, which makes the volumes or snapshots `names` of the pool, while the file systems
/// on all `devices` are frozen. If one of them did not stay so, what was made is deleted: a
/// repeated call must not find it and take it for clean.
///
/// # Errors
/// What `work` says, or that something cannot be frozen.
pub(crate) async fn make<T: Send>(
    adapter: &Adapter,
    devices: &[v1::Attachment],
    names: &[String],
    work: Work<'_, T>,
) -> Result<T, Status> {
    if devices.is_empty() {
        return work.await;
    }
    let refused = AtomicBool::new(false);
    let work = async {
        let made = work.await;
        refused.store(made.is_err(), Ordering::Relaxed);
        made
    };
    let made = all(adapter, devices, Box::pin(work)).await;
    // What the daemon refused to make was not made; of these names there may be others'.
    if made.is_err() && !refused.load(Ordering::Relaxed) {
        for name in names {
            if let Some((volume, _)) = adapter.daemon.find(by_name(name)).await? {
                adapter.daemon.delete(volume.id).await?;
            }
        }
    }
    made
}

/// Freezes the first, then the others, then works.
fn all<'a, T: Send + 'a>(
    adapter: &'a Adapter,
    devices: &'a [v1::Attachment],
    work: Work<'a, T>,
) -> Work<'a, T> {
    match devices {
        [] => work,
        [first, rest @ ..] => {
            let inner = all(adapter, rest, work);
            Box::pin(async move { freeze::frozen(adapter, first, inner).await? })
        }
    }
}
