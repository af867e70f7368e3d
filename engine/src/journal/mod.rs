//! L4: the journal: a ring of the pool, one lap after another. Appending a record is a copy into
//! memory that outlives the process ([`crate::disk::ring`]); a flush writes what is new there to
//! the ring.
//!
//! ```text
//!        tail                  synced           head
//!   -----+---------------------+----------------+-------------
//!        | in the pool, flushed | in memory only |
//!        |<----- needed for replay ------------>|
//! ```
//! Positions count bytes from the first lap on and never go back. Rules:
//! - a flush and a seal end on a block border, so that no block with flushed records is written
//!   again before a checkpoint has made them needless (I6);
//! - a record lies in one piece: what does not fit before the end of the ring starts the next lap;
//! - the memory's ring is shorter: a record there may lie in two pieces, and what no flush has
//!   written is never overwritten;
//! - the reader looks for a record where the last ended, at the next block border, and, near the
//!   end of the ring, at its start; the first miss is the end of the log.
//!
//! When a process has died, the next one first writes what the memory holds to the ring
//! ([`write_back`]), and reads the log from there.

mod replay;

pub use replay::{LogReader, lost_record, write_back};

use crate::disk::{RingMark, RingMemory};
use crate::error::Result;
use crate::format::record::{self, Record, framed_bytes};
use crate::limits::RECORD_BYTES_MAX;
use crate::runtime::Buf;
use crate::units::{BLOCK_BYTES, Generation, Seqno, to_u64, to_usize};

/// Bytes that a flush copies and writes at once.
const PIECE_BYTES: u64 = 256 << 10;

/// Position in the ring, counted over all laps.
pub type Position = u64;

/// The ring and where it stands.
pub struct Journal {
    memory: Box<dyn RingMemory>,
    ring: u64,
    tail: Position,
    /// What the memory is to say of itself; `synced` and `head` are the log's.
    mark: RingMark,
    salt: u32,
    scratch: Vec<u8>,
    appended_bytes: u64,
}

impl Journal {
    /// A journal of `ring` bytes whose next record goes to `head` (a block border), with nothing
    /// before it needed. What `memory` holds stays until [`Self::begin`].
    #[must_use]
    pub fn new(memory: Box<dyn RingMemory>, ring: u64, head: Position) -> Self {
        let len = to_u64(memory.len_bytes());
        assert!([head, ring, len].iter().all(|at| at.is_multiple_of(BLOCK_BYTES)) && len > 0);
        let mark = RingMark { synced: head, head, ..RingMark::default() };
        let (scratch, appended_bytes) = (Vec::new(), 0);
        Self { memory, ring, tail: head, mark, salt: 0, scratch, appended_bytes }
    }

    /// The end of a recovery, whose checkpoint is durable: records carry `salt` from now on, and
    /// the memory is this pool's.
    pub fn begin(&mut self, pool: [u8; 16], generation: Generation, salt: u32) {
        self.salt = salt;
        self.mark.pool = pool;
        self.mark.salt = salt;
        self.mark.generation = generation.get();
        self.memory.set_mark(&self.mark);
    }

    /// Bytes of the ring.
    #[must_use]
    pub const fn ring_bytes(&self) -> u64 {
        self.ring
    }

    /// Bytes that a checkpoint would make needless.
    #[must_use]
    pub const fn used_bytes(&self) -> u64 {
        self.mark.head - self.tail
    }

    /// Bytes appended since the pool was opened, padding included.
    #[must_use]
    pub const fn appended_bytes(&self) -> u64 {
        self.appended_bytes
    }

    /// Whether a record with a payload of `payload` bytes fits into an empty ring.
    #[must_use]
    pub fn can_ever_hold(&self, payload: usize) -> bool {
        payload <= RECORD_BYTES_MAX
            && 2 * to_u64(framed_bytes(payload)) + 3 * BLOCK_BYTES <= self.ring.min(self.memory())
    }

    /// Whether a record with a payload of `payload` bytes surely fits into the ring, with the
    /// padding that a flush and a seal may add and the gap at the end of the ring. A checkpoint
    /// makes room.
    #[must_use]
    pub fn has_room(&self, payload: usize) -> bool {
        self.used_bytes() + self.needed(payload) <= self.ring
    }

    /// Whether it surely fits into the memory. A flush makes room.
    #[must_use]
    pub fn has_memory(&self, payload: usize) -> bool {
        self.mark.head - self.mark.synced + self.needed(payload) <= self.memory()
    }

    fn needed(&self, payload: usize) -> u64 {
        let need = to_u64(framed_bytes(payload.min(RECORD_BYTES_MAX)));
        let lap_end = self.lap_end() - self.mark.head;
        let gap = if lap_end < need { lap_end } else { 0 };
        gap + need + 3 * BLOCK_BYTES
    }

    /// Copies a record to the head. The caller has asked [`Self::has_room`] and
    /// [`Self::has_memory`] for an upper bound of its payload, in the same critical section.
    ///
    /// # Errors
    /// A record that is too long.
    pub fn append(&mut self, seqno: Seqno, durable: Seqno, record: &Record) -> Result<()> {
        let mut scratch = std::mem::take(&mut self.scratch);
        record::encode(record, seqno, durable, self.salt, &mut scratch)?;
        let len = to_u64(scratch.len());
        if self.lap_end() - self.mark.head < len {
            self.advance(self.lap_end());
        }
        let end = self.mark.head + len;
        assert!(end - self.tail <= self.ring, "the journal never overtakes its tail (I6)");
        let memory = self.memory();
        assert!(end - self.mark.synced <= memory, "the journal keeps what no flush has written");
        let at = self.mark.head % memory;
        let (first, second) = scratch.split_at(to_usize(len.min(memory - at)));
        self.memory.store(to_usize(at), first);
        self.memory.store(0, second);
        self.advance(end);
        self.memory.set_mark(&self.mark);
        self.scratch = scratch;
        Ok(())
    }

    /// Ends the current block: the next record starts on a new one. Returns where.
    pub fn pad(&mut self) -> Position {
        self.advance(self.mark.head.next_multiple_of(BLOCK_BYTES));
        self.mark.head
    }

    /// Up to where the log is durable in the pool.
    #[must_use]
    pub const fn synced(&self) -> Position {
        self.mark.synced
    }

    /// A copy of the first blocks of the log from `from` on, as many as one write takes, none of
    /// them behind `to` (both are block borders), and the block of the ring where they belong.
    #[must_use]
    pub fn piece(&self, from: Position, to: Position) -> (u64, Buf) {
        piece_of(&*self.memory, self.ring, from, to)
    }

    /// The log is durable in the pool up to `to`, a block border.
    pub fn set_synced(&mut self, to: Position) {
        assert!(self.mark.synced <= to && to <= self.mark.head, "a flush goes forward");
        self.mark.synced = to;
        self.memory.set_mark(&self.mark);
    }

    /// The checkpoint `generation`, which holds everything before `tail`, is durable.
    pub fn release(&mut self, tail: Position, generation: Generation) {
        assert!(self.tail <= tail && tail <= self.mark.head, "the tail goes forward in the log");
        self.tail = tail;
        self.mark.generation = generation.get();
        self.memory.set_mark(&self.mark);
    }

    /// Byte offset in the ring of a position.
    #[must_use]
    pub const fn offset(&self, position: Position) -> u64 {
        position % self.ring
    }

    fn memory(&self) -> u64 {
        to_u64(self.memory.len_bytes())
    }

    const fn lap_end(&self) -> Position {
        (self.mark.head / self.ring + 1) * self.ring
    }

    fn advance(&mut self, to: Position) {
        self.appended_bytes += to - self.mark.head;
        self.mark.head = to;
    }
}

/// As [`Journal::piece`], from the memory of a ring of `ring` bytes.
fn piece_of(memory: &dyn RingMemory, ring: u64, from: Position, to: Position) -> (u64, Buf) {
    let len = to_u64(memory.len_bytes());
    let lap_end = (from / ring + 1) * ring;
    let memory_end = (from / len + 1) * len;
    let end = to.min(lap_end).min(memory_end).min(from + PIECE_BYTES);
    let mut buf = Buf::new(to_usize((end - from) / BLOCK_BYTES));
    memory.load(to_usize(from % len), buf.as_mut_bytes());
    (from % ring / BLOCK_BYTES, buf)
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::disk::mem::MemDisk;
    use crate::disk::sim::{CutPlan, SimDisk, SimOptions};
    use crate::disk::{Disk, HeapRing};
    use crate::format::geometry::{Geometry, SUPER_SLOTS};
    use crate::format::superblock::Superblock;
    use crate::runtime::executor::Executor;
    use crate::runtime::park::ThreadDriver;
    use crate::units::{BLOCK_SIZE, BlockNo, Generation, VolumeId};

    const START: BlockNo = BlockNo::new(SUPER_SLOTS);

    fn superblock_of(geometry: Geometry) -> Superblock {
        Superblock {
            uuid: [0; 16],
            geometry,
            generation: Generation::new(1),
            catalogue: BlockNo::new(0),
            catalogue_bytes: 0,
            journal_offset: 0,
            seal: Seqno::new(0),
            salt: 7,
            clean: false,
        }
    }

    async fn flush(journal: &mut Journal, disk: &Rc<dyn Disk>) {
        let (mut from, end) = (journal.synced(), journal.pad());
        while from < end {
            let (block, buf) = journal.piece(from, end);
            from += to_u64(buf.len_bytes());
            disk.write(START.plus(block), vec![buf]).await.unwrap();
        }
        journal.set_synced(end);
    }

    /// Writes and reads back laps of a ring of `blocks`, in which `fill` says how likely it is that
    /// a lap ends early.
    fn laps(blocks: u64, rounds: u64, room: usize, fill: u64) {
        let memory = MemDisk::new((blocks + 1000) * BLOCK_BYTES);
        let geometry = Geometry::new(blocks + 1000, blocks, 1).unwrap();
        // Shorter than a lap and no divisor of it, as with a large journal.
        let kept = to_usize(blocks.min(40) * 3 / 4 * BLOCK_BYTES);
        let ring_bytes = blocks * BLOCK_BYTES;
        let mut journal = Journal::new(memory.map_ring(kept).unwrap(), ring_bytes, 0);
        journal.begin([0; 16], Generation::new(1), 7);
        let mut superblock = superblock_of(geometry);
        let mut next = Seqno::new(1);
        let mut random = 12345u64;
        let disk = memory.disk();
        for round in 0..rounds {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(round);
            while journal.has_room(room) && !(random >> 33).is_multiple_of(fill) {
                if !journal.has_memory(room) {
                    Executor::new(ThreadDriver::new()).block_on(flush(&mut journal, &disk));
                }
                // Of any length up to `room`.
                let sums = to_usize(random >> 20) % (room / 4 - 5);
                let record = Record::Map { runs: Vec::new(), sums: vec![7; sums] };
                journal.append(next, Seqno::new(0), &record).unwrap();
                next = next.next();
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                if (random >> 40).is_multiple_of(5) {
                    journal.pad();
                }
            }
            Executor::new(ThreadDriver::new()).block_on(async {
                // Flushed, or left behind by a process that died.
                if random.is_multiple_of(2) {
                    flush(&mut journal, &disk).await;
                } else {
                    write_back(&disk, &superblock, &*journal.memory).await.unwrap();
                }
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
            Executor::new(ThreadDriver::new()).block_on(flush(&mut journal, &disk));
            journal.release(tail, Generation::new(1));
            superblock.journal_offset = journal.offset(tail);
            superblock.seal = Seqno::new(next.get() - 1);
        }
        assert!(journal.appended_bytes() > 3 * blocks * BLOCK_BYTES, "several laps");
    }

    #[test]
    fn laps_and_paddings_are_read_back() {
        laps(8, 200, 4000, 13);
        // Longer than a block: the gap before the end of the ring is of several.
        laps(40, 200, 24_000, 300);
    }

    #[test]
    fn a_ring_of_several_windows_is_read_back() {
        laps(900, 16, RECORD_BYTES_MAX, 300_000);
    }

    #[test]
    fn a_lost_record_is_found_wherever_the_next_ones_lie() {
        let geometry = Geometry::new(2000, 600, 1).unwrap();
        let superblock = superblock_of(geometry);
        // At the ends of windows, and of the ring.
        for at in [
            8,
            (1 << 20) - 40,
            (1 << 20) - 8,
            1 << 20,
            (2 << 20) - 4096 - 48,
            600 * BLOCK_SIZE - 48,
        ] {
            let disk = MemDisk::new(2000 * BLOCK_BYTES).disk();
            let mut bytes = Vec::new();
            let record = Record::Delete(VolumeId::new(1));
            record::encode(&record, Seqno::new(9), Seqno::new(3), superblock.salt, &mut bytes)
                .unwrap();
            Executor::new(ThreadDriver::new()).block_on(async {
                let mut ring = vec![0; 600 * BLOCK_SIZE];
                ring[at..at + bytes.len()].copy_from_slice(&bytes);
                let mut buf = Buf::new(600);
                buf.as_mut_bytes().copy_from_slice(&ring);
                disk.write(START, vec![buf]).await.unwrap();
                for (next, found) in [(3, Some(Seqno::new(9))), (4, None)] {
                    let next = Seqno::new(next);
                    let lost = lost_record(&disk, &superblock, next).await.unwrap();
                    assert_eq!(lost, found, "at {at}");
                }
            });
        }
    }

    /// A memory that notes what is done to it.
    #[derive(Clone, Default)]
    struct Noted(std::sync::Arc<crate::runtime::sync::Mutex<(Vec<&'static str>, RingMark)>>);

    impl RingMemory for Noted {
        fn len_bytes(&self) -> usize {
            4 * BLOCK_SIZE
        }
        fn store(&mut self, _: usize, bytes: &[u8]) {
            if !bytes.is_empty() {
                self.0.lock().0.push("bytes");
            }
        }
        fn load(&self, _: usize, _: &mut [u8]) {}
        fn mark(&self) -> RingMark {
            self.0.lock().1
        }
        fn set_mark(&mut self, mark: &RingMark) {
            let (notes, old) = &mut *self.0.lock();
            notes.push("mark");
            *old = *mark;
        }
    }

    /// A process can be killed between any two stores.
    #[test]
    fn the_mark_is_set_behind_the_bytes_and_says_what_they_are() {
        let noted = Noted::default();
        let notes = || std::mem::take(&mut noted.0.lock().0);
        let mut journal = Journal::new(Box::new(noted.clone()), 64 * BLOCK_BYTES, 0);
        journal.begin([3; 16], Generation::new(5), 9);
        assert_eq!(notes(), ["mark"]);
        // Of 56 bytes, so that one lies over the end of the memory.
        let record = Record::Map { runs: Vec::new(), sums: vec![0] };
        journal.append(Seqno::new(1), Seqno::new(0), &record).unwrap();
        assert_eq!(notes(), ["bytes", "mark"]);
        let (pool, salt, generation) = ([3; 16], 9, 5);
        let mark = RingMark { pool, salt, generation, synced: 0, head: 56 };
        assert_eq!(noted.mark(), mark);
        let end = journal.pad();
        journal.set_synced(end);
        assert_eq!(noted.mark(), RingMark { synced: 4096, head: 4096, ..mark });
        journal.release(end, Generation::new(6));
        let mark = RingMark { synced: 4096, head: 4096, generation: 6, ..mark };
        assert_eq!(noted.mark(), mark);
        assert_eq!(notes(), ["mark", "mark"]);
        // Over the end of the memory: both parts come first.
        for seqno in 2.. {
            let before = journal.mark.head;
            journal.append(Seqno::new(seqno), Seqno::new(0), &record).unwrap();
            let pieces = notes();
            if before / 16384 != (journal.mark.head - 1) / 16384 {
                assert_eq!(pieces, ["bytes", "bytes", "mark"]);
                break;
            }
            assert_eq!(pieces, ["bytes", "mark"]);
            if journal.mark.head - journal.mark.synced > 2 * BLOCK_BYTES {
                let end = journal.mark.head / BLOCK_BYTES * BLOCK_BYTES;
                journal.set_synced(end);
                notes();
            }
        }
    }

    /// Up to three paddings come between the question and what it was about: the flush of what is
    /// before it, that of itself, and a seal.
    #[test]
    fn what_has_room_fits_whatever_is_padded_before_it() {
        let small = Record::Delete(VolumeId::new(1));
        let mut fits = 0;
        for before in 0..700 {
            for sums in [1, 700, 1500] {
                let record = Record::Map { runs: Vec::new(), sums: vec![0; sums] };
                let ring = Box::new(HeapRing::new(8 * BLOCK_SIZE));
                let mut journal = Journal::new(ring, 8 * BLOCK_BYTES, 5 * BLOCK_BYTES);
                for seqno in 0..before {
                    if journal.has_room(48) {
                        journal.append(Seqno::new(seqno), Seqno::new(0), &small).unwrap();
                    }
                }
                if journal.has_room(record.payload_bytes()) {
                    let end = journal.pad();
                    journal.set_synced(end);
                    journal.append(Seqno::new(before), Seqno::new(0), &record).unwrap();
                    journal.pad();
                    assert!(journal.used_bytes() <= journal.ring_bytes());
                    fits += 1;
                }
            }
        }
        assert!(fits > 500, "{fits} records");
    }

    #[test]
    fn what_was_written_back_is_durable() {
        let superblock = superblock_of(Geometry::new(2000, 8, 1).unwrap());
        let mut ring = HeapRing::new(4 * BLOCK_SIZE);
        ring.store(0, &[9; 10]);
        ring.set_mark(&RingMark { pool: [0; 16], salt: 7, generation: 1, synced: 0, head: 48 });
        let sim = SimDisk::new(1, 2000, SimOptions::default());
        sim.run(async { write_back(&sim.disk(), &superblock, &ring).await.unwrap() }).unwrap();
        let left = sim.image_after_cut(CutPlan::KeepNone);
        assert_eq!(left.blocks().block(START)[..10], [9; 10]);
    }

    #[test]
    fn only_the_memory_of_this_pool_is_believed() {
        let open = superblock_of(Geometry::new(2000, 8, 1).unwrap());
        let written = |superblock: &Superblock, mark: RingMark| {
            let mut ring = HeapRing::new(4 * BLOCK_SIZE);
            ring.store(BLOCK_SIZE, &[9; 10]);
            ring.set_mark(&mark);
            let disk = MemDisk::new(2000 * BLOCK_BYTES).disk();
            Executor::new(ThreadDriver::new()).block_on(async {
                let written = write_back(&disk, superblock, &ring).await.unwrap();
                let (buf, _) = disk.read(START.plus(1), Buf::new(1)).await;
                assert_eq!(written > 0, buf.as_bytes()[0] == 9);
                written
            })
        };
        let good = RingMark { pool: [0; 16], salt: 7, generation: 1, synced: 4096, head: 5000 };
        assert_eq!(written(&open, good), 4096);
        for bad in [
            RingMark { pool: [1; 16], ..good },
            RingMark { salt: 6, ..good },
            RingMark { generation: 2, ..good },
            RingMark { synced: 4097, ..good },
            RingMark { synced: 8192 + 4096, ..good },
            RingMark { head: 5 * 4096 + 1, ..good },
            RingMark { head: u64::MAX, ..good },
            RingMark { head: 4096, ..good },
        ] {
            assert_eq!(written(&open, bad), 0, "{bad:?}");
        }
        assert_eq!(written(&Superblock { clean: true, ..open }, good), 0);
    }
}
