//! The log of what was asked of a volume and what was acknowledged, and its comparison with what
//! is found in the volume, in a snapshot or in a clone.
//!
//! ```text
//! sector 7    zeros --- stamp 11 ------ stamp 15 ------ zeros
//!             base      acknowledged    acknowledged    under way
//!                                       `-- a kill leaves one of these two --'
//! ```
//!
//! A request has two times of one clock that all volumes share: when it was sent and when it was
//! acknowledged. Requests that overlap are never under way together, so the events of a sector have
//! an order. Four things are asked of what is found:
//!
//! * each sector holds an event that the moment allows, with the stamp of its own place;
//! * the part of a request that lies in one block is there whole or not at all;
//! * a snapshot is one cut: it has no request that was sent after one was acknowledged that it
//!   lacks, also over several volumes that were frozen together;
//! * what was acknowledged before is there, what was sent afterwards is not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pando_engine::units::{to_u64, to_usize};
use parking_lot::Mutex;

pub(crate) const SECTOR: u64 = 512;
const SECTOR_BYTES: usize = 512;
/// Sectors in a block: what is written as one.
pub(crate) const BLOCK_SECTORS: u64 = 8;
/// Not yet, or at no time.
const NEVER: u64 = u64::MAX;

/// Orders all that happens, over all volumes.
#[derive(Debug, Default)]
pub(crate) struct Clock(AtomicU64);

impl Clock {
    /// A time later than all before.
    pub(crate) fn tick(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }
}

/// What a sector was told to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Zeros,
    /// The number of a write: who wrote it, in which round, and a sequence number.
    Stamp(u64),
}

/// The 32 bytes that fill a sector: they say by whom it was written, where, and are checksummed.
fn filling(volume: u64, sector: u64, content: Content) -> [u8; 32] {
    let Content::Stamp(stamp) = content else { return [0; 32] };
    let words = [stamp, sector, volume, checksum(stamp, sector, volume)];
    let mut bytes = [0; 32];
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

const fn checksum(stamp: u64, sector: u64, volume: u64) -> u64 {
    let mixed = stamp.rotate_left(17) ^ sector.rotate_left(39) ^ volume;
    !mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// The bytes of sectors from `first` on that hold `content`.
pub(crate) fn bytes(volume: u64, first: u64, count: u64, content: Content) -> Vec<u8> {
    let sectors = first..first + count;
    sectors.flat_map(|sector| filling(volume, sector, content).repeat(SECTOR_BYTES / 32)).collect()
}

/// What a sector says of itself, for a message.
fn describe(bytes: &[u8]) -> String {
    if bytes.iter().all(|byte| *byte == 0) {
        return "zeros".to_owned();
    }
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let (stamp, sector, volume) = (word(0), word(8), word(16));
    let even = bytes.chunks_exact(32).all(|part| part == &bytes[..32]);
    if even && word(24) == checksum(stamp, sector, volume) {
        format!("stamp {stamp:#x} of sector {sector} of volume {volume}")
    } else {
        format!("no stamp: {:02x?}..", &bytes[..32])
    }
}

/// A request, as far as its order matters.
#[derive(Clone, Copy, Debug)]
struct Request {
    sent: u64,
    acknowledged: u64,
}

/// A request reaches a sector.
#[derive(Clone, Copy, Debug)]
struct Event {
    content: Content,
    request: usize,
}

/// Requests and, for each sector, its events in order. The first event of a sector is what it held
/// when the log was settled; it belongs to request 0.
struct State {
    requests: Vec<Request>,
    sectors: Vec<Vec<Event>>,
}

/// The log of a volume.
pub(crate) struct Log {
    pub(crate) volume: u64,
    clock: Arc<Clock>,
    state: Mutex<State>,
}

/// Between which times the state of a volume was taken.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) asked: u64,
    pub(crate) answered: u64,
}

impl Moment {
    /// Now that nothing is under way any more.
    pub(crate) const END: Self = Self { asked: NEVER, answered: NEVER };
}

/// A place in the order of requests: what is in a state, and what is not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    /// The latest sending of what is in it, and its sector.
    within: (u64, u64),
    /// The earliest acknowledgement of what is not, and its sector.
    without: (u64, u64),
}

impl Cut {
    /// One that says nothing.
    pub(crate) const NONE: Self = Self { within: (0, 0), without: (NEVER, 0) };

    /// The cut of two states that were taken as one.
    pub(crate) fn and(self, other: Self) -> Self {
        let within = self.within.max(other.within);
        Self { within, without: self.without.min(other.without) }
    }

    /// Whether it is one: nothing in it was sent after the acknowledgement of what is not in it.
    pub(crate) fn check(&self, name: &str) -> Result<(), String> {
        if self.within.0 < self.without.0 {
            return Ok(());
        }
        Err(format!(
            "{name} is no cut: it lacks what sector {} was given at {}, and has what was sent for \
             sector {} only at {}",
            self.without.1, self.without.0, self.within.1, self.within.0
        ))
    }
}

/// What a comparison has found.
pub(crate) struct Judged {
    pub(crate) cut: Cut,
    /// For each sector what it holds.
    contents: Vec<Content>,
}

/// Which of its events a sector holds.
#[derive(Clone, Copy, Debug)]
struct Place {
    sector: usize,
    /// The possible events.
    from: usize,
    until: usize,
    /// The one found, if no other fits: zeros over zeros cannot be told apart.
    only: Option<usize>,
}

impl Log {
    pub(crate) fn new(volume: u64, sectors: u64, clock: Arc<Clock>) -> Self {
        let contents = vec![Content::Zeros; to_usize(sectors)];
        Self { volume, clock, state: Mutex::new(State::settled(&contents)) }
    }

    /// Writes down a request that will be sent now; its number.
    pub(crate) fn send(&self, (start, len): (u64, u64), content: Content) -> usize {
        let mut state = self.state.lock();
        let request = state.requests.len();
        state.requests.push(Request { sent: self.clock.tick(), acknowledged: NEVER });
        for events in &mut state.sectors[to_usize(start)..to_usize(start + len)] {
            events.push(Event { content, request });
        }
        request
    }

    /// Writes down that a request was acknowledged.
    pub(crate) fn acknowledged(&self, request: usize) {
        let mut state = self.state.lock();
        state.requests[request].acknowledged = self.clock.tick();
    }

    /// Compares what is `found` with what can be there.
    pub(crate) fn judge(&self, name: &str, found: &[u8], at: Moment) -> Result<Judged, String> {
        let state = self.state.lock();
        let all = &found[..state.sectors.len() * SECTOR_BYTES];
        let mut judged = Judged { cut: Cut::NONE, contents: Vec::with_capacity(all.len() / 512) };
        let mut block: Vec<Place> = Vec::new();
        for (sector, bytes) in all.chunks_exact(SECTOR_BYTES).enumerate() {
            let (place, content) = state.place(self.volume, sector, bytes, at).map_err(|why| {
                format!("{name}, sector {sector} of volume {}: {why}", self.volume)
            })?;
            judged.contents.push(content);
            judged.cut = judged.cut.and(state.cut(place));
            block.push(place);
            if to_u64(block.len()) == BLOCK_SECTORS {
                state.whole(&block).map_err(|why| format!("{name}: {why}"))?;
                block.clear();
            }
        }
        Ok(judged)
    }

    /// Takes what was found for what there is: nothing is under way any more.
    pub(crate) fn settle(&self, judged: &Judged) {
        *self.state.lock() = State::settled(&judged.contents);
    }
}

impl State {
    fn settled(contents: &[Content]) -> Self {
        let sectors = contents.iter().map(|content| vec![Event { content: *content, request: 0 }]);
        Self { requests: vec![Request { sent: 0, acknowledged: 0 }], sectors: sectors.collect() }
    }

    /// Which event a sector holds, of those that can be.
    fn place(
        &self,
        volume: u64,
        sector: usize,
        bytes: &[u8],
        at: Moment,
    ) -> Result<(Place, Content), String> {
        let events = &self.sectors[sector];
        let request = |event: &Event| self.requests[event.request];
        let before = events.iter().rposition(|event| request(event).acknowledged < at.asked);
        let sent = events.iter().rposition(|event| request(event).sent < at.answered);
        let (from, until) = (before.unwrap_or(0), sent.unwrap_or(0));
        let fits = |event: &Event| {
            let filling = filling(volume, to_u64(sector), event.content);
            bytes.chunks_exact(32).all(|part| part == filling)
        };
        let mut fitting = (from..=until).filter(|number| fits(&events[*number]));
        let Some(number) = fitting.next() else {
            let possible: Vec<Content> = events[from..=until].iter().map(|e| e.content).collect();
            return Err(format!("found {}, possible are {possible:x?}", describe(bytes)));
        };
        let only = fitting.next().is_none().then_some(number);
        Ok((Place { sector, from, until, only }, events[number].content))
    }

    fn cut(&self, place: Place) -> Cut {
        let Some(only) = place.only else { return Cut::NONE };
        let request = |event: &Event| self.requests[event.request];
        let (events, number) = (&self.sectors[place.sector], to_u64(place.sector));
        let without = events.get(only + 1).map_or(NEVER, |event| request(event).acknowledged);
        Cut { within: (request(&events[only]).sent, number), without: (without, number) }
    }

    /// No request is in a part of a block only.
    fn whole(&self, block: &[Place]) -> Result<(), String> {
        let mut parts: Vec<(usize, bool)> = Vec::new();
        for place in block {
            let Some(only) = place.only else { continue };
            for number in place.from + 1..=place.until {
                let request = self.sectors[place.sector][number].request;
                if parts.contains(&(request, number > only)) {
                    let sector = place.sector;
                    return Err(format!(
                        "sector {sector}: a request is in a part of its block only: {block:?}"
                    ));
                }
                parts.push((request, number <= only));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Content = Content::Stamp(0xA);
    const B: Content = Content::Stamp(0xB);

    fn log() -> Log {
        Log::new(3, 32, Arc::default())
    }

    /// What is found if the sectors from `start` on hold `content`, and zeros are elsewhere.
    fn found(parts: &[(u64, u64, Content)]) -> Vec<u8> {
        let mut all = vec![0; 32 * SECTOR_BYTES];
        for (start, len, content) in parts {
            let bytes = bytes(3, *start, *len, *content);
            all[to_usize(*start) * SECTOR_BYTES..][..bytes.len()].copy_from_slice(&bytes);
        }
        all
    }

    fn fails(log: &Log, found: &[u8], at: Moment, why: &str) {
        let judged = log.judge("it", found, at);
        let said = judged.and_then(|judged| judged.cut.check("it")).expect_err(why);
        assert!(said.contains(why), "{said}");
    }

    fn holds(log: &Log, found: &[u8], at: Moment) {
        log.judge("it", found, at).and_then(|judged| judged.cut.check("it")).expect("it holds");
    }

    #[test]
    fn what_was_acknowledged_is_missed() {
        let log = log();
        log.acknowledged(log.send((8, 8), A));
        holds(&log, &found(&[(8, 8, A)]), Moment::END);
        fails(&log, &found(&[]), Moment::END, "found zeros");
        log.acknowledged(log.send((8, 8), B));
        fails(&log, &found(&[(8, 8, A)]), Moment::END, "found stamp 0xa of sector 8");
        log.acknowledged(log.send((8, 8), Content::Zeros));
        fails(&log, &found(&[(8, 8, B)]), Moment::END, "found stamp 0xb of sector 8");
    }

    #[test]
    fn what_is_under_way_is_there_or_not_block_by_block() {
        let log = log();
        log.send((4, 20), A);
        for parts in [&[][..], &[(4, 20, A)], &[(4, 12, A)], &[(4, 4, A), (16, 8, A)]] {
            holds(&log, &found(parts), Moment::END);
        }
        for part in [(8, 4, A), (9, 7, A), (5, 3, A)] {
            fails(&log, &found(&[part]), Moment::END, "in a part of its block only");
        }
    }

    #[test]
    fn stamps_of_elsewhere_and_rubbish_are_seen() {
        let log = log();
        log.send((0, 16), A);
        let mut moved = found(&[(0, 16, A)]);
        moved.copy_within(0..4096, 4096);
        fails(&log, &moved, Moment::END, "found stamp 0xa of sector 0 of volume 3");
        let mut rotten = found(&[(0, 16, A)]);
        rotten[511] ^= 1;
        fails(&log, &rotten, Moment::END, "no stamp");
    }

    #[test]
    fn a_snapshot_has_what_was_there_and_nothing_later() {
        let log = log();
        log.acknowledged(log.send((0, 8), A));
        let asked = log.clock.tick();
        log.send((0, 8), B);
        let at = Moment { asked, answered: log.clock.tick() };
        log.send((8, 8), B);
        holds(&log, &found(&[(0, 8, A)]), at);
        holds(&log, &found(&[(0, 8, B)]), at);
        fails(&log, &found(&[]), at, "sector 0 of volume 3: found zeros");
        fails(&log, &found(&[(0, 8, A), (8, 8, B)]), at, "sector 8 of volume 3: found stamp");
    }

    #[test]
    fn a_snapshot_is_one_cut() {
        let log = log();
        let asked = log.clock.tick();
        log.acknowledged(log.send((0, 8), A));
        log.acknowledged(log.send((8, 8), B));
        let at = Moment { asked, answered: log.clock.tick() };
        for parts in [&[][..], &[(0, 8, A)], &[(0, 8, A), (8, 8, B)]] {
            holds(&log, &found(parts), at);
        }
        fails(&log, &found(&[(8, 8, B)]), at, "it lacks what sector 0");
    }

    #[test]
    fn volumes_frozen_together_are_one_cut() {
        let clock = Arc::new(Clock::default());
        let logs = [0, 1].map(|_| Log::new(3, 32, Arc::clone(&clock)));
        let asked = clock.tick();
        logs[0].acknowledged(logs[0].send((0, 8), A));
        logs[1].acknowledged(logs[1].send((0, 8), B));
        let at = Moment { asked, answered: clock.tick() };
        let cut = |first: &[(u64, u64, Content)], second: &[(u64, u64, Content)]| {
            let cuts = [(&logs[0], first), (&logs[1], second)]
                .map(|(log, parts)| log.judge("it", &found(parts), at).expect("possible").cut);
            cuts[0].and(cuts[1]).check("they").is_ok()
        };
        assert!(cut(&[], &[]) && cut(&[(0, 8, A)], &[]) && cut(&[(0, 8, A)], &[(0, 8, B)]));
        assert!(!cut(&[], &[(0, 8, B)]));
    }

    #[test]
    fn a_settled_log_forgets_what_was_under_way() {
        let log = log();
        log.send((0, 16), A);
        let left = found(&[(0, 8, A)]);
        log.settle(&log.judge("it", &left, Moment::END).expect("possible"));
        holds(&log, &left, Moment::END);
        fails(&log, &found(&[(0, 16, A)]), Moment::END, "sector 8 of volume 3: found stamp");
    }
}
