//! What a simulated disk, its cache and the journal's memory hold at one instant, and so all that a
//! power failure or a kill at that instant can leave.

use super::SimImage;
use super::cut::{self, CutPlan, Grain, Piece};
use super::image::Image;
use crate::disk::HeapRing;

/// An instant of a disk. Cheap to keep: blocks are shared.
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
    /// Events before it: a run whose power fails at the event of this number
    /// ([`super::SimDisk::set_cut_at`]) ends with this disk.
    #[must_use]
    pub const fn events(&self) -> u64 {
        self.events
    }

    /// Whether a sync has failed, so that a kill loses what it was to cover, or not.
    #[must_use]
    pub const fn flush_failed(&self) -> bool {
        self.flush_failed
    }

    /// Things that no sync has covered: the range of the numbers in a [`CutPlan`].
    #[must_use]
    pub fn pending(&self, grain: Grain) -> usize {
        cut::count(&self.pieces, grain)
    }

    /// What the disk holds if the power fails now and `plan` says what has landed.
    #[must_use]
    pub fn after_cut(&self, plan: CutPlan) -> SimImage {
        cut::apply(&self.durable, &self.pieces, self.len_blocks, plan).into()
    }

    /// What the disk holds if the process is killed now: nothing that completed or was stored is
    /// lost, nor is it durable; whether writes under way land comes from `seed`.
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
