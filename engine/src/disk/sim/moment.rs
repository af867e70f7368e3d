//! The state of a simulated disk, its cache and the journal's memory at one instant: all that a
//! power failure or a kill at that instant can leave.

use super::SimImage;
use super::cut::{self, CutPlan, Grain, Piece};
use super::image::Image;
use crate::disk::HeapRing;

/// The state of a disk at one instant. Cheap to keep, because blocks are shared.
#[derive(Clone)]
pub struct Moment {
    pub(super) events: u64,
    pub(super) durable: Image,
    pub(super) pieces: Vec<Piece>,
    pub(super) len_blocks: u64,
    pub(super) ring: HeapRing,
    pub(super) flush_failed: bool,
}

impl Moment {
    /// Number of events before this instant: a run whose power fails at the event with this number
    /// ([`super::SimDisk::set_cut_at`]) ends with this disk.
    #[must_use]
    pub const fn events(&self) -> u64 {
        self.events
    }

    /// Whether a sync has failed, so that a kill may lose the writes that it covered.
    #[must_use]
    pub const fn flush_failed(&self) -> bool {
        self.flush_failed
    }

    /// Number of units that no sync has covered: the range of the numbers in a [`CutPlan`].
    #[must_use]
    pub fn pending(&self, grain: Grain) -> usize {
        cut::count(&self.pieces, grain)
    }

    /// The content of the disk if the power fails now and `plan` decides what has landed.
    #[must_use]
    pub fn after_cut(&self, plan: CutPlan) -> SimImage {
        cut::apply(&self.durable, &self.pieces, self.len_blocks, plan).into()
    }

    /// The content of the disk if the process is killed now: completed writes and stores are kept,
    /// but they are not durable. `seed` decides whether writes in flight land.
    #[must_use]
    pub fn after_kill(&self, seed: u64) -> SimImage {
        SimImage {
            durable: self.durable.clone(),
            pieces: cut::after_kill(&self.pieces, seed),
            len_blocks: self.len_blocks,
            ring: self.ring.clone(),
        }
    }
}
