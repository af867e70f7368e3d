//! L3: the state of the pool. It changes only in [`State::apply`], in the order of the journal:
//! the live path, replay and the tests use the same door. Deterministic, no I/O, no clock.
//!
//! Invariants: every block is counted or free (I5), with the log of reference changes added to
//! the tables of the last checkpoint; the map of each volume is the fold of its records.

mod apply;
mod families;
mod volumes;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use apply::{NODE_RESERVE, Need};
pub use families::{Families, Sharing, TEMPORARY_LABEL, is_temporary};
pub use volumes::{Volume, check_entry, check_name};

use crate::format::catalogue::{Catalogue, GroupEntry, VolumeEntry, entry_bytes};
use crate::format::geometry::{Geometry, Table};
use crate::map::{NodeCache, RefDelta};
use crate::space::{FreshSums, MissingTable, Reuse, Space, Tables};
use crate::units::{BlockNo, Seqno, VolumeId, to_u64};

/// Everything that a record can change, and the caches behind it.
pub struct State {
    /// The places in the pool.
    pub geometry: Geometry,
    /// Identity of the pool.
    pub uuid: [u8; 16],
    /// Volumes and snapshots.
    pub volumes: BTreeMap<VolumeId, Arc<Volume>>,
    /// Their names.
    pub names: BTreeMap<String, VolumeId>,
    /// Which of them can share blocks.
    pub families: Families,
    /// Identity of the next volume.
    pub next_id: u64,
    /// Sum of what the volumes can be promised with their reservations, in blocks.
    pub promises_max: u64,
    /// Bytes of the entries of all volumes in a catalogue, at most.
    pub entries_bytes: u64,
    /// Nodes of the maps.
    pub cache: NodeCache,
    /// Changes of reference counts since the seal.
    pub log: Vec<RefDelta>,
    /// Checksums of blocks written since the seal.
    pub sums: FreshSums,
    /// Checksums that the checkpoint under way is merging into the tables.
    pub sealed_sums: Option<FreshSums>,
    /// Free blocks.
    pub space: Space,
    /// Freed blocks on their way back.
    pub reuse: Reuse,
    /// The tables of the last durable checkpoint.
    pub tables: Tables,
    /// Blocks set aside for new nodes, taken from the end.
    pub node_blocks: Vec<BlockNo>,
    /// Last record applied.
    pub seqno: Seqno,
    /// Last record in the last sealed checkpoint.
    pub seal: Seqno,
}

/// Adds up for each volume what its clones and snapshots have frozen.
fn with_frozen(mut volumes: BTreeMap<VolumeId, Volume>) -> BTreeMap<VolumeId, Arc<Volume>> {
    let frozen: Vec<_> = volumes
        .values()
        .filter_map(|v| Some((v.entry.source?, v.entry.frozen_blocks)))
        .filter(|(_, blocks)| *blocks > 0)
        .collect();
    for (source, blocks) in frozen {
        if let Some(source) = volumes.get_mut(&source) {
            source.frozen_blocks += blocks;
        }
    }
    volumes.into_iter().map(|(id, volume)| (id, Arc::new(volume))).collect()
}

fn entries_bytes(volumes: &BTreeMap<VolumeId, Arc<Volume>>) -> u64 {
    volumes.values().map(|v| entry_bytes(&v.entry.name, &v.entry.labels)).sum()
}

impl State {
    /// The state that a checkpoint describes.
    #[must_use]
    pub fn new(
        geometry: Geometry,
        uuid: [u8; 16],
        catalogue: Catalogue,
        seal: Seqno,
        cache: NodeCache,
        table_pages: usize,
    ) -> Self {
        let free: Vec<u64> = catalogue.groups.iter().map(|g| u64::from(g.free)).collect();
        let mut volumes: BTreeMap<_, _> =
            catalogue.volumes.into_iter().map(|e| (e.id, Volume::new(e))).collect();
        let families = Families::of(&mut volumes, seal);
        let volumes = with_frozen(volumes);
        let names = volumes.values().map(|v| (v.entry.name.clone(), v.entry.id)).collect();
        Self {
            geometry,
            uuid,
            promises_max: volumes.values().map(|v| v.promise_max(cache.fanout())).sum(),
            entries_bytes: entries_bytes(&volumes),
            names,
            volumes,
            families,
            next_id: catalogue.next_id,
            cache,
            log: Vec::new(),
            sums: FreshSums::default(),
            sealed_sums: None,
            space: Space::new(geometry, free.into_iter()),
            reuse: Reuse::default(),
            tables: Tables::new(geometry, uuid, catalogue.groups, table_pages),
            node_blocks: Vec::new(),
            seqno: seal,
            seal,
        }
    }

    /// The volume, if it exists.
    #[must_use]
    pub fn volume(&self, id: VolumeId) -> Option<&Volume> {
        self.volumes.get(&id).map(AsRef::as_ref)
    }

    /// The volume, to be changed; a checkpoint under way keeps its own copy.
    pub fn volume_mut(&mut self, id: VolumeId) -> Option<&mut Volume> {
        self.volumes.get_mut(&id).map(Arc::make_mut)
    }

    /// The checksum that a block must have.
    ///
    /// # Errors
    /// The header or page of the table to read first.
    pub fn sum_of(&mut self, block: BlockNo) -> Result<u32, MissingTable> {
        let Some((page, entry)) = self.geometry.page_of(Table::Sums, block) else { return Ok(0) };
        let fresh = self.sums.get(page, entry);
        let fresh = fresh.or_else(|| self.sealed_sums.as_ref()?.get(page, entry));
        match fresh {
            Some(sum) => Ok(sum),
            None => Ok(self.tables.page(page)?.map_or(0, |p| p.get(entry))),
        }
    }

    /// Sum of what the volumes were promised and do not have yet, in blocks.
    #[must_use]
    pub fn reserved_blocks(&self) -> u64 {
        self.volumes.values().map(|v| v.promise(self.cache.fanout())).sum()
    }

    /// The pool has become longer, with these entries of its groups.
    pub fn grow(&mut self, geometry: Geometry, groups: Vec<GroupEntry>) {
        let old = self.geometry;
        let last = old.groups() - 1;
        let added = geometry.group_len(last) - old.group_len(last);
        if added > 0 {
            self.space.lengthen(crate::units::to_u32(last), added);
        }
        self.geometry = geometry;
        self.space.grow(geometry, groups.iter().map(|g| u64::from(g.free)));
        self.tables.grow(geometry, groups);
    }

    /// Sums that are not the sums of what they stand for: for the checker.
    #[must_use]
    pub fn wrong_sums(&self) -> Vec<String> {
        let mut wrong = self.space.wrong_sums();
        let mut compare = |what: &str, kept: u64, is: u64| {
            if kept != is {
                wrong.push(format!("{what}: {is}, {kept} are kept in memory"));
            }
        };
        let promises_max = self.volumes.values().map(|v| v.promise_max(self.cache.fanout())).sum();
        compare("blocks promised at most", self.promises_max, promises_max);
        compare("bytes of entries", self.entries_bytes, entries_bytes(&self.volumes));
        let named =
            self.volumes.values().filter(|v| self.names.get(&v.entry.name) == Some(&v.entry.id));
        compare("volumes by name", to_u64(self.names.len()), to_u64(named.count()));
        let members = to_u64(self.families.members());
        compare("volumes in families", members, to_u64(self.volumes.len()));
        let mut frozen: BTreeMap<VolumeId, u64> = BTreeMap::new();
        for entry in self.volumes.values().map(|v| &v.entry) {
            if let Some(source) = entry.source {
                *frozen.entry(source).or_default() += entry.frozen_blocks;
            }
        }
        for (id, volume) in &self.volumes {
            let is = frozen.get(id).copied().unwrap_or_default();
            compare(&format!("blocks frozen of {id}"), volume.frozen_blocks, is);
        }
        wrong
    }

    /// The entries for the catalogue.
    #[must_use]
    pub fn entries(volumes: &BTreeMap<VolumeId, Arc<Volume>>) -> Vec<VolumeEntry> {
        volumes.values().map(|v| v.entry.clone()).collect()
    }
}
