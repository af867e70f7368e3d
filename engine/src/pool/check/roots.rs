//! What leads to everything else: the superblock slots, the catalogue and the journal.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::checkpoint::load::read_block;
use crate::disk::Disk;
use crate::error::Error;
use crate::format::catalogue::{Catalogue, VolumeEntry};
use crate::format::geometry::Geometry;
use crate::format::record::{Framed, Record};
use crate::format::superblock::Superblock;
use crate::journal::{LogReader, lost_record};
use crate::limits::MAP_LEVELS_MAX;
use crate::state::check_entry;
use crate::units::{BlockNo, Generation, Lba, Seqno, VolumeId, blocks_for, to_usize};

use super::findings::{FindingKind as Kind, Findings};

/// Which slots must be whole. A power failure may tear a slot that is being written, and an open
/// pool makes both whole with its first two checkpoints.
#[derive(Clone, Copy)]
pub(super) struct Strict {
    /// Both places of the newest superblock.
    pub(super) newest: bool,
    /// Both places of the one before.
    pub(super) older: bool,
}

/// K11: the superblock slots. `newest` is the one that counts.
pub(super) async fn superblocks(
    disk: &Rc<dyn Disk>,
    newest: &Superblock,
    strict: Strict,
    findings: &mut Findings,
) {
    let generation = newest.generation.get();
    let slot = u64::from(generation % 2);
    for place in newest.geometry.super_places(slot) {
        match slot_at(disk, place).await {
            Ok(found) if found == *newest => {}
            Ok(found) if !strict.newest && found.generation < newest.generation => {}
            Err(_) if !strict.newest => {}
            Ok(found) => {
                let what = format!(
                    "superblock at {place}: {} lies there, not {}",
                    found.generation, newest.generation
                );
                findings.add(Kind::Superblock, what);
            }
            Err(what) => findings.add(Kind::Superblock, what),
        }
    }
    // Before the first checkpoint after format the other slot is empty.
    let Some(before) = generation.checked_sub(1).filter(|g| *g > 0).map(Generation::new) else {
        return;
    };
    for place in newest.geometry.super_places(1 - slot) {
        match slot_at(disk, place).await {
            Ok(found) if found.generation == before && found.uuid == newest.uuid => {}
            Ok(found) if !strict.older && found.generation < before => {}
            Err(_) if !strict.older => {}
            Ok(found) => {
                let what =
                    format!("superblock at {place}: {} lies there, not {before}", found.generation);
                findings.add(Kind::Superblock, what);
            }
            Err(what) => findings.add(Kind::Superblock, what),
        }
    }
}

async fn slot_at(disk: &Rc<dyn Disk>, place: BlockNo) -> Result<Superblock, String> {
    let buf = read_block(disk, place).await.map_err(|e| format!("superblock at {place}: {e}"))?;
    Superblock::decode(buf.as_bytes(), place).map_err(|error| error.to_string())
}

/// K13: what the catalogue says fits together. Returns false when it has not one entry for each
/// group, so that nothing else can be looked at.
pub(super) fn catalogue(
    superblock: &Superblock,
    catalogue: &Catalogue,
    findings: &mut Findings,
) -> bool {
    let geometry = superblock.geometry;
    let mut last = None;
    let mut names = BTreeSet::new();
    for volume in &catalogue.volumes {
        let VolumeEntry { id, name, .. } = volume;
        let mut bad = |what: String| findings.add(Kind::Catalogue, format!("catalogue: {what}"));
        if last >= Some(*id) {
            bad(format!("{id} ({name}) is out of order or there twice"));
        }
        last = last.max(Some(*id));
        if id.get() >= catalogue.next_id {
            bad(format!("{id} ({name}) is there, the next is said to be {}", catalogue.next_id));
        }
        if !names.insert(name) {
            bad(format!("two volumes are named {name}"));
        }
        if let Err(error) = check_entry(volume) {
            bad(error.to_string());
        }
        if volume.source.is_some_and(|source| source >= *id) {
            bad(format!("volume {name} is older than its source"));
        }
        if volume.shared_at > superblock.seal {
            bad(format!("volume {name} was shared at {} to come", volume.shared_at));
        }
        if volume.root.is_some_and(|root| usize::from(root.level) >= MAP_LEVELS_MAX) {
            bad(format!("the map of volume {name} is too high"));
        }
    }
    let groups = (0u64..).zip(&catalogue.groups);
    for (group, entry) in groups.take(to_usize(geometry.groups())) {
        if entry.generation > superblock.generation || entry.slot > 1 {
            let what = format!("catalogue: entry of group {group} is impossible");
            findings.add(Kind::Catalogue, what);
        }
    }
    let whole = crate::units::to_u64(catalogue.groups.len()) == geometry.groups();
    if !whole {
        let what = format!(
            "catalogue: {} groups, the pool has {}",
            catalogue.groups.len(),
            geometry.groups()
        );
        findings.add(Kind::Catalogue, what);
    }
    whole
}

/// K10 and K12: the journal behind the checkpoint. `durable` is what an open pool knows to be there
/// at least.
pub(super) async fn journal(
    disk: &Rc<dyn Disk>,
    superblock: &Superblock,
    known: Option<&Catalogue>,
    durable: Option<Seqno>,
    findings: &mut Findings,
) {
    if let Err(error) = read_journal(disk, superblock, known, durable, findings).await {
        findings.add(Kind::Journal, error);
    }
}

async fn read_journal(
    disk: &Rc<dyn Disk>,
    superblock: &Superblock,
    known: Option<&Catalogue>,
    durable: Option<Seqno>,
    findings: &mut Findings,
) -> Result<(), Error> {
    let mut log = LogReader::behind(disk, superblock);
    let mut targets = known.map(|catalogue| Targets::new(superblock.geometry, catalogue));
    let mut last = superblock.seal;
    while let Some(framed) = log.next().await? {
        last = framed.seqno;
        if superblock.clean {
            let what = format!("the pool was closed, and record {} follows", last.get());
            findings.add(Kind::Clean, what);
            return Ok(());
        }
        if let Some(what) = targets.as_mut().and_then(|targets| targets.take(&framed)) {
            findings.add(Kind::Journal, format_args!("record {}: {what}", last.get()));
        }
    }
    let next = last.next();
    // An open pool writes meanwhile: what it knew before is what can be asked for.
    let proof = match durable {
        Some(durable) => (durable >= next).then(|| "it was durable".to_owned()),
        None => lost_record(disk, superblock, next)
            .await?
            .map(|later| format!("record {} says that it was durable", later.get())),
    };
    if let Some(proof) = proof {
        let what = format!("record {} is damaged or lost: {proof}", next.get());
        findings.add(Kind::Journal, what);
    }
    Ok(())
}

/// The volumes as the records see them.
struct Targets {
    geometry: Geometry,
    lbas: BTreeMap<VolumeId, u64>,
}

impl Targets {
    fn new(geometry: Geometry, catalogue: &Catalogue) -> Self {
        let lbas = catalogue.volumes.iter().map(|v| (v.id, blocks_for(v.size_bytes)));
        Self { geometry, lbas: lbas.collect() }
    }

    /// Takes a record; says what is wrong with it.
    fn take(&mut self, framed: &Framed) -> Option<String> {
        match &framed.record {
            Record::Map { runs, .. } => runs.iter().find_map(|run| {
                let len = u64::from(run.len);
                let lies = self.geometry.holds_run(run.block, len);
                let outside = || format!("{len} blocks on {} are in no group", run.block);
                self.range(run.volume, run.lba, len).or_else(|| (!lies).then(outside))
            }),
            Record::Unmap { volume, lba, len } => self.range(*volume, *lba, *len),
            Record::Create(volumes) => {
                let known = |id: &VolumeId| self.lbas.contains_key(id);
                let lost = volumes.iter().filter_map(|v| v.source).find(|source| !known(source));
                self.lbas.extend(volumes.iter().map(|v| (v.id, blocks_for(v.size_bytes))));
                lost.map(|source| format!("the source {source} does not exist"))
            }
            Record::Modify(new) => {
                let lbas = self.lbas.get_mut(&new.id);
                let Some(lbas) = lbas else { return Some(format!("no {}", new.id)) };
                *lbas = blocks_for(new.size_bytes);
                None
            }
            Record::Delete(id) => match self.lbas.remove(id) {
                Some(_) => None,
                None => Some(format!("no {id}")),
            },
        }
    }

    fn range(&self, volume: VolumeId, lba: Lba, len: u64) -> Option<String> {
        match self.lbas.get(&volume) {
            None => Some(format!("no {volume}")),
            Some(lbas) if lba.get().checked_add(len).is_some_and(|end| end <= *lbas) => None,
            Some(_) => Some(format!("{len} blocks at {lba} are beyond the end of {volume}")),
        }
    }
}
