//! Damage at rest: every bit flipped, every field of every structure changed with its checksum made
//! right, every block replaced; each alone. `pando-damage` does all of it, a test a part.
//!
//! ```text
//! subject: image + history ---+--> case: one damage --> judge: use it, compare --> verdict
//! places:  block -> structure |
//! fields:  structure -> field +
//! ```
//! What must come of it:
//! * **bits and blocks**: an error that names the structure and its place, or correct data. Where
//!   nobody can know that a write was ever acknowledged as flushed (the end of the log), an earlier
//!   state of the pool, and no earlier than the log proves: see `docs/FORMAT.md`, Journal.
//! * **fields**: as well, or the checker finds it; but for the fields in [`BELIEVED`], for which
//!   nothing vouches but the checksum.

pub mod fields;
pub mod judge;
pub mod places;
pub mod subject;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fields::{Change, Target, targets};
use judge::{Question, Verdict, judge, structure_in};
use pando_engine::disk::sim::{Image, SimDisk, SimImage, SimOptions};
use pando_engine::format::record::Record;
use pando_engine::journal::LogReader;
use pando_engine::units::{BLOCK_SIZE, BlockNo};
use places::Structure;
use subject::{Past, Subject};

/// Fields for which nothing vouches but the checksum of what they are in: who can make that right
/// can make the pool say something else. No fault of a device does.
pub const BELIEVED: [(Structure, &str); 5] = [
    (Structure::Journal, "payload"),
    (Structure::Journal, "length"),
    (Structure::Leaf, "lba_len"),
    (Structure::Catalogue, "volume"),
    (Structure::Catalogue, "next_id"),
];

/// What is done to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// One bit is inverted.
    Bit(BlockNo, usize),
    /// A block holds what it held in an older image.
    Older(BlockNo, usize),
    /// A block holds what another one holds.
    Sibling(BlockNo, BlockNo),
    /// A block holds the same byte everywhere.
    Filled(BlockNo, u8),
    /// A field of a structure is changed, and the checksum made right.
    Field(usize, usize, Change),
}

/// Which sort of damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// Bits.
    Bits,
    /// Blocks.
    Blocks,
    /// Fields.
    Fields,
}

impl Sort {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Bits, Self::Blocks, Self::Fields];
}

/// Which cases of a sort are tried: of each structure's cases every so many, from a first one on.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// Of what is needed to find the data, one in so many.
    pub metadata: u64,
    /// Of data, and of what nobody needs, one in so many.
    pub data: u64,
    /// This part of all cases.
    pub part: u64,
    /// Of so many.
    pub parts: u64,
}

/// What was done and what came of it.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Images that were judged.
    pub images: u64,
    /// Images of which nobody noticed anything, and that were right.
    pub correct: u64,
    /// Images that gave errors or findings, by the structure damaged.
    pub noticed: BTreeMap<&'static str, u64>,
    /// Errors, by the structure that they name.
    pub errors: BTreeMap<&'static str, u64>,
    /// Images that were not opened.
    pub refused: u64,
    /// Images with wrong data by a field of [`BELIEVED`].
    pub believed: BTreeMap<String, u64>,
    /// What must not be, with how to repeat it.
    pub failures: Vec<String>,
}

/// Failures that are kept.
const FAILURES_MAX: usize = 50;

/// The damage of one subject.
pub struct Campaign {
    /// What is damaged.
    pub subject: Subject,
    seed: u64,
    targets: Vec<Target>,
    /// Blocks that the end of the log stands on: the journal, and data that it names.
    unproved: Vec<BlockNo>,
}

impl Campaign {
    /// The campaign of a seed.
    #[must_use]
    pub fn new(past: Past, seed: u64) -> Self {
        let subject = Subject::new(past, seed);
        let targets = targets(subject.image.blocks(), &subject.places);
        let unproved = unproved(&subject);
        Self { subject, seed, targets, unproved }
    }

    /// Tries the chosen cases. `before` is called before each; false ends it.
    pub fn run(
        &self,
        sort: Sort,
        choice: &Choice,
        tally: &mut Tally,
        before: &mut dyn FnMut(u64) -> bool,
    ) {
        let mut counters: BTreeMap<Structure, u64> = BTreeMap::new();
        let cases: Box<dyn Iterator<Item = (Structure, Case)>> = match sort {
            Sort::Bits => Box::new(self.bits()),
            Sort::Blocks => Box::new(self.blocks()),
            Sort::Fields => Box::new(self.fields()),
        };
        for (structure, case) in cases {
            let counter = counters.entry(structure).or_default();
            *counter += 1;
            let idle = matches!(structure, Structure::Data | Structure::Unused);
            let stride = if idle { choice.data } else { choice.metadata };
            if stride == 0 || *counter % (stride * choice.parts) != choice.part * stride {
                continue;
            }
            if !before(tally.images) {
                return;
            }
            self.try_case(structure, case, tally);
        }
    }

    /// Tries one case.
    pub fn try_case(&self, structure: Structure, case: Case, tally: &mut Tally) {
        let Some(image) = self.damaged(case) else { return };
        tally.images += 1;
        let (forged, believed) = match case {
            Case::Field(target, spot, _) => {
                let name = self.targets[target].spots[spot].name;
                (true, BELIEVED.contains(&(structure, name)).then_some(name))
            }
            _ => (false, None),
        };
        let newest = self.subject.log.states.len() - 1;
        let question = Question {
            least: if self.may_end_early(case) { self.subject.proved } else { newest },
            change: !matches!(case, Case::Bit(..)) || tally.images.is_multiple_of(8),
            forged,
            seed: self.seed ^ tally.images,
        };
        let verdict = catch_unwind(AssertUnwindSafe(|| judge(&self.subject, &image, question)));
        let verdict = verdict.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or_default();
            Verdict { wrong: Some(format!("panic: {text}")), ..Verdict::default() }
        });
        if let (Some(name), Some(wrong)) = (believed, &verdict.wrong)
            && !wrong.starts_with("panic")
            && !wrong.contains("hangs")
        {
            *tally.believed.entry(format!("{} {name}", structure.name())).or_default() += 1;
            return;
        }
        self.enter(structure, case, &verdict, tally);
    }

    fn enter(&self, structure: Structure, case: Case, verdict: &Verdict, tally: &mut Tally) {
        if let Some(wrong) = &verdict.wrong {
            if tally.failures.len() < FAILURES_MAX {
                tally.failures.push(format!(
                    "{} pool of seed {}, {} {}: {wrong}",
                    self.subject.past.name(),
                    self.seed,
                    structure.name(),
                    self.describe(case)
                ));
            }
            return;
        }
        tally.refused += u64::from(verdict.refused.is_some());
        for name in verdict.errors.iter().filter_map(|error| structure_in(error)) {
            *tally.errors.entry(name).or_default() += 1;
        }
        if verdict.unnoticed() {
            tally.correct += 1;
        } else {
            *tally.noticed.entry(structure.name()).or_default() += 1;
        }
    }

    fn describe(&self, case: Case) -> String {
        match case {
            Case::Field(target, spot, change) => {
                let target = &self.targets[target];
                let at = &target.spots[spot];
                format!("at {}: {} ({:?}) {change:?}, {case:?}", target.block(), at.name, at.at)
            }
            _ => format!("{case:?}"),
        }
    }

    /// The image with the damage of a case; `None` when it changes nothing.
    #[must_use]
    pub fn damaged(&self, case: Case) -> Option<SimImage> {
        let mut image = self.subject.image.clone();
        let blocks = image.blocks_mut();
        match case {
            Case::Bit(block, bit) => {
                blocks.flip_bit(block, bit);
                return Some(image);
            }
            Case::Field(target, spot, change) => {
                let changed = self.targets[target].forge(blocks, spot, change, self.seed);
                return changed.then_some(image);
            }
            Case::Older(block, number) => {
                copy(blocks, block, self.subject.older[number].block(block))
            }
            Case::Sibling(block, other) => {
                let bytes = *blocks.block(other);
                copy(blocks, block, &bytes);
            }
            Case::Filled(block, byte) => copy(blocks, block, &[byte; BLOCK_SIZE]),
        }
        let block = match case {
            Case::Older(block, _) | Case::Sibling(block, _) | Case::Filled(block, _) => block,
            Case::Bit(..) | Case::Field(..) => return Some(image),
        };
        (image.blocks().block(block) != self.subject.image.blocks().block(block)).then_some(image)
    }

    /// Whether the log may end early for it: damage to what nothing proves to have been flushed.
    fn may_end_early(&self, case: Case) -> bool {
        let block = match case {
            Case::Bit(block, _)
            | Case::Older(block, _)
            | Case::Sibling(block, _)
            | Case::Filled(block, _) => block,
            Case::Field(target, ..) => self.targets[target].block(),
        };
        self.unproved.contains(&block)
    }

    fn structures(&self) -> impl Iterator<Item = (BlockNo, Structure)> {
        let numbered = (0..).zip(&self.subject.places.holds);
        numbered.map(|(number, structure)| (BlockNo::new(number), *structure))
    }

    fn bits(&self) -> impl Iterator<Item = (Structure, Case)> {
        self.structures().flat_map(|(block, structure)| {
            (0..8 * BLOCK_SIZE).map(move |bit| (structure, Case::Bit(block, bit)))
        })
    }

    fn blocks(&self) -> impl Iterator<Item = (Structure, Case)> {
        self.structures().flat_map(move |(block, structure)| {
            let all = &self.subject.older;
            let new = move |n: &usize| *n == 0 || all[*n].block(block) != all[n - 1].block(block);
            let older = (0..all.len()).filter(new).map(move |n| Case::Older(block, n));
            let others = self.subject.places.blocks(structure).filter(move |other| *other != block);
            let siblings = others.map(move |other| Case::Sibling(block, other));
            let filled = [0, 0xFF].map(|byte| Case::Filled(block, byte));
            older.chain(siblings).chain(filled).map(move |case| (structure, case))
        })
    }

    fn fields(&self) -> impl Iterator<Item = (Structure, Case)> {
        self.targets.iter().enumerate().flat_map(|(number, target)| {
            (0..target.spots.len()).flat_map(move |spot| {
                Change::ALL.map(|change| (target.structure, Case::Field(number, spot, change)))
            })
        })
    }
}

fn copy(blocks: &mut Image, block: BlockNo, bytes: &[u8; BLOCK_SIZE]) {
    let bytes = *bytes;
    blocks.write(block, 0, &bytes);
}

/// The journal of a pool that was not closed, and the data that its records name.
fn unproved(subject: &Subject) -> Vec<BlockNo> {
    if subject.past == Past::Closed {
        return Vec::new();
    }
    let mut blocks: Vec<BlockNo> = subject.places.blocks(Structure::Journal).collect();
    let image = subject.image.clone();
    let sim = SimDisk::from_image(image, 0, SimOptions::default());
    let named = sim.run(async {
        let mut log = LogReader::behind(&sim.disk(), &subject.places.superblock);
        let mut named = Vec::new();
        while let Some(framed) = log.next().await.expect("a sound journal") {
            let Record::Map { runs, .. } = framed.record else { continue };
            for run in runs {
                named.extend((0..u64::from(run.len)).map(|offset| run.block.plus(offset)));
            }
        }
        named
    });
    blocks.extend(named.expect("nothing cuts the power"));
    blocks
}
