//! What was asked for when, and when it was acknowledged; and of what is seen later, at which
//! moments a pool could have looked so.
//!
//! Operations of several shards have no order among them but that of time: what was acknowledged
//! before another was asked for comes before it. So each sector has a set of moments at which it
//! could have held what was read in it. What one request reads of a block, a snapshot, a group of
//! snapshots, and what a power failure leaves of the whole pool, is of one instant each: the sets
//! have a moment in common, and one between the question and the answer.

use std::collections::{BTreeMap, BTreeSet};

use pando_engine::units::to_usize;
use pando_sim::Model;
use pando_sim::model::{BLOCK_SECTORS, ModelVolume, Stamps};

/// A set of moments. There are 128 at most.
pub(crate) type Moments = u128;

/// All moments from `from` on.
const fn since(from: u32) -> Moments {
    if from >= Moments::BITS { 0 } else { Moments::MAX << from }
}

/// The moments from `from` up to and without `to`; no `to` is the end of time.
fn between(from: u32, to: Option<u32>) -> Moments {
    since(from) & !to.map_or(0, since)
}

/// A value that a sector was to get.
#[derive(Clone, Copy)]
struct Version {
    stamp: u64,
    asked_at: u32,
    /// From when on it was there for certain: acknowledged, or read by somebody.
    sure_at: Option<u32>,
}

/// A snapshot or clone.
#[derive(Clone)]
struct Copy {
    name: String,
    source: String,
}

/// Copies that were taken at one instant.
#[derive(Clone)]
struct Cut {
    copies: Vec<Copy>,
    asked_at: u32,
    sure_at: Option<u32>,
}

/// An operation under way.
#[must_use]
pub(crate) struct Asked {
    volume: String,
    sectors: std::ops::Range<u64>,
    pub(crate) stamp: u64,
    pub(crate) at: u32,
}

/// What existed before the race: volumes and their blocks.
pub(crate) type Before = BTreeMap<String, BTreeMap<u64, Stamps>>;

/// The blocks of a model, without its pointers, which are of one thread.
pub(crate) fn before(model: &Model) -> Before {
    let of = |volume: &ModelVolume| volume.blocks.clone();
    model.volumes.iter().map(|(name, volume)| (name.clone(), of(volume))).collect()
}

/// What was done when.
pub(crate) struct History {
    now: u32,
    stamps: u64,
    before: Before,
    /// By volume and sector.
    versions: BTreeMap<(String, u64), Vec<Version>>,
    cuts: Vec<Cut>,
    /// Births and ends of volumes: 1 and 0 for whether it is there.
    existence: BTreeMap<String, Vec<Version>>,
    /// What was acknowledged before this moment is durable.
    durable_before: u32,
    /// Somebody was told that the pool is poisoned.
    poisoned_at: Option<u32>,
}

impl History {
    pub(crate) fn new(before: &Before) -> Self {
        let there = Version { stamp: 1, asked_at: 0, sure_at: Some(0) };
        Self {
            now: 1,
            stamps: 1000,
            before: before.clone(),
            versions: BTreeMap::new(),
            cuts: Vec::new(),
            existence: before.keys().map(|name| (name.clone(), vec![there])).collect(),
            durable_before: 1,
            poisoned_at: None,
        }
    }

    pub(crate) fn moment(&mut self) -> u32 {
        self.now += 1;
        assert!(self.now < Moments::BITS, "a race is short");
        self.now
    }

    /// Sectors of a volume are to be written, or made zeros.
    pub(crate) fn ask(&mut self, volume: &str, first: u64, count: u64, zeros: bool) -> Asked {
        let at = self.moment();
        self.stamps += 1;
        let stamp = if zeros { 0 } else { self.stamps };
        for sector in first..first + count {
            let version = Version { stamp, asked_at: at, sure_at: None };
            self.versions_mut(volume, sector).push(version);
        }
        Asked { volume: volume.into(), sectors: first..first + count, stamp, at }
    }

    /// Somebody is told now that the pool is poisoned: nothing that is asked for later is
    /// acknowledged.
    pub(crate) fn poisoned(&mut self) {
        let moment = self.moment();
        self.poisoned_at.get_or_insert(moment);
    }

    fn check_alive(&self, asked_at: u32) {
        let alive = self.poisoned_at.is_none_or(|moment| asked_at < moment);
        assert!(alive, "acknowledged by a poisoned pool");
    }

    pub(crate) fn acknowledge(&mut self, asked: Asked) {
        self.check_alive(asked.at);
        let moment = self.moment();
        for sector in asked.sectors {
            let versions = self.versions_mut(&asked.volume, sector);
            let version = versions.iter_mut().find(|version| version.asked_at == asked.at);
            version.expect("it was asked for").sure_at.get_or_insert(moment);
        }
    }

    /// Copies are to be taken, all at one instant: names and sources.
    pub(crate) fn ask_copies(&mut self, copies: &[(String, String)]) -> usize {
        let asked_at = self.moment();
        let copy = |(name, source): &(String, String)| {
            let not_yet = Version { stamp: 0, asked_at: 0, sure_at: Some(0) };
            let born = Version { stamp: 1, asked_at, sure_at: None };
            self.existence.insert(name.clone(), vec![not_yet, born]);
            Copy { name: name.clone(), source: source.clone() }
        };
        let copies = copies.iter().map(copy).collect();
        self.cuts.push(Cut { copies, asked_at, sure_at: None });
        self.cuts.len() - 1
    }

    pub(crate) fn acknowledge_copies(&mut self, number: usize) {
        let moment = self.moment();
        self.cuts[number].sure_at = Some(moment);
        for copy in self.cuts[number].copies.clone() {
            self.be_sure(&copy.name, moment);
        }
        self.durable_since(self.cuts[number].asked_at);
    }

    /// A volume is to be deleted.
    pub(crate) fn ask_end(&mut self, volume: &str) -> u32 {
        let asked_at = self.moment();
        let end = Version { stamp: 0, asked_at, sure_at: None };
        self.existence.entry(volume.into()).or_default().push(end);
        asked_at
    }

    pub(crate) fn acknowledge_end(&mut self, volume: &str, asked_at: u32) {
        let moment = self.moment();
        self.be_sure(volume, moment);
        self.durable_since(asked_at);
    }

    fn be_sure(&mut self, volume: &str, moment: u32) {
        let versions = self.existence.get_mut(volume).expect("it was asked for");
        versions.last_mut().expect("it was asked for").sure_at = Some(moment);
    }

    /// A flush, or what implies one, that was asked for then is done.
    pub(crate) fn durable_since(&mut self, asked_at: u32) {
        self.check_alive(asked_at);
        self.durable_before = self.durable_before.max(asked_at);
    }

    fn versions_mut(&mut self, volume: &str, sector: u64) -> &mut Vec<Version> {
        let before = &self.before;
        self.versions.entry((volume.into(), sector)).or_insert_with(|| {
            let blocks = before.get(volume);
            let stamps = blocks.and_then(|blocks| blocks.get(&(sector / BLOCK_SECTORS)));
            let stamp = stamps.map_or(0, |stamps| stamps[to_usize(sector % BLOCK_SECTORS)]);
            vec![Version { stamp, asked_at: 0, sure_at: Some(0) }]
        })
    }

    /// The moments at which a sector can have held something of which `is` is true.
    fn when(versions: &[Version], is: impl Fn(u64) -> bool) -> Moments {
        let mut moments = 0;
        for version in versions.iter().filter(|version| is(version.stamp)) {
            // Replaced for certain once something that was asked for later is there for certain.
            let later = |other: &&Version| version.sure_at.is_some_and(|at| other.asked_at > at);
            let replaced = versions.iter().filter(later).filter_map(|other| other.sure_at).min();
            moments |= between(version.asked_at, replaced);
        }
        moments
    }

    /// The moments at which a block can have looked so.
    pub(crate) fn block_when(&mut self, volume: &str, block: u64, seen: &Stamps) -> Moments {
        let mut moments = Moments::MAX;
        for (sector, stamp) in (block * BLOCK_SECTORS..).zip(seen) {
            let here = Self::when(self.versions_mut(volume, sector), |s| s == *stamp);
            assert_ne!(here, 0, "{volume}: sector {sector} was never {stamp}");
            moments &= here;
        }
        moments
    }

    /// Of a block that is written as a whole, or not at all, it was said between `asked_at` and
    /// now that it is mapped, or not.
    pub(crate) fn check_mapped(&mut self, volume: &str, block: u64, mapped: bool, asked_at: u32) {
        let now = self.now;
        let versions = self.versions_mut(volume, block * BLOCK_SECTORS);
        let when = Self::when(versions, |stamp| (stamp != 0) == mapped);
        let when = when & between(asked_at, Some(now));
        assert_ne!(when, 0, "{volume}: block {block} was not mapped {mapped} at that time");
    }

    /// As [`Self::check_mapped`], of whether it is another block than before the race.
    pub(crate) fn check_changed(&mut self, volume: &str, block: u64, other: bool, asked_at: u32) {
        let now = self.now;
        let versions = self.versions_mut(volume, block * BLOCK_SECTORS);
        let before = versions[0].stamp;
        let when = Self::when(versions, |stamp| (stamp != before) == other);
        let when = when & between(asked_at, Some(now));
        assert_ne!(when, 0, "{volume}: block {block} was not changed {other} at that time");
    }

    /// A block was read by a request that was asked for at `asked_at` and is answered now.
    pub(crate) fn check_read(&mut self, volume: &str, block: u64, seen: &Stamps, asked_at: u32) {
        let moment = self.moment();
        let when = self.block_when(volume, block, seen) & between(asked_at, Some(moment));
        assert_ne!(when, 0, "{volume}: block {block} was never {seen:?} during the read");
        // Whoever asks from now on finds this or something newer.
        for (sector, stamp) in (block * BLOCK_SECTORS..).zip(seen) {
            for version in self.versions_mut(volume, sector) {
                if version.stamp == *stamp && *stamp != 0 {
                    version.sure_at.get_or_insert(moment);
                }
            }
        }
    }

    /// Blocks of a volume that were written during the race.
    fn written(&self, volume: &str) -> BTreeSet<u64> {
        let written = self.versions.keys().filter(|(name, _)| name == volume);
        written.map(|(_, sector)| sector / BLOCK_SECTORS).collect()
    }

    /// The moments at which `blocks` of `volume` can have looked as in `seen`.
    fn blocks_when(
        &mut self,
        volume: &str,
        blocks: impl IntoIterator<Item = u64>,
        seen: &ModelVolume,
    ) -> Moments {
        let stamps = |block: u64| seen.blocks.get(&block).copied().unwrap_or_default();
        let all = blocks.into_iter();
        all.fold(Moments::MAX, |all, block| all & self.block_when(volume, block, &stamps(block)))
    }

    /// The moments at which all blocks of `volume` can have looked as in `seen`, which is that
    /// volume or a copy of it, but for the blocks in `except`.
    fn volume_when(&mut self, volume: &str, seen: &ModelVolume, except: &BTreeSet<u64>) -> Moments {
        let mut blocks = self.written(volume);
        blocks.extend(self.before.get(volume).into_iter().flat_map(BTreeMap::keys));
        blocks.extend(seen.blocks.keys());
        self.blocks_when(volume, blocks.difference(except).copied().collect::<Vec<_>>(), seen)
    }

    /// Checks a whole pool, which holds what it holds since a moment in `when`.
    fn check_pool(&mut self, seen: &Model, when: Moments) {
        let mut when = when;
        for cut in self.cuts.clone() {
            let taken = |copy: &Copy| seen.volumes.contains_key(&copy.name);
            let mut instant = between(cut.asked_at, cut.sure_at);
            for copy in cut.copies.iter().filter(|copy| taken(copy)) {
                // A clone is written where its source was never.
                let (own, volume) = (self.written(&copy.name), &seen.volumes[&copy.name]);
                instant &= self.volume_when(&copy.source, volume, &own);
                when &= self.blocks_when(&copy.name, own, volume);
            }
            let names = || cut.copies.iter().map(|copy| &copy.name).collect::<Vec<_>>();
            assert_ne!(instant, 0, "{:?} are no instant of their sources", names());
            if cut.copies.iter().any(taken) {
                when &= since(instant.trailing_zeros());
            }
        }
        for (name, versions) in &self.existence {
            let there = u64::from(seen.volumes.contains_key(name));
            when &= Self::when(versions, |stamp| stamp == there);
            assert_ne!(when, 0, "{name}: exists {there}");
        }
        let copies: Vec<String> =
            self.cuts.iter().flat_map(|cut| &cut.copies).map(|copy| copy.name.clone()).collect();
        for (name, volume) in seen.volumes.iter().filter(|(name, _)| !copies.contains(name)) {
            when &= self.volume_when(name, volume, &BTreeSet::new());
            assert_ne!(when, 0, "{name}: {:?} is no instant of the pool", volume.blocks);
        }
    }

    /// Checks what a pool holds now that nothing is under way any more.
    pub(crate) fn check_now(&mut self, seen: &Model) {
        let now = self.moment();
        self.check_pool(seen, since(now));
    }

    /// Checks what a power failure has left.
    pub(crate) fn check_left(&mut self, seen: &Model) {
        self.check_pool(seen, since(self.durable_before));
    }
}
