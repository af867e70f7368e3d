//! f05: a ring of records: gaps, numbers twice, records of an earlier life, bytes behind the end, data
//! that is not there. The reader finds the records that follow each other from the checkpoint on, and
//! no other; a pool with such a journal opens to exactly the state that these make, or is refused where
//! a record that was durable is lost, or one of them cannot be carried out.
//!
//! ```text
//! journal (1), offset (1), how many records; 12 bytes a record: kind, number, salt, durable, place,
//! gap, volume, LBA, block, length, data, more; behind them 4 bytes a change: place (2), xor, how
//! ```

use std::collections::BTreeMap;

use super::forge::{Forge, content};
use super::{Input, Reached};
use crate::run::Config;
use pando_engine::crc::crc32;
use pando_engine::disk::sim::{SimDisk, SimImage, SimOptions};
use pando_engine::error::ErrorKind;
use pando_engine::format::catalogue::IoLimits;
use pando_engine::format::record::{self, Framed, MapRun, NewProperties, NewVolume, Record};
use pando_engine::format::superblock::Superblock;
use pando_engine::journal::{LogReader, lost_record};
use pando_engine::limits::RECORD_BYTES_MAX;
use pando_engine::pool::check_offline;
use pando_engine::units::{
    BLOCK_BYTES, BLOCK_SIZE, BlockNo, Lba, Seqno, VolumeId, to_u32, to_u64, to_usize,
};

/// What the corpus must come to.
pub(super) const REACHES: &[&str] = &[
    "damaged records",
    "ends at data",
    "errors of data",
    "laps",
    "lost records",
    "opened",
    "records",
    "refused",
    "stale records",
];

const POOL_BLOCKS: u64 = 320;
const SEAL: u64 = 50;
const SALT: u32 = 77;
const RECORDS_MAX: u64 = 24;
/// Where data lies in the group, and how much of it.
const DATA_AT: u64 = 30;
const DATA_BLOCKS: u64 = 64;
/// Blocks of a volume.
const VOLUME_BLOCKS: u64 = 40;
/// Events after which a pool is said to hang.
const EVENTS_MAX: u64 = 20_000;

/// A record that was put into the ring.
struct Put {
    at: usize,
    bytes: Vec<u8>,
    seqno: u64,
    durable: u64,
    salt: u32,
    record: Record,
}

/// The ring, and what was put into it.
struct Ring {
    bytes: Vec<u8>,
    puts: Vec<Put>,
    /// Some bytes were changed and the checksum made right.
    forged: bool,
    next: u64,
    at: usize,
}

pub(super) fn body(bytes: &[u8], reached: &mut Reached) {
    let mut input = Input::new(bytes);
    let journal_blocks = 8 + input.below(17);
    let mut forge = Forge::new(POOL_BLOCKS, journal_blocks, SEAL);
    let offset = input.below(journal_blocks) * BLOCK_BYTES;
    forge.superblock.journal_offset = offset;
    forge.volume("a", VOLUME_BLOCKS, None);
    forge.volume("b", VOLUME_BLOCKS, None);
    let ring_bytes = to_usize(journal_blocks) * BLOCK_SIZE;
    let mut ring = Ring {
        bytes: vec![0; ring_bytes],
        puts: vec![],
        forged: false,
        next: SEAL + 1,
        at: to_usize(offset),
    };
    for _ in 0..input.below(RECORDS_MAX + 1) {
        ring.put(&mut input, &mut forge);
    }
    while !input.is_empty() {
        ring.change(&mut input);
    }
    let start = forge.superblock.geometry.journal_start();
    for (block, bytes) in (0..).zip(ring.bytes.chunks_exact(BLOCK_SIZE)) {
        forge.image.write(start.plus(block), 0, bytes);
    }
    let superblock = forge.superblock.clone();
    let log = ring.log(to_usize(offset));
    let lost = ring.lost(log.last().map_or(SEAL, |put| put.seqno) + 1);
    if ring.puts.iter().any(|put| put.salt != SALT) {
        reached.note("stale records");
    }
    if log.windows(2).any(|two| two[1].at < two[0].at) {
        reached.note("laps");
    }
    let sums = forge.sums.clone();
    forge.sums.clear();
    let outcome = if lost { None } else { replay(&log, &forge, &sums, reached) };
    let image = forge.seal();
    let expected = (!ring.forged).then_some((log.as_slice(), lost));
    read(&image, &superblock, expected, reached);
    if ring.forged {
        return open(image, None, reached);
    }
    reached
        .add("damaged records", to_u64(ring.puts.iter().filter(|put| !ring.is_whole(put)).count()));
    reached.add("lost records", u64::from(lost));
    open(image, Some(outcome), reached);
}

impl Ring {
    fn put(&mut self, input: &mut Input<'_>, forge: &mut Forge) {
        let [kind, number, salt, durable, place, gap] = [(); 6].map(|()| input.byte());
        let [volume, lba, block, len, data, more] = [(); 6].map(|()| input.byte());
        let record = match kind % 8 {
            0 => Record::Unmap {
                volume: VolumeId::new(1 + u64::from(volume % 4)),
                lba: Lba::new(lba.into()),
                len: len.into(),
            },
            1 => Record::Create(vec![new_volume(volume, lba, more)]),
            2 => Record::Modify(Box::new(new_properties(volume, lba))),
            3 => Record::Delete(VolumeId::new(1 + u64::from(volume % 4))),
            _ => map(forge, [volume, lba, block, len, data, more]),
        };
        let seqno = match number {
            0xF0..=0xF7 => self.next + u64::from(number & 7),
            0xF8..=0xFF => self.next.saturating_sub(u64::from(number & 7)),
            _ => self.next,
        };
        let salt = if salt >= 0xE0 { SALT + 1 } else { SALT };
        let durable = match durable {
            0..=0x7F => 0,
            0x80..=0xDF => seqno.saturating_sub(1 + u64::from(durable & 7)),
            _ => seqno + u64::from(durable & 7),
        };
        let mut bytes = Vec::new();
        record::encode(&record, Seqno::new(seqno), Seqno::new(durable), salt, &mut bytes)
            .expect("a short record");
        let border = self.at.next_multiple_of(BLOCK_SIZE);
        let mut at = match place {
            0xD0..=0xDF => 0,
            0xE0..=0xEF => self.at + usize::from(gap & 31) * record::ALIGN,
            0xF0..=0xFF => border + usize::from(gap % 4) * BLOCK_SIZE,
            0x80..=0xCF => border,
            _ => self.at,
        };
        if at + bytes.len() > self.bytes.len() {
            at = 0;
        }
        self.bytes[at..at + bytes.len()].copy_from_slice(&bytes);
        self.at = at + bytes.len();
        self.next = seqno + 1;
        self.puts.push(Put { at, bytes, seqno, durable, salt, record });
    }

    /// Changes a byte, of the ring or of a record; in a record the checksum can be made right.
    fn change(&mut self, input: &mut Input<'_>) {
        let (place, by, how) = (usize::from(input.short()), input.byte(), input.byte());
        let Some(put) = usize::from(how >> 2).checked_rem(self.puts.len()) else {
            self.bytes[place % BLOCK_SIZE] ^= by;
            return;
        };
        let (at, len) = (self.puts[put].at, self.puts[put].bytes.len());
        if how & 1 == 0 {
            let all = self.bytes.len();
            self.bytes[if how & 2 == 0 { at + place % len } else { place % all }] ^= by;
            return;
        }
        let bytes = &mut self.bytes[at..at + len];
        bytes[4 + place % (len - 4)] ^= by;
        let crc = crc32(&bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        self.forged = true;
    }

    fn is_whole(&self, put: &Put) -> bool {
        self.bytes[put.at..put.at + put.bytes.len()] == put.bytes
    }

    /// The whole record of that number and of this life in a place.
    fn record_at(&self, at: usize, seqno: u64) -> Option<&Put> {
        let mut puts = self.puts.iter();
        puts.find(|put| {
            put.at == at && put.seqno == seqno && put.salt == SALT && self.is_whole(put)
        })
    }

    /// The records that follow each other from the checkpoint on, by the rules of the format.
    fn log(&self, offset: usize) -> Vec<&Put> {
        let (ring, longest) = (self.bytes.len(), record::framed_bytes(RECORD_BYTES_MAX));
        let (mut at, mut used, mut log) = (offset, 0, Vec::new());
        loop {
            let border = at.next_multiple_of(BLOCK_SIZE);
            let near_the_end = ring - at < longest + BLOCK_SIZE;
            let places = [Some(at), Some(border), near_the_end.then_some(ring)];
            let seqno = SEAL + 1 + to_u64(log.len());
            let found = places
                .into_iter()
                .flatten()
                .find_map(|place| Some((place - at, self.record_at(place % ring, seqno)?)));
            let Some((skipped, put)) = found else { return log };
            used += skipped + put.bytes.len();
            if used > ring {
                return log;
            }
            at = (put.at + put.bytes.len()) % ring;
            log.push(put);
        }
    }

    /// Whether a record further on says that number `next` was durable.
    fn lost(&self, next: u64) -> bool {
        let mut puts = self.puts.iter();
        puts.any(|put| {
            put.salt == SALT && put.seqno > next && put.durable >= next && self.is_whole(put)
        })
    }
}

fn new_volume(volume: u8, lba: u8, more: u8) -> NewVolume {
    NewVolume {
        id: VolumeId::new(u64::from(volume % 8)),
        name: ["a", "b", "c", "d", "e", "f", "../g", ""][usize::from(lba % 8)].into(),
        size_bytes: u64::from(more) * 1024,
        source: None,
        snapshot: false,
        read_only: false,
        reservation_blocks: 0,
        growth_limit_blocks: 0,
        io_limits: IoLimits::default(),
        labels: vec![],
        created_at: 0,
    }
}

fn new_properties(volume: u8, lba: u8) -> NewProperties {
    NewProperties {
        id: VolumeId::new(1 + u64::from(volume % 4)),
        size_bytes: (VOLUME_BLOCKS + u64::from(lba % 32)) * BLOCK_BYTES,
        read_only: lba & 32 == 32,
        reservation_blocks: 0,
        growth_limit_blocks: 0,
        io_limits: IoLimits::default(),
        labels: vec![],
    }
}

/// A record of one or two runs. Its data is there, or not, or other data is.
fn map(forge: &mut Forge, [volume, lba, block, len, data, more]: [u8; 6]) -> Record {
    let (mut runs, mut sums) = (Vec::new(), Vec::new());
    for number in 0..1 + u64::from(more & 1) {
        let first = match block {
            0xFF => BlockNo::new(u64::from(more)),
            _ => forge.block(DATA_AT + (u64::from(block) + 7 * number) % DATA_BLOCKS),
        };
        let len = 1 + u32::from(len % 3);
        let run = MapRun {
            volume: VolumeId::new(1 + (u64::from(volume) + number) % 3),
            lba: Lba::new(u64::from(lba) + 5 * number),
            block: first,
            len,
        };
        for block in (0..u64::from(len)).map(|offset| first.plus(offset)) {
            sums.push(crc32(&content(block)));
            if data < 0xE0 && block_is_data(forge, block) {
                forge.data(block);
            }
        }
        runs.push(run);
    }
    Record::Map { runs, sums }
}

/// Whether a block is one of those for data. What lies elsewhere is not written over.
fn block_is_data(forge: &Forge, block: BlockNo) -> bool {
    (forge.block(DATA_AT)..forge.block(DATA_AT + DATA_BLOCKS + 16)).contains(&block)
}

/// A volume as the records make it: bytes, and the block behind each LBA.
type Volumes = BTreeMap<u64, (String, u64, BTreeMap<u64, BlockNo>)>;

/// What a pool is found to hold after its journal was replayed; `None` if it must be refused.
struct Replayed {
    volumes: Volumes,
    /// Blocks of which the data is there.
    there: BTreeMap<BlockNo, u32>,
}

fn replay(
    log: &[&Put],
    forge: &Forge,
    sums: &BTreeMap<BlockNo, u32>,
    reached: &mut Reached,
) -> Option<Replayed> {
    let durable = log.iter().map(|put| put.durable).max().unwrap_or(0);
    let geometry = forge.superblock.geometry;
    // The catalogue lies in the first block of the group.
    let mut taken: Vec<BlockNo> = vec![forge.block(0)];
    let mut proved = Vec::new();
    for put in log {
        if let Record::Map { runs, .. } = &put.record {
            let blocks =
                |run: &MapRun| (0..u64::from(run.len)).map(|n| run.block.plus(n)).collect();
            let inside = |run: &MapRun| geometry.holds_run(run.block, u64::from(run.len));
            let whole = runs.iter().all(|run| {
                let blocks: Vec<BlockNo> = blocks(run);
                inside(run) && blocks.iter().all(|block| sums.contains_key(block))
            });
            if put.seqno > durable && !whole {
                reached.note("ends at data");
                break;
            }
            for run in runs {
                let blocks: Vec<BlockNo> = blocks(run);
                if !inside(run) || blocks.iter().any(|block| taken.contains(block)) {
                    return None;
                }
                taken.extend(blocks);
            }
        }
        proved.push(put);
    }
    let mut volumes = Volumes::new();
    for (id, name) in [(1, "a"), (2, "b")] {
        volumes.insert(id, (name.into(), VOLUME_BLOCKS * BLOCK_BYTES, BTreeMap::new()));
    }
    let mut next_id = 3;
    for put in proved {
        apply(&put.record, &mut volumes, &mut next_id)?;
    }
    Some(Replayed { volumes, there: sums.clone() })
}

/// Carries a record out; `None` if it cannot be.
fn apply(record: &Record, volumes: &mut Volumes, next_id: &mut u64) -> Option<()> {
    match record {
        Record::Map { runs, .. } => {
            for run in runs {
                let (_, size, _) = volumes.get(&run.volume.get())?;
                let end = run.lba.get() + u64::from(run.len);
                (end <= size.div_ceil(BLOCK_BYTES)).then_some(())?;
            }
            for run in runs {
                let map = &mut volumes.get_mut(&run.volume.get())?.2;
                for n in 0..u64::from(run.len) {
                    map.insert(run.lba.get() + n, run.block.plus(n));
                }
            }
        }
        Record::Unmap { volume, lba, len } => {
            let (_, size, map) = volumes.get_mut(&volume.get())?;
            let end = lba.get() + len;
            (*len > 0 && end <= size.div_ceil(BLOCK_BYTES)).then_some(())?;
            map.retain(|at, _| *at < lba.get() || *at >= end);
        }
        Record::Create(new) => {
            for new in new {
                let good = |c: char| c.is_ascii_alphanumeric();
                let named = !new.name.is_empty() && new.name.chars().all(good);
                let free = volumes.values().all(|(name, ..)| *name != new.name);
                let sized = new.size_bytes.is_multiple_of(512) && new.size_bytes >= BLOCK_BYTES;
                (named && free && sized && new.id.get() >= *next_id).then_some(())?;
                *next_id = new.id.get() + 1;
                volumes.insert(new.id.get(), (new.name.clone(), new.size_bytes, BTreeMap::new()));
            }
        }
        Record::Modify(new) => {
            let (_, size, _) = volumes.get_mut(&new.id.get())?;
            (new.size_bytes >= *size).then_some(())?;
            *size = new.size_bytes;
        }
        Record::Delete(id) => drop(volumes.remove(&id.get())?),
    }
    Some(())
}

/// The reader alone. `expected` is the log, and whether a record is lost.
fn read(
    image: &SimImage,
    superblock: &Superblock,
    expected: Option<(&[&Put], bool)>,
    reached: &mut Reached,
) {
    let sim = SimDisk::from_image(image.clone(), 1, SimOptions::default());
    let done = sim.run(async {
        let mut log = LogReader::behind(&sim.disk(), superblock);
        let mut found: Vec<Framed> = Vec::new();
        while let Some(framed) = log.next().await.expect("a sound disk") {
            assert_eq!(framed.seqno.get(), SEAL + 1 + to_u64(found.len()), "a gap is read over");
            let mut again = Vec::new();
            record::encode(&framed.record, framed.seqno, framed.durable, SALT, &mut again)
                .expect("what was read can be written");
            assert_eq!(again.len(), framed.bytes);
            found.push(framed);
        }
        let next = Seqno::new(SEAL + 1 + to_u64(found.len()));
        let lost = lost_record(&sim.disk(), superblock, next).await.expect("a sound disk");
        (found, lost.is_some())
    });
    let (found, lost) = done.expect("the power stays on");
    let Some((log, is_lost)) = expected else { return };
    let same = |(framed, put): (&Framed, &&Put)| {
        framed.record == put.record && framed.durable.get() == put.durable
    };
    assert!(found.len() == log.len() && found.iter().zip(log).all(same), "another log is read");
    assert_eq!(lost, is_lost, "whether a record is lost");
    reached.add("records", to_u64(found.len()));
}

/// The pool: outer `None` if nobody knows what it must hold, inner `None` if it must be refused.
fn open(image: SimImage, expected: Option<Option<Replayed>>, reached: &mut Reached) {
    let sim = SimDisk::from_image(image, 1, SimOptions::default());
    sim.set_cut_at(EVENTS_MAX);
    let done = sim.run(async {
        let pool = Config::default().open(&sim).await;
        let Some(expected) = expected else { return };
        let (pool, expected) = match (pool, expected) {
            (Ok(pool), Some(expected)) => (pool, expected),
            (Err(error), None) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                return reached.note("refused");
            }
            (Err(error), Some(_)) => panic!("does not open: {error}"),
            (Ok(_), None) => panic!("opens, though its log is broken"),
        };
        reached.note("opened");
        let list = pool.list(None, usize::MAX).0;
        let found: Vec<_> = list.iter().map(|v| (v.id.get(), &v.name, v.size_bytes)).collect();
        let wanted: Vec<_> =
            expected.volumes.iter().map(|(id, (name, size, _))| (*id, name, *size)).collect();
        let mut found_by_id = found.clone();
        found_by_id.sort_unstable();
        assert_eq!(found_by_id, wanted, "volumes");
        for (id, (_, size, map)) in &expected.volumes {
            let device = pool.device(VolumeId::new(*id)).expect("it exists");
            for lba in 0..size.div_ceil(BLOCK_BYTES) {
                let at = lba * BLOCK_BYTES;
                let read = device.read(at, to_u32((size - at).min(BLOCK_BYTES))).await;
                match (map.get(&lba), read) {
                    (None, Ok(data)) => assert!(data.bytes().iter().all(|byte| *byte == 0)),
                    (Some(block), Ok(data)) => {
                        let right = content(*block);
                        assert!(data.bytes() == &right[..data.bytes().len()], "volume {id}, {lba}");
                    }
                    (Some(block), Err(error)) => {
                        assert!(!expected.there.contains_key(block), "volume {id}, {lba}: {error}");
                        reached.note("errors of data");
                    }
                    (None, Err(error)) => panic!("volume {id}, lba {lba}: {error}"),
                }
            }
        }
        let report = check_offline(&sim.disk(), &|_, _| ()).await.expect("a sound disk");
        assert!(report.findings.is_empty(), "{:?}", report.findings);
    });
    assert!(done.is_some(), "it hangs");
}
