//! The roots of all structures: the superblock slots and the catalogue.

use std::collections::BTreeSet;
use std::rc::Rc;

use crate::disk::Disk;
use crate::format::catalogue::{Catalogue, VolumeEntry};
use crate::format::geometry::SUPER_SLOTS;
use crate::format::superblock::Superblock;
use crate::limits::{GENERATIONS_SKIPPED, MAP_LEVELS_MAX, VOLUME_ID_MAX, VOLUMES_MAX};
use crate::pool::checkpoint::load::superblock_at;
use crate::state::check_entry;
use crate::units::to_usize;

use super::findings::{FindingKind as Kind, Findings};

/// Which slots must be whole. A power failure may tear a slot that is being written. An open pool
/// has rewritten both with its first two checkpoints.
#[derive(Clone, Copy)]
pub(super) struct Strict {
    /// Both places of the newest superblock.
    pub(super) newest: bool,
    /// Both places of the one before.
    pub(super) older: bool,
}

/// K11: checks the superblock slots. `newest` is the superblock in use.
pub(super) async fn superblocks(
    disk: &Rc<dyn Disk>,
    newest: &Superblock,
    strict: Strict,
    findings: &mut Findings,
) {
    let generation = newest.generation.get();
    let slot = u64::from(generation) % SUPER_SLOTS;
    for place in newest.geometry.super_places(slot) {
        match superblock_at(disk, slot, place).await {
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
            Err(error) => findings.add(Kind::Superblock, error),
        }
    }
    // Generation 1 is the first: the other slot is empty then. Opening skips generations.
    let may_precede = |found: &Superblock| {
        [1, 1 + GENERATIONS_SKIPPED]
            .iter()
            .any(|by| found.generation.plus(*by) == newest.generation)
    };
    let mut twin: Option<Superblock> = None;
    for place in newest.geometry.super_places(1 - slot).into_iter().filter(|_| generation > 1) {
        match superblock_at(disk, 1 - slot, place).await {
            Ok(found) => {
                let older = found.generation < newest.generation && found.uuid == newest.uuid;
                let precedes =
                    may_precede(&found) && twin.as_ref().is_none_or(|twin| *twin == found);
                if !(older && (precedes || !strict.older)) {
                    let what = format!(
                        "superblock at {place}: {} lies there, which is not the one before {}",
                        found.generation, newest.generation
                    );
                    findings.add(Kind::Superblock, what);
                }
                twin = Some(found);
            }
            Err(_) if !strict.older => {}
            Err(error) => findings.add(Kind::Superblock, error),
        }
    }
}

/// K13: checks the consistency of the catalogue. Returns false unless it has one entry per group;
/// then nothing else can be checked.
pub(super) fn catalogue(
    superblock: &Superblock,
    catalogue: &Catalogue,
    findings: &mut Findings,
) -> bool {
    let geometry = superblock.geometry;
    let (next_id, volumes) = (catalogue.next_id, catalogue.volumes.len());
    if next_id > VOLUME_ID_MAX || volumes > VOLUMES_MAX {
        let what = format!("catalogue: {volumes} volumes, the next is said to be {next_id}");
        findings.add(Kind::Catalogue, what);
    }
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
        let too_free = u64::from(entry.free) > geometry.group_len(group);
        if entry.generation > superblock.generation || entry.slot > 1 || too_free {
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
