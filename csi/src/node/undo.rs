//! What a call did on the node, so that a call that fails leaves nothing behind.
//!
//! kubelet takes FAILED_PRECONDITION, INVALID_ARGUMENT, INTERNAL and most other codes for "nothing
//! was done" and never unstages such a volume: a device that stays attached keeps the volume from
//! being deleted. After UNAVAILABLE it does unstage, so that is the answer where undoing fails.

use std::time::Duration;

use tonic::{Code, Status};

use crate::adapter::Adapter;

use super::blocking;
use super::mount::{self, Unmount};
use super::paths::Place;

/// Turns at undoing one step: the machine looks into new devices and mounts by itself (udev), and
/// they are busy for a moment.
const TURNS: u32 = 20;
/// Pause between turns.
const PAUSE: Duration = Duration::from_millis(100);

/// What one call to stage a volume has done, and others have not.
pub(crate) struct Undo<'a> {
    adapter: &'a Adapter,
    volume: u64,
    attached: bool,
    mounted: Option<Place>,
}

impl<'a> Undo<'a> {
    /// Nothing yet.
    pub(crate) const fn new(adapter: &'a Adapter, volume: u64) -> Self {
        Self { adapter, volume, attached: false, mounted: None }
    }

    /// The volume becomes a device. Noted before that is tried: a call that fails may have done it.
    pub(crate) const fn attached(&mut self) {
        self.attached = true;
    }

    /// The volume is mounted there.
    pub(crate) fn mounted(&mut self, place: Place) {
        self.mounted = Some(place);
    }

    /// Takes it all back, the last step first. Returns `why` the call fails, or `UNAVAILABLE` if
    /// something stays.
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
            "a failed call leaves something"
        );
        let (why, left) = (why.message(), left.message());
        Status::unavailable(format!("{why}; what was done until then stays for now: {left}"))
    }
}

async fn unmount(place: Place) -> Result<(), Status> {
    let mut place = place;
    for _ in 1..TURNS {
        let (back, done) = blocking(move || {
            let done = mount::unmount(&place, Unmount::Whole);
            Ok((place, done))
        })
        .await?;
        match done {
            Err(busy) if busy.code() == Code::FailedPrecondition => place = back,
            done => return done,
        }
        tokio::time::sleep(PAUSE).await;
    }
    blocking(move || mount::unmount(&place, Unmount::Whole)).await
}

async fn detach(adapter: &Adapter, volume: u64) -> Result<(), Status> {
    for _ in 1..TURNS {
        match adapter.daemon.detach(volume).await {
            Err(busy) if busy.code() == Code::FailedPrecondition => {}
            done => return done,
        }
        tokio::time::sleep(PAUSE).await;
    }
    adapter.daemon.detach(volume).await
}
