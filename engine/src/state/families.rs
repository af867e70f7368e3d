//! Which volumes can share blocks. Clones and snapshots make a family of their source and
//! themselves; blocks are shared within a family only.
//!
//! `shared_at` alone cannot show that a copy is gone: a block that was written before the copy
//! stays "possibly shared" for ever. A volume that is the last of its family shares nothing, once a
//! checkpoint has settled every reference of the others. From then on all that it maps is its own.
//!
//! Temporary snapshots (an export reads from one) are counted apart: they go by themselves, so
//! limits and promises ignore them.
//!
//! Families live in memory. After a restart the family of a volume whose source is gone is unknown;
//! such volumes, and all older ones that their source may have been copied from, count as one.

use std::collections::{BTreeMap, BTreeSet};

use super::Volume;
use crate::units::{Seqno, VolumeId};

/// Label of what a program removes when it is done: the snapshot that an export reads from, a
/// volume that is being imported.
pub const TEMPORARY_LABEL: &str = "pando/temporary";
/// The founder of the family of those whose founder is unknown. No volume has this identity.
const UNKNOWN: VolumeId = VolumeId::new(0);

/// Whether a volume or snapshot with these properties is a temporary snapshot.
#[must_use]
pub fn is_temporary(snapshot: bool, labels: &[(String, String)]) -> bool {
    snapshot && labels.iter().any(|(key, _)| key == TEMPORARY_LABEL)
}

/// What a volume may share blocks with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// With others of its family. Only what was written after the last copy is surely its own.
    Family,
    /// With temporary snapshots at most.
    Temporary,
    /// With nothing.
    Nothing,
}

/// The families of a pool's volumes.
#[derive(Default)]
pub struct Families {
    /// By founder: the identity of the first of them, which may be gone.
    families: BTreeMap<VolumeId, Family>,
    /// Families that a volume has left, and the record of the last departure. Its references go
    /// with a later checkpoint.
    unsettled: BTreeMap<VolumeId, Seqno>,
}

#[derive(Default)]
struct Family {
    /// Volumes and snapshots that stay until somebody deletes them.
    lasting: BTreeSet<VolumeId>,
    temporary: BTreeSet<VolumeId>,
}

impl Family {
    /// Its only lasting member, if it has no other.
    fn only(&self) -> Option<VolumeId> {
        self.lasting.first().copied().filter(|_| self.lasting.len() == 1)
    }

    fn sharing_of_only(&self) -> Sharing {
        if self.temporary.is_empty() { Sharing::Nothing } else { Sharing::Temporary }
    }
}

impl Families {
    /// The families of the volumes of a catalogue. What they share becomes known with the first
    /// checkpoint that leaves no deletion under way: see [`Self::settle`].
    #[must_use]
    pub fn of(volumes: &mut BTreeMap<VolumeId, Volume>, seal: Seqno) -> Self {
        let sources = volumes.values().filter_map(|volume| volume.entry.source);
        let newest_lost = sources.filter(|source| !volumes.contains_key(source)).max();
        let mut founders: BTreeMap<VolumeId, VolumeId> = BTreeMap::new();
        for (id, volume) in volumes.iter() {
            let founder = match volume.entry.source {
                // A source is older than its copies, so its founder has been found already.
                Some(source) => founders.get(&source).copied().unwrap_or(UNKNOWN),
                None if newest_lost.is_some_and(|lost| *id < lost) => UNKNOWN,
                None => *id,
            };
            founders.insert(*id, founder);
        }
        let mut all = Self::default();
        for (id, volume) in volumes {
            volume.founder = founders[id];
            volume.sharing = Sharing::Family;
            all.join(volume);
            all.unsettled.insert(volume.founder, seal);
        }
        all
    }

    fn join(&mut self, volume: &Volume) {
        let family = self.families.entry(volume.founder).or_default();
        let members =
            if volume.is_temporary() { &mut family.temporary } else { &mut family.lasting };
        members.insert(volume.entry.id);
    }

    /// A new volume, whose founder is set. Returns the member that shares more from now on, and
    /// with what.
    pub fn add(&mut self, volume: &Volume) -> Option<(VolumeId, Sharing)> {
        let only = self.families.get(&volume.founder).and_then(Family::only);
        self.join(volume);
        let sharing = if volume.is_temporary() { Sharing::Temporary } else { Sharing::Family };
        only.map(|id| (id, sharing))
    }

    /// A volume is gone by record `seqno`.
    pub fn remove(&mut self, volume: &Volume, seqno: Seqno) {
        let Some(family) = self.families.get_mut(&volume.founder) else { return };
        family.lasting.remove(&volume.entry.id);
        family.temporary.remove(&volume.entry.id);
        if family.lasting.is_empty() && family.temporary.is_empty() {
            self.families.remove(&volume.founder);
            self.unsettled.remove(&volume.founder);
        } else {
            self.unsettled.insert(volume.founder, seqno);
        }
    }

    /// A checkpoint with everything up to `seal` is durable, and no deletion is under way behind
    /// it: every reference of what was deleted before is gone. Returns the volumes that share less
    /// than they may have shared before. Each family is looked at once after a departure.
    pub fn settle(&mut self, seal: Seqno) -> Vec<(VolumeId, Sharing)> {
        let mut alone = Vec::new();
        let families = &self.families;
        self.unsettled.retain(|founder, seqno| {
            let settled = *seqno <= seal;
            if settled && let Some(family) = families.get(founder) {
                alone.extend(family.only().map(|id| (id, family.sharing_of_only())));
            }
            !settled
        });
        alone
    }

    /// Volumes that all families together hold: for the checker.
    #[must_use]
    pub fn members(&self) -> usize {
        self.families.values().map(|f| f.lasting.len() + f.temporary.len()).sum()
    }
}

#[cfg(feature = "daemon")]
const _: () = assert!(
    matches!(TEMPORARY_LABEL.as_bytes(), b"pando/temporary")
        && matches!(pando_proto::TEMPORARY_LABEL.as_bytes(), b"pando/temporary"),
    "the API names the label"
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::catalogue::VolumeEntry;

    fn volume(id: u64, source: Option<u64>, labels: &[(&str, &str)]) -> Volume {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Volume::new(VolumeEntry {
            id: VolumeId::new(id),
            name: format!("v{id}"),
            size_bytes: 4096,
            source: source.map(VolumeId::new),
            snapshot: source.is_some(),
            read_only: false,
            reservation_blocks: 0,
            growth_limit_blocks: 0,
            io_limits: crate::format::catalogue::IoLimits::default(),
            labels,
            created_at: 0,
            root: None,
            shared_at: Seqno::new(0),
            held_blocks: 0,
            frozen_blocks: 0,
        })
    }

    fn catalogue(volumes: &[(u64, Option<u64>)]) -> BTreeMap<VolumeId, Volume> {
        volumes.iter().map(|(id, source)| (VolumeId::new(*id), volume(*id, *source, &[]))).collect()
    }

    fn alone(families: &mut Families, seal: u64) -> Vec<u64> {
        families.settle(Seqno::new(seal)).iter().map(|(id, _)| id.get()).collect()
    }

    #[test]
    fn a_departure_is_settled_by_a_later_checkpoint() {
        let mut volumes = catalogue(&[(1, None), (2, Some(1)), (3, None)]);
        let mut families = Families::of(&mut volumes, Seqno::new(10));
        assert_eq!(alone(&mut families, 10), [3]);
        families.remove(&volumes[&VolumeId::new(2)], Seqno::new(20));
        assert!(alone(&mut families, 19).is_empty(), "the checkpoint does not hold the deletion");
        assert_eq!(alone(&mut families, 20), [1]);
        assert!(alone(&mut families, 30).is_empty(), "once");
    }

    #[test]
    fn temporary_snapshots_are_counted_apart() {
        let mut volumes = catalogue(&[(1, None)]);
        let mut families = Families::of(&mut volumes, Seqno::new(1));
        let mut export = volume(2, Some(1), &[(TEMPORARY_LABEL, "export")]);
        export.founder = VolumeId::new(1);
        assert_eq!(families.add(&export), Some((VolumeId::new(1), Sharing::Temporary)));
        assert_eq!(families.settle(Seqno::new(5)), [(VolumeId::new(1), Sharing::Temporary)]);
        families.remove(&export, Seqno::new(6));
        assert_eq!(families.settle(Seqno::new(6)), [(VolumeId::new(1), Sharing::Nothing)]);
    }

    /// Volume 4 comes from volume 3, which is gone: 1 and 2 may be what that was copied from.
    #[test]
    fn those_of_unknown_descent_count_as_one_family() {
        let mut volumes = catalogue(&[(1, None), (2, None), (4, Some(3)), (5, None)]);
        let mut families = Families::of(&mut volumes, Seqno::new(1));
        assert_eq!(alone(&mut families, 1), [5]);
        families.remove(&volumes[&VolumeId::new(4)], Seqno::new(2));
        assert!(alone(&mut families, 2).is_empty());
        families.remove(&volumes[&VolumeId::new(2)], Seqno::new(3));
        assert_eq!(alone(&mut families, 3), [1]);
        assert_eq!(families.members(), 2);
    }
}
