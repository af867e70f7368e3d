//! The journal's ring on a simulated disk: stores are seen by readers at once and are durable
//! after a sync that was asked for later.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use super::driver::State;
use crate::disk::RingMemory;
use crate::error::Result;
use crate::units::{BLOCK_SIZE, to_u64};

/// The ring. Its state is the disk's.
pub(super) struct SimRing {
    state: Arc<Mutex<State>>,
    first_block: u64,
    len: usize,
    window: Range<usize>,
}

impl SimRing {
    pub(super) fn new(state: Arc<Mutex<State>>, offset: u64, len: usize) -> Self {
        Self { state, first_block: offset / to_u64(BLOCK_SIZE), len, window: 0..0 }
    }
}

impl RingMemory for SimRing {
    fn len_bytes(&self) -> usize {
        self.len
    }

    fn store(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        assert!(
            self.window.start <= offset && end <= self.window.end,
            "store to {offset}..{end} is outside of the prepared window {:?}",
            self.window
        );
        let mut state = self.state.lock();
        let write = state.new_write();
        let mut at = offset;
        while at < end {
            let from = at % BLOCK_SIZE;
            let to = BLOCK_SIZE.min(from + end - at);
            let block = self.first_block + to_u64(at / BLOCK_SIZE);
            state.store(write, block, from, &bytes[at - offset..at - offset + to - from]);
            at += to - from;
        }
    }

    fn prepare(&mut self, offset: usize, len: usize) -> Result<()> {
        assert!(offset + len <= self.len, "a window is inside the ring");
        self.window = offset..offset + len;
        Ok(())
    }
}
