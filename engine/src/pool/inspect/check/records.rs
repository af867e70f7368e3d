//! The journal after the checkpoint: whether it is whole, and whether each record can be applied
//! after the records before it.

use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasherDefault;
use std::rc::Rc;

use crate::disk::Disk;
use crate::error::Error;
use crate::format::catalogue::Catalogue;
use crate::format::geometry::{Geometry, PAGE_ENTRIES};
use crate::format::record::{Framed, MapRun, NewVolume, Record};
use crate::format::superblock::Superblock;
use crate::journal::{LogReader, lost_record};
use crate::space::KeyHasher;
use crate::units::{BlockNo, Lba, Seqno, VolumeId, blocks_for, to_usize};

use super::findings::{FindingKind as Kind, Findings};

/// K10 and K12: checks the journal after the checkpoint. `durable` is the last record that an open
/// pool knows to be durable. Returns the blocks that the records have written.
pub(super) async fn journal(
    disk: &Rc<dyn Disk>,
    superblock: &Superblock,
    known: Option<&Catalogue>,
    durable: Option<Seqno>,
    findings: &mut Findings,
) -> Written {
    let mut targets = Targets::new(superblock.geometry, known);
    if let Err(error) = read_journal(disk, superblock, &mut targets, durable, findings).await {
        findings.add(Kind::Journal, error);
    }
    targets.written
}

async fn read_journal(
    disk: &Rc<dyn Disk>,
    superblock: &Superblock,
    targets: &mut Targets,
    durable: Option<Seqno>,
    findings: &mut Findings,
) -> Result<(), Error> {
    let mut log = LogReader::behind(disk, superblock);
    let mut last = superblock.seal;
    while let Some(framed) = log.next().await? {
        last = framed.seqno;
        if superblock.clean {
            let what = format!("the pool was closed, and record {} follows", last.get());
            findings.add(Kind::Clean, what);
            return Ok(());
        }
        if let Some(what) = targets.take(&framed) {
            findings.add(Kind::Journal, format_args!("journal: record {}: {what}", last.get()));
        }
    }
    let next = last.next();
    // An open pool writes meanwhile, so only what was durable before the check is required.
    let proof = match durable {
        Some(durable) => (durable >= next).then(|| "it was durable".to_owned()),
        None => lost_record(disk, superblock, next)
            .await?
            .map(|later| format!("record {} says that it was durable", later.get())),
    };
    if let Some(proof) = proof {
        let what = format!("journal: record {} is damaged or lost: {proof}", next.get());
        findings.add(Kind::Journal, what);
    }
    Ok(())
}

/// Blocks that records have written: one bit each, in pages that are allocated with their first
/// bit; 32 MiB for 1 TiB.
#[derive(Default)]
pub(super) struct Written {
    pages: HashMap<u64, [u64; PAGE_WORDS], BuildHasherDefault<KeyHasher>>,
}

const PAGE_WORDS: usize = to_usize(PAGE_ENTRIES).div_ceil(64);

impl Written {
    /// Adds a block; returns false if it is present already.
    fn add(&mut self, geometry: &Geometry, block: BlockNo) -> bool {
        let Some((page, word, bit)) = place(geometry, block) else { return true };
        let word = &mut self.pages.entry(page).or_insert([0; PAGE_WORDS])[word];
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Whether a record has written the block.
    pub(super) fn has(&self, geometry: &Geometry, block: BlockNo) -> bool {
        place(geometry, block).is_some_and(|(page, word, bit)| {
            self.pages.get(&page).is_some_and(|words| words[word] & bit != 0)
        })
    }
}

fn place(geometry: &Geometry, block: BlockNo) -> Option<(u64, usize, u64)> {
    let (group, index) = geometry.locate(block)?;
    let page = group * geometry.group_pages + index / PAGE_ENTRIES;
    let within = index % PAGE_ENTRIES;
    Some((page, to_usize(within / 64), 1 << (within % 64)))
}

/// A volume as of the records read so far.
struct Target {
    name: String,
    size_bytes: u64,
    snapshot: bool,
}

/// The volumes as of the records read so far. Without a catalogue they are unknown.
struct Targets {
    geometry: Geometry,
    volumes: Option<BTreeMap<VolumeId, Target>>,
    next_id: u64,
    written: Written,
}

impl Targets {
    fn new(geometry: Geometry, known: Option<&Catalogue>) -> Self {
        let target = |name: &String, size_bytes, snapshot| Target {
            name: name.clone(),
            size_bytes,
            snapshot,
        };
        let volumes = known.map(|catalogue| {
            let volumes = catalogue.volumes.iter();
            volumes.map(|v| (v.id, target(&v.name, v.size_bytes, v.snapshot))).collect()
        });
        let next_id = known.map_or(0, |catalogue| catalogue.next_id);
        Self { geometry, volumes, next_id, written: Written::default() }
    }

    /// Applies a record; returns what is wrong with it.
    fn take(&mut self, framed: &Framed) -> Option<String> {
        match &framed.record {
            Record::Map { runs, sums } => {
                let blocks: u64 = runs.iter().map(|run| u64::from(run.len)).sum();
                let sums = crate::units::to_u64(sums.len());
                let told = || format!("{sums} checksums for {blocks} blocks");
                let wrong = runs.iter().filter_map(|run| self.run(run)).next();
                wrong.or_else(|| (sums != blocks).then(told))
            }
            Record::Unmap { volume, lba, len } => self.range(*volume, *lba, *len),
            Record::Create(volumes) => {
                let wrong = volumes.iter().filter_map(|new| self.create(new)).last();
                self.next_id = volumes
                    .iter()
                    .map(|v| v.id.get().saturating_add(1))
                    .fold(self.next_id, u64::max);
                wrong
            }
            Record::Modify(new) => {
                let volumes = self.volumes.as_mut()?;
                let Some(target) = volumes.get_mut(&new.id) else {
                    return Some(format!("no {}", new.id));
                };
                let before = std::mem::replace(&mut target.size_bytes, new.size_bytes);
                let shrinks = new.size_bytes < before;
                let wrong = shrinks || (target.snapshot && new.size_bytes != before);
                let what = format!("{}: from {before} to {} bytes", new.id, new.size_bytes);
                wrong.then_some(what)
            }
            Record::Delete(id) => match self.volumes.as_mut()?.remove(id) {
                Some(_) => None,
                None => Some(format!("no {id}")),
            },
        }
    }

    fn run(&mut self, run: &MapRun) -> Option<String> {
        let len = u64::from(run.len);
        if let Some(wrong) = self.range(run.volume, run.lba, len) {
            return Some(wrong);
        }
        if !self.geometry.holds_run(run.block, len) {
            return Some(format!("{len} blocks on {} are in no group", run.block));
        }
        let blocks = (0..len).map(|offset| run.block.plus(offset));
        let mut again = blocks.filter(|block| !self.written.add(&self.geometry, *block));
        again.next().map(|block| format!("{block} was written by a record before"))
    }

    fn create(&mut self, new: &NewVolume) -> Option<String> {
        let volumes = self.volumes.as_mut()?;
        let source = new.source.map(|source| (source, volumes.get(&source)));
        let wrong = if new.id.get() < self.next_id || volumes.contains_key(&new.id) {
            Some(format!("{} was there before", new.id))
        } else if volumes.values().any(|known| known.name == new.name) {
            Some(format!("two volumes are named {}", new.name))
        } else {
            match source {
                Some((source, None)) => Some(format!("the source {source} does not exist")),
                Some((source, Some(known))) if known.size_bytes > new.size_bytes => {
                    Some(format!("volume {} is smaller than its source {source}", new.name))
                }
                _ => None,
            }
        };
        let (name, size_bytes) = (new.name.clone(), new.size_bytes);
        volumes.insert(new.id, Target { name, size_bytes, snapshot: new.snapshot });
        wrong
    }

    fn range(&self, volume: VolumeId, lba: Lba, len: u64) -> Option<String> {
        let target = self.volumes.as_ref()?.get(&volume);
        match target.map(|target| blocks_for(target.size_bytes)) {
            None => Some(format!("no {volume}")),
            Some(lbas) if lba.get().checked_add(len).is_some_and(|end| end <= lbas) => None,
            Some(_) => Some(format!("{len} blocks at {lba} are beyond the end of {volume}")),
        }
    }
}
