//! What every handle of a volume reads without the state lock: its size, whether it refuses writes,
//! whether it was deleted, and its I/O limits. [`Inner::try_record`] updates the first three in the
//! critical section that applies the change, so a handle never reads them from before a change that
//! was acknowledged.

use std::sync::Arc;

use super::throttle::Throttle;
use crate::error::Result;
use crate::pool::control::volumes::no_volume;
use crate::pool::core::{Inner, Pool};
use crate::runtime::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::state::Volume;
use crate::units::VolumeId;

/// The facts about one volume that all its handles share.
#[derive(Default)]
pub(crate) struct LiveVolume {
    size_bytes: AtomicU64,
    refuses_writes: AtomicBool,
    deleted: AtomicBool,
    pub(crate) throttle: Throttle,
}

impl LiveVolume {
    /// Size in bytes; the last one after the volume was deleted.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Whether the volume is a snapshot or read-only.
    pub(crate) fn refuses_writes(&self) -> bool {
        self.refuses_writes.load(Ordering::Acquire)
    }

    /// Whether the volume was deleted.
    pub(crate) fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Acquire)
    }

    fn update(&self, volume: Option<&Volume>) {
        let Some(volume) = volume else { return self.deleted.store(true, Ordering::Release) };
        self.size_bytes.store(volume.entry.size_bytes, Ordering::Release);
        self.refuses_writes.store(volume.refuses_writes(), Ordering::Release);
    }
}

impl Inner {
    /// The volume was changed or deleted; its handles see that from now on.
    pub(crate) fn update_live(&self, id: VolumeId) {
        if let Some(live) = self.live.get(&id) {
            live.update(self.state.volume(id));
        }
    }
}

impl Pool {
    /// What all handles of a volume share.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn live(&self, id: VolumeId) -> Result<Arc<LiveVolume>> {
        let mut inner = self.core.lock();
        let inner = &mut *inner;
        let volume = inner.state.volume(id).ok_or_else(|| no_volume(id))?;
        let live = inner.live.entry(id).or_insert_with(|| {
            let live = LiveVolume::default();
            live.throttle.set(self.disk().now(), volume.entry.io_limits);
            live.update(Some(volume));
            Arc::new(live)
        });
        Ok(Arc::clone(live))
    }

    /// The I/O limits of a volume may have changed. If it was deleted, no request waits for them.
    pub(in crate::pool) fn update_throttle(&self, id: VolumeId) {
        let mut inner = self.core.lock();
        let limits = inner.state.volume(id).map(|volume| volume.entry.io_limits);
        let live = match limits {
            Some(_) => inner.live.get(&id).map(Arc::clone),
            None => inner.live.remove(&id),
        };
        // Under the lock: of two changes the later one stays.
        if let Some(live) = live {
            live.throttle.set(self.disk().now(), limits.unwrap_or_default());
        }
    }
}
