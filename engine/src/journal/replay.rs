//! Reading the log of a ring with ordinary I/O, which can report an error: through a window, so
//! that the memory it takes does not depend on the size of the ring.

use std::rc::Rc;

use super::piece_of;
use crate::disk::{Disk, RingMemory};
use crate::error::{Error, Result};
use crate::format::geometry::Geometry;
use crate::format::record::{self, Framed, framed_bytes};
use crate::format::superblock::Superblock;
use crate::limits::RECORD_BYTES_MAX;
use crate::runtime::Buf;
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, BlockNo, Seqno, to_u64, to_usize};

/// Blocks read at once: the window.
const WINDOW_BLOCKS: u64 = 256;
/// Bytes of the longest record.
const LONGEST: usize = framed_bytes(RECORD_BYTES_MAX);

const _: () = assert!(to_usize(WINDOW_BLOCKS) * BLOCK_SIZE > 2 * (LONGEST + BLOCK_SIZE));
const _: () = assert!(LONGEST.is_multiple_of(record::ALIGN));

/// The part of a ring that is in memory.
struct Window {
    disk: Rc<dyn Disk>,
    first: BlockNo,
    ring_bytes: usize,
    /// Byte of the ring at which the part begins.
    start: usize,
    part: Option<Buf>,
}

impl Window {
    fn new(disk: &Rc<dyn Disk>, geometry: &Geometry) -> Self {
        Self {
            disk: Rc::clone(disk),
            first: geometry.journal_start(),
            ring_bytes: to_usize(geometry.journal_blocks * BLOCK_BYTES),
            start: 0,
            part: None,
        }
    }

    /// The bytes from `place` on: as many as a record can have, or all to the end of the ring.
    async fn bytes_from(&mut self, place: usize) -> Result<&[u8]> {
        let needed = (place + LONGEST).min(self.ring_bytes);
        let end = self.start + self.part.as_ref().map_or(0, Buf::len_bytes);
        if place < self.start || end < needed {
            self.part = None;
            let block = to_u64(place / BLOCK_SIZE);
            let count = WINDOW_BLOCKS.min(to_u64(self.ring_bytes / BLOCK_SIZE) - block);
            let buf = Buf::new(to_usize(count));
            let (buf, result) = self.disk.read(self.first.plus(block), buf).await;
            result.map_err(|e| e.context("journal"))?;
            self.start = to_usize(block) * BLOCK_SIZE;
            self.part = Some(buf);
        }
        let part = self.part.as_ref().expect("read above if it was not there");
        Ok(&part.as_bytes()[place - self.start..])
    }
}

/// The records of a ring, one by one, until the first that is not there.
pub struct LogReader {
    window: Window,
    at: usize,
    read: usize,
    next: Seqno,
    salt: u32,
}

impl LogReader {
    /// Reads what lies behind the checkpoint of a superblock.
    #[must_use]
    pub fn behind(disk: &Rc<dyn Disk>, superblock: &Superblock) -> Self {
        Self {
            window: Window::new(disk, &superblock.geometry),
            at: to_usize(superblock.journal_offset),
            read: 0,
            next: superblock.seal.next(),
            salt: superblock.salt,
        }
    }

    /// The next record; `None` where the log ends.
    ///
    /// # Errors
    /// The device's.
    pub async fn next(&mut self) -> Result<Option<Framed>> {
        let ring_bytes = self.window.ring_bytes;
        let border = self.at.next_multiple_of(BLOCK_SIZE);
        let wraps = ring_bytes - self.at < LONGEST + BLOCK_SIZE;
        let places = [Some(self.at), Some(border), wraps.then_some(ring_bytes)];
        for place in places.into_iter().flatten() {
            let skipped = place - self.at;
            let place = place % ring_bytes;
            let bytes = self.window.bytes_from(place).await?;
            let Some(framed) = record::decode(bytes, self.next, self.salt) else { continue };
            let read = self.read + skipped + framed.bytes;
            if read > ring_bytes {
                return Ok(None);
            }
            self.read = read;
            self.at = (place + framed.bytes) % ring_bytes;
            self.next = self.next.next();
            return Ok(Some(framed));
        }
        Ok(None)
    }

    /// The next records, at most `max` of them, none behind number `last`.
    ///
    /// # Errors
    /// The device's; `Corrupt` when the log ends before `last`, though it did not when it was read
    /// before.
    pub async fn next_up_to(&mut self, last: Seqno, max: usize) -> Result<Vec<Framed>> {
        let mut some = Vec::with_capacity(max);
        while some.len() < max && self.next <= last {
            let Some(framed) = self.next().await? else {
                return Err(Error::corrupt(format!(
                    "journal: record {} was there and is not any more",
                    self.next.get()
                )));
            };
            some.push(framed);
        }
        Ok(some)
    }
}

/// Whether the log behind a checkpoint ends too early at `next`: a record further on says that it
/// was durable. The number of that record. A power failure never makes this; damage to a flushed
/// record does.
///
/// # Errors
/// The device's.
pub async fn lost_record(
    disk: &Rc<dyn Disk>,
    superblock: &Superblock,
    next: Seqno,
) -> Result<Option<Seqno>> {
    let salt = superblock.salt;
    let later = |bytes: &[u8]| {
        let seqno = record::seqno_at(bytes, salt)?;
        let framed = (seqno > next).then(|| record::decode(bytes, seqno, salt))??;
        (framed.durable >= next).then_some(seqno)
    };
    let mut window = Window::new(disk, &superblock.geometry);
    let mut at = 0;
    while at < window.ring_bytes {
        let ring_bytes = window.ring_bytes;
        let bytes = window.bytes_from(at).await?;
        // Up to the last place from which the longest record is in the window.
        let whole = at + bytes.len() == ring_bytes;
        let places = if whole { bytes.len() } else { bytes.len() - LONGEST + record::ALIGN };
        let found = (0..places).step_by(record::ALIGN).find_map(|place| later(&bytes[place..]));
        if found.is_some() {
            return Ok(found);
        }
        at += places;
    }
    Ok(None)
}

/// Writes the records that a dead process left in `memory` to the ring of its pool and makes them
/// durable, so that the log can be read from there. A memory that holds nothing of the pool as it
/// is now (another one's, an older or a newer one's, none) changes nothing. Returns how many bytes
/// were written.
///
/// # Errors
/// The device's.
pub async fn write_back(
    disk: &Rc<dyn Disk>,
    superblock: &Superblock,
    memory: &dyn RingMemory,
) -> Result<u64> {
    let mark = memory.mark();
    let ring = superblock.geometry.journal_blocks * BLOCK_BYTES;
    let same = mark.pool == superblock.uuid && mark.salt == superblock.salt;
    let Some(to) = mark.head.checked_next_multiple_of(BLOCK_BYTES) else { return Ok(0) };
    let most = ring.min(to_u64(memory.len_bytes()));
    let sane = mark.synced.is_multiple_of(BLOCK_BYTES)
        && to.checked_sub(mark.synced).is_some_and(|len| len <= most);
    if !same || !sane || mark.generation > superblock.generation.get() || superblock.clean {
        return Ok(0);
    }
    let mut from = mark.synced;
    while from < to {
        let (block, buf) = piece_of(memory, ring, from, to);
        from += to_u64(buf.len_bytes());
        let at = superblock.geometry.journal_start().plus(block);
        disk.write(at, vec![buf]).await.map_err(|e| e.context("journal of a dead process"))?;
    }
    if to > mark.synced {
        disk.sync().await?;
    }
    Ok(to - mark.synced)
}
