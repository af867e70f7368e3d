//! Rare states that a campaign must have reached, or it has proved nothing about them. All of them
//! are told from outside: by the pool's counters, its state, the model, the image.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::gen_ops::Op;
use pando_engine::disk::sim::{SimDisk, SimImage, SimOptions};
use pando_engine::format::geometry::SUPER_SLOTS;
use pando_engine::journal::LogReader;
use pando_engine::limits::SEQNOS_SKIPPED;
use pando_engine::pool::Pool;
use pando_engine::pool::probe;
use pando_engine::state::State;
use pando_engine::units::{BLOCK_BYTES, BlockNo, Seqno, VolumeId};

/// A rare state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rare {
    /// The journal has gone once around in one life.
    JournalLap,
    /// Replay made the map of a volume higher.
    SplitInReplay,
    /// A checkpoint was written in a pool that refuses growth.
    CheckpointWhenFull,
    /// An operation was refused because the pool was full.
    Refused,
    /// The recovery from a crash in the recovery from a crash in a recovery.
    ThirdCut,
    /// A volume was copied whose root no checkpoint had seen.
    CopyOfFreshRoot,
    /// The power failed while deletions were under way.
    DeletionCut,
    /// A freed block waited for its reader, or a free one for its discard.
    FreedBlockWaited,
    /// The power failed while a discard was under way.
    DiscardCut,
    /// Of two writes to parts of one block the second had to merge again.
    MergeOvertaken,
    /// The power failed while what a killed process had left was being recovered.
    RecoveryFromKillCut,
    /// Of the superblock only one copy was whole, or the two were of different checkpoints.
    HalfSuperblock,
    /// Records were found behind the last one whose data was there: replay ended before them.
    LogEndedEarly,
}

impl Rare {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::JournalLap,
        Self::SplitInReplay,
        Self::CheckpointWhenFull,
        Self::Refused,
        Self::ThirdCut,
        Self::CopyOfFreshRoot,
        Self::DeletionCut,
        Self::FreedBlockWaited,
        Self::DiscardCut,
        Self::MergeOvertaken,
        Self::RecoveryFromKillCut,
        Self::HalfSuperblock,
        Self::LogEndedEarly,
    ];

    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::JournalLap => "journal went around",
            Self::SplitInReplay => "map grew a level in replay",
            Self::CheckpointWhenFull => "checkpoint in a full pool",
            Self::Refused => "growth refused",
            Self::ThirdCut => "cut in the recovery of a recovery",
            Self::CopyOfFreshRoot => "copy of a root that no checkpoint has seen",
            Self::DeletionCut => "cut while deletions were under way",
            Self::FreedBlockWaited => "freed block waited for reader or discard",
            Self::DiscardCut => "cut while a discard was under way",
            Self::MergeOvertaken => "merge overtaken",
            Self::RecoveryFromKillCut => "cut in the recovery from a kill",
            Self::HalfSuperblock => "superblock written at one end only",
            Self::LogEndedEarly => "log ended before records without data",
        }
    }
}

/// How often each was met.
#[derive(Debug, Default)]
pub struct Rares {
    counts: RefCell<BTreeMap<Rare, u64>>,
}

impl Rares {
    /// One was met.
    pub fn met(&self, rare: Rare) {
        *self.counts.borrow_mut().entry(rare).or_default() += 1;
    }

    /// How often one was met.
    #[must_use]
    pub fn count(&self, rare: Rare) -> u64 {
        self.counts.borrow().get(&rare).copied().unwrap_or_default()
    }

    /// An operation is about to be done.
    pub(super) fn before(&self, pool: &Pool, op: &Op) {
        let Op::Create(births) = op else { return };
        let any_fresh = pool.look(|inside| {
            let state = inside.state;
            let fresh = |source: &String| {
                let volume = state.names.get(source).and_then(|id| state.volume(*id));
                let root = volume.and_then(|volume| volume.entry.root.as_ref());
                root.is_some_and(|root| root.ptr.birth > state.seal)
            };
            births.iter().filter_map(|birth| birth.source.as_ref()).any(fresh)
        });
        if any_fresh {
            self.met(Rare::CopyOfFreshRoot);
        }
    }

    /// An operation was done, or refused.
    pub(super) fn after(&self, pool: &Pool, op: &Op, refused: bool) {
        if refused {
            self.met(Rare::Refused);
        }
        let (full, around) = pool.look(|inside| {
            let full = inside.state.space.free() <= inside.growth_reserve;
            (full, inside.journal_appended > inside.journal_ring + BLOCK_BYTES)
        });
        if full && matches!(op, Op::Checkpoint | Op::Reopen) && !refused {
            self.met(Rare::CheckpointWhenFull);
        }
        if around && matches!(op, Op::Flush | Op::Checkpoint) {
            self.met(Rare::JournalLap);
        }
    }

    /// The power may fail now.
    pub(super) fn at_moment(&self, pool: &Pool) {
        let (deleting, waits, discarding) = pool.look(|inside| {
            let reuse = &inside.state.reuse;
            let waits = reuse.waiting().next().is_some();
            (inside.drops_pending > 0, waits, reuse.discarding().is_some())
        });
        if deleting {
            self.met(Rare::DeletionCut);
        }
        if waits {
            self.met(Rare::FreedBlockWaited);
        }
        if discarding {
            self.met(Rare::DiscardCut);
        }
    }
}

/// What an image says of the recovery to come.
pub(super) struct Facts {
    /// Levels of the maps in the last checkpoint.
    levels: BTreeMap<VolumeId, u8>,
    seal: Seqno,
    /// Records behind it.
    records: u64,
    /// Whether the newest superblock is at one end only.
    half: bool,
}

impl Facts {
    /// The facts of an image in which there is a checkpoint; else none.
    pub(super) fn of(image: &SimImage) -> Self {
        let sim = SimDisk::from_image(image.clone(), 0, SimOptions::default());
        let facts = sim.run(async {
            let disk = sim.disk();
            let superblock = probe::superblock(&disk).await.ok()?;
            let catalogue = probe::catalogue(&disk, &superblock).await.ok()?.catalogue;
            let roots = catalogue.volumes.iter().filter_map(|v| Some((v.id, v.root.as_ref()?)));
            let levels = roots.map(|(id, root)| (id, root.level)).collect();
            let slot = u64::from(superblock.generation.get()) % SUPER_SLOTS;
            let blocks = image.blocks().len_blocks();
            let mut half = false;
            for place in [slot, blocks - SUPER_SLOTS + slot] {
                let found = probe::superblock_at(&disk, slot, BlockNo::new(place)).await;
                half |= found.is_err() || found.is_ok_and(|found| found != superblock);
            }
            let mut log = LogReader::behind(&disk, &superblock);
            let mut records = 0;
            while log.next().await.ok()?.is_some() {
                records += 1;
            }
            Some(Self { levels, seal: superblock.seal, records, half })
        });
        facts.flatten().expect("a crash leaves a checkpoint that can be read")
    }

    /// Whether the map of a volume is higher than it was.
    fn any_grown(&self, state: &State) -> bool {
        state.volumes.iter().any(|(id, volume)| {
            let level = volume.entry.root.as_ref().map_or(0, |root| root.level);
            self.levels.get(id).is_some_and(|before| *before < level)
        })
    }

    /// What the recovery was like.
    pub(super) fn compare(&self, pool: &Pool, rares: &Rares) {
        let (grown, seqno) = pool.look(|inside| (self.any_grown(inside.state), inside.state.seqno));
        if grown {
            rares.met(Rare::SplitInReplay);
        }
        let replayed = seqno.get() - self.seal.plus(SEQNOS_SKIPPED).get();
        if replayed < self.records {
            rares.met(Rare::LogEndedEarly);
        }
        if self.half {
            rares.met(Rare::HalfSuperblock);
        }
    }
}
