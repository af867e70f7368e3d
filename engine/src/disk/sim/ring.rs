//! The memory of the journal beside a simulated disk: it survives a kill of the process, but no
//! power failure.

use std::sync::Arc;

use zerocopy::IntoBytes;

use super::driver::State;
use super::image::sum_of as sum_of_bytes;
use crate::disk::{HeapRing, RingMark, RingMemory};
use crate::runtime::sync::Mutex;

/// The memory. It is part of the state of the disk.
pub(super) struct SimRing(pub(super) Arc<Mutex<State>>);

impl RingMemory for SimRing {
    fn len_bytes(&self) -> usize {
        self.0.lock().ring.len_bytes()
    }

    fn store(&mut self, offset: usize, bytes: &[u8]) {
        let mut state = self.0.lock();
        if !state.halted {
            state.ring.store(offset, bytes);
        }
    }

    fn load(&self, offset: usize, out: &mut [u8]) {
        self.0.lock().ring.load(offset, out);
    }

    fn mark(&self) -> RingMark {
        self.0.lock().ring.mark()
    }

    fn set_mark(&mut self, mark: &RingMark) {
        let mut state = self.0.lock();
        if !state.halted {
            state.ring.set_mark(mark);
        }
    }
}

/// A hash of a memory's content.
pub(super) fn sum_of(ring: &HeapRing) -> u64 {
    let mut bytes = vec![0; ring.len_bytes()];
    ring.load(0, &mut bytes);
    let mark = ring.mark();
    bytes.extend_from_slice(mark.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    sum_of_bytes(&bytes)
}
