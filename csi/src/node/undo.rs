//! Undoes the steps of a failed call, so that it leaves nothing behind on the node.
//!
//! kubelet takes FAILED_PRECONDITION, INVALID_ARGUMENT, INTERNAL and most other codes for "nothing
//! was done" and never unstages such a volume. Then a device that stays attached would keep the
//! volume from being deleted. After UNAVAILABLE kubelet does unstage, so that is the answer if
//! undoing fails.

use std::time::Duration;

use tonic::{Code, Status};

use crate::adapter::Adapter;

use super::blocking;
use super::mount::{self, Unmount};
use super::paths::Place;

/// Attempts to undo a step: udev opens new devices and mounts, so they can be busy for a moment.
const ATTEMPTS: u32 = 20;
/// Pause between attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// The steps that a call to stage a volume has done itself.
pub(crate) struct Undo<'a> {
    adapter: &'a Adapter,
    volume: u64,
    attached: bool,
    mounted: Option<Place>,
}

impl<'a> Undo<'a> {
    /// No steps.
    pub(crate) const fn new(adapter: &'a Adapter, volume: u64) -> Self {
        Self { adapter, volume, attached: false, mounted: None }
    }

    /// Records that the volume is being attached. This is recorded before the attempt, because a
    /// failed attempt may have attached it.
    pub(crate) const fn attached(&mut self) {
        self.attached = true;
    }

    /// Records that the volume was mounted at the place.
    pub(crate) fn mounted(&mut self, place: Place) {
        self.mounted = Some(place);
    }

    /// Undoes the steps, the last one first. Returns `why`, the error of the call, or `UNAVAILABLE`
    /// if a step cannot be undone.
    pub(crate) async fn undo(self, why: Status) -> Status {
        let left = match self.mounted {
            Some(place) => unmount(place).await.err(),
            None => None,
        };
        let left = match left {
            None if self.attached => detach(self.adapter, self.volume).await.err(),
            left => left,
        };
        let Some(left) = left else { return why };
        if why.code() == Code::Unavailable {
            return why;
        }
        tracing::warn!(
            volume = self.volume,
            why = left.message(),
            "cannot undo the steps of a failed call"
        );
        let (why, left) = (why.message(), left.message());
        Status::unavailable(format!("{why}; undoing the call failed: {left}"))
    }
}

async fn unmount(place: Place) -> Result<(), Status> {
    let mut place = place;
    for _ in 1..ATTEMPTS {
        let (back, done) = blocking(move || {
            let done = mount::unmount(&place, Unmount::WhenUnused);
            Ok((place, done))
        })
        .await?;
        match done {
            Err(busy) if busy.code() == Code::FailedPrecondition => place = back,
            done => return done,
        }
        tokio::time::sleep(PAUSE).await;
    }
    blocking(move || mount::unmount(&place, Unmount::WhenUnused)).await
}

async fn detach(adapter: &Adapter, volume: u64) -> Result<(), Status> {
    for _ in 1..ATTEMPTS {
        match adapter.daemon.detach(volume).await {
            Err(busy) if busy.code() == Code::FailedPrecondition => {}
            done => return done,
        }
        tokio::time::sleep(PAUSE).await;
    }
    adapter.daemon.detach(volume).await
}
