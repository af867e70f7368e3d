//! f13: requests as the kernel of a ublk device shows them, and as it never should: any operation,
//! flags, place and length; tags used again, and requests given out a second time. A model of the
//! volume says what the kernel must be told and what the data must be; no byte of data is touched
//! beyond the length that is told, since the kernel would hand it on; and the volume has been asked for
//! exactly what was allowed, durable where that was asked.
//!
//! ```text
//! size, read-only (2); then 8 bytes a request: operation, flags, sectors, place, more, tag, form, again
//! ```

use std::collections::BTreeMap;
use std::rc::Rc;

use super::{Input, Reached};
use crate::model::{fill_sector, stamp_of};
use pando_engine::export::testing::{RamCounters, RamDisk};
use pando_engine::export::ublk::testing::{DEPTH, TestQueue};
use pando_engine::runtime::executor::Executor;
use pando_engine::runtime::park::ThreadDriver;

/// What the corpus must come to.
pub(super) const REACHES: &[&str] = &["given out again", "read", "refused", "requests", "written"];
const REQUESTS_MAX: u64 = 32;
const SECTOR: u64 = 512;
/// Sectors of data that are looked at.
const LOOKED_AT: u64 = 64;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 2;
const DISCARD: u32 = 3;
const WRITE_ZEROES: u32 = 5;
/// The flag that asks for what is durable.
const FUA: u32 = 1 << 13;
const INVALID: i32 = -22;
const READ_ONLY: i32 = -1;
const NOT_SUPPORTED: i32 = -95;

/// A request.
#[derive(Clone, Copy, Debug)]
struct Request {
    op_flags: u32,
    sectors: u32,
    start: u64,
    tag: u16,
    again: bool,
}

impl Request {
    fn of(input: &mut Input<'_>, size_sectors: u64) -> Self {
        let [operation, flags, sectors, place, more, tag, form, again] =
            [(); 8].map(|()| input.byte());
        let known = [READ, WRITE, READ, WRITE, DISCARD, WRITE_ZEROES, FLUSH, WRITE];
        let operation = match operation {
            0..=0xEF => known[usize::from(operation) % known.len()],
            _ => u32::from(operation & 15),
        };
        let flags = u32::from(flags) << 8 & !0xFF;
        let mut start = u64::from(place) % size_sectors;
        let mut sectors = u32::from(sectors % 24);
        match form {
            0xE0 => start = size_sectors - u64::from(more % 4),
            0xE1 => start = u64::MAX - u64::from(more),
            0xE2 => start = (u64::MAX >> 9) + u64::from(more % 2),
            0xE3 => sectors = u32::MAX - u32::from(more),
            0xE4 => sectors = (32 << 11) + u32::from(more % 2),
            0xE5 => sectors = 1 << 23,
            0xE6 => sectors = 1 << 21,
            _ => {
                let room = size_sectors - start;
                sectors = sectors.min(u32::try_from(room).unwrap_or(u32::MAX));
            }
        }
        let (op_flags, tag) = (operation | flags, u16::from(tag) % DEPTH);
        Self { op_flags, sectors, start, tag, again: again & 3 == 3 }
    }

    const fn operation(self) -> u32 {
        self.op_flags & 0xFF
    }

    /// What the kernel must be told.
    fn expected(self, size_sectors: u64, read_only: bool) -> i32 {
        let operation = self.operation();
        if operation == FLUSH {
            return 0;
        }
        if self.start > u64::MAX / SECTOR || self.sectors == 0 {
            return INVALID;
        }
        if !matches!(operation, READ | WRITE | DISCARD | WRITE_ZEROES) {
            return NOT_SUPPORTED;
        }
        let carries = matches!(operation, READ | WRITE);
        let too_long = carries && u64::from(self.sectors) * SECTOR > 32 << 20;
        if too_long || (carries && u64::from(self.sectors) * SECTOR > u64::from(u32::MAX)) {
            return INVALID;
        }
        if operation != READ && read_only {
            return READ_ONLY;
        }
        if self.start.checked_add(self.sectors.into()).is_none_or(|end| end > size_sectors) {
            return INVALID;
        }
        let bytes = i32::try_from(u64::from(self.sectors) * SECTOR).expect("32 MiB at most");
        if carries { bytes } else { 0 }
    }
}

pub(super) fn body(bytes: &[u8], reached: &mut Reached) {
    let mut input = Input::new(bytes);
    let size_sectors = 8 + u64::from(input.byte());
    let disk = RamDisk::new(size_sectors * SECTOR);
    let read_only = input.byte() >= 0xF0;
    disk.set_read_only(read_only);
    let queue = TestQueue::new(Rc::new(disk.clone()));
    let mut model: BTreeMap<u64, u64> = BTreeMap::new();
    let mut asked = RamCounters::default();
    Executor::new(ThreadDriver::new()).block_on(async {
        for stamp in 1..=REQUESTS_MAX {
            if input.is_empty() {
                break;
            }
            reached.note("requests");
            let request = Request::of(&mut input, size_sectors);
            let mut data = vec![0; usize::try_from(LOOKED_AT * SECTOR).expect("small")];
            let places = request.start..request.start.saturating_add(LOOKED_AT);
            for (sector, bytes) in places.clone().zip(data.chunks_exact_mut(512)) {
                fill_sector(bytes, sector, stamp);
            }
            queue.set_data(request.tag, &data);
            queue.put(request.tag, request.op_flags, request.sectors, request.start);
            let expected = request.expected(size_sectors, read_only);
            // A daemon that has died in between has done it or not; the next one does it again.
            for _ in 0..=u8::from(request.again) {
                assert_eq!(queue.serve(request.tag).await, expected, "{request:?}");
            }
            if request.again {
                reached.note("given out again");
            }
            if expected < 0 {
                reached.note("refused");
            } else {
                count(request, &mut asked);
                apply(request, stamp, &mut model, reached);
            }
            let read = request.operation() == READ && expected > 0;
            let told = if read { u64::from(request.sectors) } else { 0 };
            let found = queue.data(request.tag, LOOKED_AT * SECTOR);
            for (number, (sector, bytes)) in (0..).zip(places.zip(found.chunks_exact(512))) {
                let known = model.get(&sector).copied().unwrap_or(0);
                let wanted = if number < told { known } else { stamp };
                assert_eq!(stamp_of(bytes, sector), Some(wanted), "{request:?}, sector {sector}");
            }
        }
    });
    assert_eq!(disk.counters(), asked, "what the volume was asked for");
    for (sector, bytes) in (0..).zip(disk.content().chunks_exact(512)) {
        let wanted = model.get(&sector).copied().unwrap_or(0);
        assert_eq!(stamp_of(bytes, sector), Some(wanted), "sector {sector}");
    }
}

/// What a request that is carried out asks of the volume.
fn count(request: Request, asked: &mut RamCounters) {
    let times = 1 + u64::from(request.again);
    let durable = u64::from(request.op_flags & FUA != 0);
    match request.operation() {
        READ => asked.reads += times,
        FLUSH => asked.flushes += times,
        WRITE => asked.writes += times,
        DISCARD => asked.discards += times,
        _ => asked.zeroes += times,
    }
    if !matches!(request.operation(), READ | FLUSH) {
        asked.flushes += times * durable;
    }
}

/// What a request does to the volume.
fn apply(request: Request, stamp: u64, model: &mut BTreeMap<u64, u64>, reached: &mut Reached) {
    let (from, to) = (request.start, request.start.saturating_add(request.sectors.into()));
    match request.operation() {
        READ => reached.note("read"),
        WRITE => {
            model.extend((from..to).map(|sector| (sector, stamp)));
            reached.note("written");
        }
        DISCARD => model.retain(|at, _| !(from.next_multiple_of(8)..to / 8 * 8).contains(at)),
        WRITE_ZEROES => model.retain(|at, _| !(from..to).contains(at)),
        _ => {}
    }
}
