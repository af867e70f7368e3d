//! Reading the log of a ring with ordinary I/O, which can report an error.

use std::rc::Rc;

use crate::disk::{Buf, Disk};
use crate::error::Result;
use crate::format::geometry::Geometry;
use crate::format::record::{self, Framed, framed_bytes};
use crate::limits::RECORD_BYTES_MAX;
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, Seqno, to_u64, to_usize};

/// Blocks read at once.
const READ_BLOCKS: u64 = 256;

/// The records of a ring, one by one, until the first that is not there.
pub struct ReplayLog<'a> {
    ring: &'a [u8],
    at: usize,
    read: usize,
    next: Seqno,
    salt: u32,
}

impl<'a> ReplayLog<'a> {
    /// Reads the bytes of a ring from byte `start` on, where record `first` is expected.
    #[must_use]
    pub fn new(ring: &'a [u8], start: u64, first: Seqno, salt: u32) -> Self {
        Self { ring, at: to_usize(start), read: 0, next: first, salt }
    }

    /// Byte offset behind the last record that was read.
    #[must_use]
    pub const fn end(&self) -> usize {
        self.at
    }
}

impl Iterator for ReplayLog<'_> {
    type Item = Framed;

    fn next(&mut self) -> Option<Framed> {
        let border = self.at.next_multiple_of(BLOCK_SIZE);
        let lap_end = self.ring.len() - self.at;
        let wraps = lap_end < framed_bytes(RECORD_BYTES_MAX) + BLOCK_SIZE;
        let places = [Some(self.at), Some(border), wraps.then_some(self.ring.len())];
        for place in places.into_iter().flatten() {
            let skipped = place - self.at;
            let place = place % self.ring.len();
            let Some(framed) = record::decode(&self.ring[place..], self.next, self.salt) else {
                continue;
            };
            self.read += skipped + framed.bytes;
            if self.read > self.ring.len() {
                return None;
            }
            self.at = (place + framed.bytes) % self.ring.len();
            self.next = self.next.next();
            return Some(framed);
        }
        None
    }
}

/// Whether the log ends too early at `next`: a record further on says that it was durable. The
/// number of that record. A power failure never makes this; damage to a flushed record does.
#[must_use]
pub fn lost_record(ring: &[u8], next: Seqno, salt: u32) -> Option<Seqno> {
    let later = |at: usize| {
        let seqno = record::seqno_at(&ring[at..], salt)?;
        let framed = (seqno > next).then(|| record::decode(&ring[at..], seqno, salt))??;
        (framed.durable >= next).then_some(seqno)
    };
    (0..ring.len()).step_by(record::ALIGN).find_map(later)
}

/// Reads the whole ring.
///
/// # Errors
/// The device's.
pub async fn read_log(disk: &Rc<dyn Disk>, geometry: &Geometry) -> Result<Vec<u8>> {
    let mut ring = Vec::with_capacity(to_usize(geometry.journal_blocks * BLOCK_BYTES));
    let mut done = 0;
    while done < geometry.journal_blocks {
        let count = READ_BLOCKS.min(geometry.journal_blocks - done);
        let buf = Buf::new(to_usize(count));
        let (buf, result) = disk.read(geometry.journal_start().plus(done), buf).await;
        result.map_err(|e| e.context("journal"))?;
        ring.extend_from_slice(buf.as_bytes());
        done += count;
    }
    debug_assert_eq!(to_u64(ring.len()), geometry.journal_blocks * BLOCK_BYTES);
    Ok(ring)
}
