//! L4: the journal: a ring of the pool, mapped into memory. Appending a record is a copy; it
//! survives SIGKILL at once and power loss after the next flush.
//!
//! ```text
//!        tail                durable          head
//!   -----+-------------------+----------------+------------- ring, one lap after another
//!        | needed for replay, flushed | not yet |
//! ```
//! Positions count bytes from the first lap on and never go back. Rules:
//! - a flush and a seal end on a block border, so that no block with flushed records is written
//!   again before a checkpoint has made them needless (I6);
//! - a record lies in one piece: what does not fit before the end of the ring starts the next lap;
//! - the reader looks for a record where the last ended, at the next block border, and, near the
//!   end of the ring, at its start; the first miss is the end of the log.

mod replay;

pub use replay::{LogReader, lost_record};

use crate::disk::RingMemory;
use crate::error::Result;
use crate::format::record::{self, Record, framed_bytes};
use crate::limits::RECORD_BYTES_MAX;
use crate::units::{BLOCK_BYTES, Seqno, to_u64, to_usize};

/// Bytes that are kept resident ahead of the head.
const WINDOW: u64 = 1 << 20;

/// Position in the ring, counted over all laps.
pub type Position = u64;

/// The ring and where it stands.
pub struct Journal {
    memory: Box<dyn RingMemory>,
    ring: u64,
    head: Position,
    tail: Position,
    prepared: Position,
    salt: u32,
    scratch: Vec<u8>,
    appended_bytes: u64,
}

impl Journal {
    /// A journal whose next record goes to `head` (a block border), with nothing before it needed.
    ///
    /// # Errors
    /// The first window cannot be made resident.
    pub fn new(memory: Box<dyn RingMemory>, head: Position, salt: u32) -> Result<Self> {
        let ring = to_u64(memory.len_bytes());
        assert!(head.is_multiple_of(BLOCK_BYTES) && ring.is_multiple_of(BLOCK_BYTES));
        let mut journal = Self {
            memory,
            ring,
            head,
            tail: head,
            prepared: head,
            salt,
            scratch: Vec::new(),
            appended_bytes: 0,
        };
        journal.prepare_window()?;
        Ok(journal)
    }

    /// Bytes of the ring.
    #[must_use]
    pub const fn ring_bytes(&self) -> u64 {
        self.ring
    }

    /// Bytes that a checkpoint would make needless.
    #[must_use]
    pub const fn used_bytes(&self) -> u64 {
        self.head - self.tail
    }

    /// Bytes appended since the pool was opened, padding included.
    #[must_use]
    pub const fn appended_bytes(&self) -> u64 {
        self.appended_bytes
    }

    /// Salt of the records.
    #[must_use]
    pub const fn salt(&self) -> u32 {
        self.salt
    }

    /// Records carry `salt` from now on: the end of a recovery.
    pub fn set_salt(&mut self, salt: u32) {
        self.salt = salt;
    }

    /// Whether a record with a payload of `payload` bytes fits into an empty ring.
    #[must_use]
    pub fn can_ever_hold(&self, payload: usize) -> bool {
        payload <= RECORD_BYTES_MAX
            && 2 * to_u64(framed_bytes(payload)) + 3 * BLOCK_BYTES <= self.ring
    }

    /// Whether a record with a payload of `payload` bytes surely fits, with the padding that a
    /// flush and a seal may add and the gap at the end of the ring.
    #[must_use]
    pub fn has_room(&self, payload: usize) -> bool {
        let need = to_u64(framed_bytes(payload.min(RECORD_BYTES_MAX)));
        let lap_end = self.lap_end() - self.head;
        let gap = if lap_end < need { lap_end } else { 0 };
        self.used_bytes() + gap + need + 3 * BLOCK_BYTES <= self.ring
    }

    /// Copies a record to the head. The caller has asked [`Journal::has_room`] for an upper bound
    /// of its payload, in the same critical section.
    ///
    /// # Errors
    /// A record that is too long, or the kernel's refusal to make the next window resident.
    pub fn append(&mut self, seqno: Seqno, durable: Seqno, record: &Record) -> Result<()> {
        let mut scratch = std::mem::take(&mut self.scratch);
        record::encode(record, seqno, durable, self.salt, &mut scratch)?;
        let len = to_u64(scratch.len());
        if self.lap_end() - self.head < len {
            self.advance(self.lap_end());
        }
        assert!(self.used_bytes() + len <= self.ring, "the journal never overtakes its tail (I6)");
        let end = self.head + len;
        if end > self.prepared {
            self.prepare_window()?;
        }
        self.memory.store(to_usize(self.head % self.ring), &scratch);
        self.advance(end);
        self.scratch = scratch;
        Ok(())
    }

    /// Ends the current block: the next record starts on a new one. Returns where.
    pub fn pad(&mut self) -> Position {
        self.advance(self.head.next_multiple_of(BLOCK_BYTES));
        self.head
    }

    /// A checkpoint that holds everything before `tail` is durable.
    pub fn release(&mut self, tail: Position) {
        assert!(self.tail <= tail && tail <= self.head, "the tail moves forward within the log");
        self.tail = tail;
    }

    /// Byte offset in the ring of a position.
    #[must_use]
    pub const fn offset(&self, position: Position) -> u64 {
        position % self.ring
    }

    fn lap_end(&self) -> Position {
        (self.head / self.ring + 1) * self.ring
    }

    fn advance(&mut self, to: Position) {
        self.appended_bytes += to - self.head;
        self.head = to;
    }

    /// Makes the bytes ahead of the head resident, so that no copy there can fault.
    fn prepare_window(&mut self) -> Result<()> {
        let start = self.head / BLOCK_BYTES * BLOCK_BYTES;
        let longest = to_u64(framed_bytes(RECORD_BYTES_MAX)).next_multiple_of(BLOCK_BYTES);
        let len = WINDOW.max(2 * longest).min(self.ring).min(self.lap_end() - start);
        self.memory.prepare(to_usize(start % self.ring), to_usize(len))?;
        self.prepared = start + len;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::executor::Executor;
    use crate::disk::mem::MemDisk;
    use crate::disk::park::ThreadDriver;
    use crate::format::geometry::Geometry;
    use crate::format::superblock::Superblock;
    use crate::units::{BLOCK_SIZE, BlockNo, Generation, VolumeId};

    /// Writes and reads back laps of a ring of `blocks`, in which `fill` says how likely it is that
    /// a lap ends early.
    fn laps(blocks: u64, rounds: u64, room: usize, fill: u64) {
        let memory = MemDisk::new((blocks + 1000) * BLOCK_BYTES);
        let geometry = Geometry::new(blocks + 1000, blocks, 1).unwrap();
        let place = geometry.journal_start().byte_offset();
        let ring = memory.map_ring(place, to_usize(blocks * BLOCK_BYTES)).unwrap();
        let mut journal = Journal::new(ring, 0, 7).unwrap();
        let mut superblock = Superblock {
            uuid: [0; 16],
            geometry,
            generation: Generation::new(1),
            catalogue: BlockNo::new(0),
            catalogue_bytes: 0,
            journal_offset: 0,
            seal: Seqno::new(0),
            salt: 7,
            clean: false,
        };
        let mut next = Seqno::new(1);
        let mut random = 12345u64;
        let disk = memory.disk();
        for round in 0..rounds {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(round);
            let record = Record::Delete(VolumeId::new(random));
            while journal.has_room(room) && !(random >> 33).is_multiple_of(fill) {
                journal.append(next, Seqno::new(0), &record).unwrap();
                next = next.next();
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                if (random >> 40).is_multiple_of(3) {
                    journal.pad();
                }
            }
            Executor::new(ThreadDriver::new()).block_on(async {
                let mut log = LogReader::behind(&disk, &superblock);
                let mut seen = superblock.seal;
                while let Some(framed) = log.next().await.unwrap() {
                    seen = seen.next();
                    assert_eq!(framed.seqno, seen);
                }
                assert_eq!(seen.next(), next, "every record is read back, and no stale one");
                let lost = lost_record(&disk, &superblock, next).await.unwrap();
                assert_eq!(lost, None);
            });
            let tail = journal.pad();
            journal.release(tail);
            superblock.journal_offset = journal.offset(tail);
            superblock.seal = Seqno::new(next.get() - 1);
        }
        assert!(journal.appended_bytes() > 3 * blocks * BLOCK_BYTES, "several laps");
    }

    #[test]
    fn laps_and_paddings_are_read_back() {
        laps(8, 200, 4000, 13);
    }

    #[test]
    fn a_ring_of_several_windows_is_read_back() {
        laps(900, 16, RECORD_BYTES_MAX, 300_000);
    }

    #[test]
    fn a_lost_record_is_found_wherever_the_next_ones_lie() {
        let geometry = Geometry::new(2000, 600, 1).unwrap();
        let place = geometry.journal_start().byte_offset();
        let salt = 7;
        let superblock = Superblock {
            uuid: [0; 16],
            geometry,
            generation: Generation::new(1),
            catalogue: BlockNo::new(0),
            catalogue_bytes: 0,
            journal_offset: 0,
            seal: Seqno::new(0),
            salt,
            clean: false,
        };
        // At the ends of windows, and of the ring.
        for at in [
            8,
            (1 << 20) - 40,
            (1 << 20) - 8,
            1 << 20,
            (2 << 20) - 4096 - 48,
            600 * BLOCK_SIZE - 48,
        ] {
            let memory = MemDisk::new(2000 * BLOCK_BYTES);
            let mut ring = memory.map_ring(place, 600 * BLOCK_SIZE).unwrap();
            let mut bytes = Vec::new();
            let record = Record::Delete(VolumeId::new(1));
            record::encode(&record, Seqno::new(9), Seqno::new(3), salt, &mut bytes).unwrap();
            ring.store(at, &bytes);
            Executor::new(ThreadDriver::new()).block_on(async {
                for (next, found) in [(3, Some(Seqno::new(9))), (4, None)] {
                    let next = Seqno::new(next);
                    let lost = lost_record(&memory.disk(), &superblock, next).await.unwrap();
                    assert_eq!(lost, found, "at {at}");
                }
            });
        }
    }
}
