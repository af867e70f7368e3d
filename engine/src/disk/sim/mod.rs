//! A simulated disk with a volatile cache, and the journal's memory, for tests. Everything runs in
//! one thread, reproducibly from a seed; or in several threads, of which one does the I/O
//! ([`SimDisk::serve`]).
//!
//! ```text
//!   Disk::write --> in flight --(driver: one at random)--> completed --(awaited)--> delivered
//!                                                                         Disk::sync   v
//!                                                                                   durable
//! ```
//! * I/O completes when the executor has no ready task, one operation at a time, in an order that
//!   the seed chooses. Time passes then, and otherwise only when every task waits for it.
//! * A sync makes durable what was *delivered* before it was requested, and no more.
//! * The power fails at a given event ([`SimDisk::set_cut_at`]). The run then ends at once, and
//!   [`SimDisk::image_after_cut`] creates any number of possible disk contents, by [`CutPlan`]: a
//!   write that is not durable may have landed, in whole or in part, or not.
//! * A killed process ([`SimDisk::image_after_kill`]) leaves completed I/O and the memory of the
//!   journal.
//!
//! The order of events depends only on the seed and the code under test.

mod cut;
mod driver;
mod fault;
pub mod gate;
mod handle;
mod image;
mod moment;
mod ring;
mod rng;
mod served;
#[cfg(test)]
mod tests;
mod timer;

use std::rc::Rc;
use std::sync::Arc;

use crate::disk::{Disk, HeapRing, RingMemory};
use crate::error::Result;
use crate::runtime::executor::Executor;
use crate::runtime::sync::Mutex;
use crate::units::to_u64;

use cut::{Piece, Stage};
use driver::State;
use handle::Handle;

pub use cut::{CutPlan, Grain};
pub use driver::SimDriver;
pub use fault::{Effect, Fault, FaultOp, Strike};
pub use image::Image;
pub use moment::Moment;
pub use rng::Rng;

/// Options of a simulated disk.
#[derive(Clone, Copy, Debug)]
pub struct SimOptions {
    /// Whether I/O completes in random order; otherwise in the order of the requests.
    pub reorder: bool,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self { reorder: true }
    }
}

/// The state of a disk between two processes.
#[derive(Clone)]
pub struct SimImage {
    durable: Image,
    /// Writes in the device or the page cache that are not durable: after a kill, not after a cut.
    pieces: Vec<Piece>,
    len_blocks: u64,
    /// The memory of the journal, after a kill.
    ring: HeapRing,
}

impl SimImage {
    /// The durable blocks.
    #[must_use]
    pub const fn blocks(&self) -> &Image {
        &self.durable
    }

    /// The durable blocks, to be damaged by a test.
    #[must_use]
    pub const fn blocks_mut(&mut self) -> &mut Image {
        &mut self.durable
    }

    /// Without the memory of the journal, as if the killed process had kept it in ordinary memory.
    #[must_use]
    pub fn without_memory(self) -> Self {
        Self { ring: HeapRing::new(0), ..self }
    }

    /// A hash of all that the next process finds; see [`Image::sum`].
    #[must_use]
    pub fn sum(&self) -> u64 {
        if self.pieces.is_empty() && self.ring.len_bytes() == 0 {
            return self.durable.sum();
        }
        let seen = cut::seen(&self.durable, &self.pieces, self.len_blocks);
        seen.sum() ^ ring::sum_of(&self.ring)
    }

    fn into_parts(mut self) -> (Image, Image, Vec<Piece>, HeapRing) {
        let current = cut::seen(&self.durable, &self.pieces, self.len_blocks);
        self.pieces.retain(|piece| piece.stage != Stage::InFlight);
        (self.durable, current, self.pieces, self.ring)
    }
}

impl From<Image> for SimImage {
    fn from(durable: Image) -> Self {
        let ring = HeapRing::new(0);
        Self { len_blocks: durable.len_blocks(), durable, pieces: Vec::new(), ring }
    }
}

/// A simulated disk. Cheap to clone; all clones share one disk.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

impl SimDisk {
    /// An empty disk of `len_blocks` blocks.
    #[must_use]
    pub fn new(seed: u64, len_blocks: u64, options: SimOptions) -> Self {
        Self::from_image(Image::new(len_blocks).into(), seed, options)
    }

    /// A disk with this content, as a new process finds it.
    #[must_use]
    pub fn from_image(image: SimImage, seed: u64, options: SimOptions) -> Self {
        let state = State::new(image, Rng::new(seed), options);
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// A handle for the code under test.
    #[must_use]
    pub fn disk(&self) -> Rc<dyn Disk> {
        Rc::new(Handle::new(Arc::clone(&self.state)))
    }

    /// The memory of the journal, as [`super::PoolFile::map_ring`].
    ///
    /// # Errors
    /// Never.
    pub fn map_ring(&self, len: usize) -> Result<Box<dyn RingMemory>> {
        let mut state = self.state.lock();
        if state.ring.len_bytes() == 0 {
            state.ring = HeapRing::new(len);
        }
        Ok(Box::new(ring::SimRing(Arc::clone(&self.state))))
    }

    /// A driver for an executor: delivers one completion whenever no task is ready.
    #[must_use]
    pub fn driver(&self) -> SimDriver {
        SimDriver::new(Arc::clone(&self.state))
    }

    /// Runs `future` on an executor of its own; `None` if the power failed before it was done.
    /// Tasks that are not done by then are dropped, because the process is dead.
    ///
    /// # Panics
    /// If every task waits and no I/O is under way: a deadlock.
    pub fn run<F: Future>(&self, future: F) -> Option<F::Output> {
        Executor::new(self.driver()).run(future)
    }

    /// Number of events so far: writes, discards and syncs, both requested and completed.
    #[must_use]
    pub fn io_count(&self) -> u64 {
        self.state.lock().events
    }

    /// Makes the power fail just before event `number` (the first is 0).
    pub fn set_cut_at(&self, number: u64) {
        self.state.lock().cut_at = Some(number);
    }

    /// Whether the power has failed. Acknowledgements after that do not count.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.state.lock().halted
    }

    /// The state of the disk at this instant.
    #[must_use]
    pub fn moment(&self) -> Moment {
        let state = self.state.lock();
        Moment {
            events: state.events,
            durable: state.durable.clone(),
            pieces: state.pieces.clone(),
            len_blocks: state.current.len_blocks(),
            ring: state.ring.clone(),
            flush_failed: state.flush_failed,
        }
    }

    /// As [`Moment::pending`].
    #[must_use]
    pub fn pending(&self, grain: Grain) -> usize {
        cut::count(&self.state.lock().pieces, grain)
    }

    /// As [`Moment::after_cut`]. Can be called repeatedly, before or after the power failure.
    #[must_use]
    pub fn image_after_cut(&self, plan: CutPlan) -> SimImage {
        self.moment().after_cut(plan)
    }

    /// As [`Moment::after_kill`].
    #[must_use]
    pub fn image_after_kill(&self, seed: u64) -> SimImage {
        self.moment().after_kill(seed)
    }

    /// Injects a fault. If several match an operation, the first one applies.
    pub fn inject(&self, fault: Fault) {
        self.state.lock().faults.add(fault);
    }

    /// Number of faults that have struck, so that a test can check that its fault did.
    #[must_use]
    pub fn faults_struck(&self) -> u64 {
        to_u64(self.state.lock().faults.strikes.len())
    }

    /// The faults that have struck so far, in order.
    #[must_use]
    pub fn strikes(&self) -> Vec<Strike> {
        self.state.lock().faults.strikes.clone()
    }

    /// Whether a run has ended because every task waits for I/O that never completes.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.state.lock().stuck
    }

    /// Number of operations of this kind requested so far.
    #[must_use]
    pub fn asked(&self, op: FaultOp) -> u64 {
        self.state.lock().asked.get(&op).copied().unwrap_or_default()
    }

    /// A hash of every event and its data: equal for equal runs.
    #[must_use]
    pub fn trace(&self) -> u64 {
        self.state.lock().trace
    }
}
