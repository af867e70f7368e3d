//! f08: a pool that was closed, killed or recovered, and damage to it. Of one thing that is damaged
//! the judge of `testing::damage` asks for correct data or an error that names structure and place. Of
//! several, or with checksums made right, what is read is what was written there at some time, or an
//! error; the pool opens or not, is changed, is opened again, and all of that ends.
//!
//! ```text
//! pool (1), seed (1), how many changes (1); 9 bytes a change: what, where (3), at (2), value (2), how
//! ```

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::ops::modulo;
use super::{Input, Reached};
use crate::damage::fields::{Change, Target, targets};
use crate::damage::judge::{Question, Verdict, judge};
use crate::damage::places::Structure;
use crate::damage::subject::Past;
use crate::damage::{Campaign, Case, Tally};
use pando_engine::crc::crc32;
use pando_engine::disk::sim::{Image, SimImage};
use pando_engine::format::superblock;
use pando_engine::units::{BLOCK_SIZE, BlockNo};

/// What the corpus must come to.
pub(super) const REACHES: &[&str] =
    &["correct", "forged", "noticed", "refused", "several changes", "single damage", "truncated"];
/// Pools of each past.
const SEEDS: u64 = 3;
const CHANGES_MAX: u64 = 4;

const STRUCTURES: [Structure; 10] = [
    Structure::Superblock,
    Structure::Journal,
    Structure::GroupHeader,
    Structure::Counts,
    Structure::Sums,
    Structure::Catalogue,
    Structure::Inner,
    Structure::Leaf,
    Structure::Data,
    Structure::Unused,
];

/// A pool to be damaged. Made once a thread: it comes from nothing but its number.
struct Sound {
    campaign: Campaign,
    targets: Vec<Target>,
}

thread_local! {
    static SOUND: RefCell<BTreeMap<u64, Rc<Sound>>> = const { RefCell::new(BTreeMap::new()) };
}

fn sound(number: u64) -> Rc<Sound> {
    let number = number % (3 * SEEDS);
    let make = || {
        let campaign = Campaign::new(Past::ALL[modulo(number, 3)], number / 3);
        let targets = targets(campaign.subject.image.blocks(), &campaign.subject.places);
        Rc::new(Sound { campaign, targets })
    };
    SOUND.with_borrow_mut(|all| Rc::clone(all.entry(number).or_insert_with(make)))
}

/// One change, as the input has it.
#[derive(Clone, Copy, Debug)]
struct Raw {
    what: u8,
    structure: u8,
    number: u16,
    at: u16,
    value: u16,
    how: u8,
}

impl Raw {
    fn of(input: &mut Input<'_>) -> Self {
        Self {
            what: input.byte(),
            structure: input.byte(),
            number: input.short(),
            at: input.short(),
            value: input.short(),
            how: input.byte(),
        }
    }
}

pub(super) fn body(bytes: &[u8], reached: &mut Reached) {
    let mut input = Input::new(bytes);
    let sound = sound(input.byte().into());
    let seed = u64::from(input.byte());
    let count = input.below(CHANGES_MAX + 1);
    let changes: Vec<Raw> = (0..count).map(|_| Raw::of(&mut input)).collect();
    match changes[..] {
        [one] if one.how & 1 == 0 => sound.single(one, reached),
        _ => sound.several(&changes, seed, reached),
    }
}

impl Sound {
    /// The block that a change is about, and what it holds.
    fn block(&self, raw: Raw) -> (Structure, BlockNo) {
        let structure = STRUCTURES[usize::from(raw.structure) % STRUCTURES.len()];
        let blocks: Vec<_> = self.campaign.subject.places.blocks(structure).collect();
        if blocks.is_empty() {
            return (Structure::Superblock, BlockNo::new(0));
        }
        (structure, blocks[modulo(raw.number.into(), blocks.len())])
    }

    /// One thing is damaged: everything that is promised of damage holds.
    fn single(&self, raw: Raw, reached: &mut Reached) {
        let (structure, block) = self.block(raw);
        let subject = &self.campaign.subject;
        let value = u64::from(raw.value);
        let (structure, case) = match raw.what % 5 {
            0 => (structure, Case::Bit(block, usize::from(raw.at) % (8 * BLOCK_SIZE))),
            1 => (structure, Case::Older(block, modulo(value, subject.older.len()))),
            2 => {
                let others: Vec<BlockNo> = subject.places.blocks(structure).collect();
                (structure, Case::Sibling(block, others[modulo(value, others.len())]))
            }
            3 => (structure, Case::Filled(block, raw.how)),
            _ => {
                let number = modulo(raw.number.into(), self.targets.len());
                let target = &self.targets[number];
                let spot = modulo(raw.at.into(), target.spots.len());
                let change = Change::ALL[modulo(value, Change::ALL.len())];
                (target.structure, Case::Field(number, spot, change))
            }
        };
        let mut tally = Tally::default();
        self.campaign.try_case(structure, case, &mut tally);
        assert!(tally.failures.is_empty(), "{}", tally.failures[0]);
        reached.add("single damage", tally.images);
        reached.add("correct", tally.correct);
        reached.add("refused", tally.refused);
        reached.add("noticed", tally.noticed.values().sum());
    }

    /// Several things are damaged, or checksums were made right.
    fn several(&self, changes: &[Raw], seed: u64, reached: &mut Reached) {
        let mut image = self.campaign.subject.image.clone();
        let mut forged = false;
        for raw in changes {
            forged |= self.change(&mut image, *raw, reached);
        }
        let question = Question { least: 0, change: true, forged: true, seed };
        let verdict: Verdict = judge(&self.campaign.subject, &image, question);
        reached.note(if forged { "forged" } else { "several changes" });
        reached.add("refused", u64::from(verdict.refused.is_some()));
        let Some(wrong) = verdict.wrong else { return };
        // An older or another state of the pool may be what the damage makes of it; what was never
        // written by anybody has no checksum that matches.
        assert!(!wrong.contains("hangs"), "{wrong}: {changes:?}");
        assert!(forged || !wrong.contains("never written"), "{wrong}: {changes:?}");
    }

    /// Changes an image; whether a checksum was made right.
    fn change(&self, image: &mut SimImage, raw: Raw, reached: &mut Reached) -> bool {
        let (structure, block) = self.block(raw);
        let subject = &self.campaign.subject;
        let len = image.blocks().len_blocks();
        if block.get() >= len {
            return false; // It was cut off by an earlier change.
        }
        let at = usize::from(raw.at) % BLOCK_SIZE;
        match raw.what % 8 {
            0 => image.blocks_mut().flip_bit(block, usize::from(raw.at) % (8 * BLOCK_SIZE)),
            1 => {
                let bytes = raw.value.to_le_bytes();
                let (old, end) = (image.blocks().block(block), (at + 2).min(BLOCK_SIZE));
                let changed: Vec<u8> = old[at..end].iter().zip(bytes).map(|(a, b)| a ^ b).collect();
                image.blocks_mut().write(block, at, &changed);
            }
            2 => {
                let older = &subject.older[modulo(raw.value.into(), subject.older.len())];
                let bytes = *older.block(block);
                image.blocks_mut().write(block, 0, &bytes);
            }
            3 => {
                let other = BlockNo::new(u64::from(raw.value) % len);
                let bytes = *image.blocks().block(other);
                image.blocks_mut().write(block, 0, &bytes);
            }
            4 => {
                let other = BlockNo::new(u64::from(raw.value) % len);
                let (one, two) = (*image.blocks().block(block), *image.blocks().block(other));
                image.blocks_mut().write(block, 0, &two);
                image.blocks_mut().write(other, 0, &one);
            }
            5 => {
                let end = (at + usize::from(raw.value) % BLOCK_SIZE).min(BLOCK_SIZE);
                image.blocks_mut().write(block, at, &vec![raw.how; end - at]);
            }
            6 => {
                let longer = len + u64::from(raw.at % 64);
                let blocks = if raw.how & 2 == 2 { longer } else { u64::from(raw.value) % len };
                *image = of_length(image.blocks(), blocks).into();
                reached.note(if blocks < len { "truncated" } else { "extended" });
                return false;
            }
            _ => {
                let target = &self.targets[modulo(raw.number.into(), self.targets.len())];
                let spot = modulo(raw.at.into(), target.spots.len());
                let change = Change::ALL[modulo(raw.value.into(), Change::ALL.len())];
                return target.block().get() + 13 < len
                    && target.forge(image.blocks_mut(), spot, change, raw.value.into());
            }
        }
        raw.how & 1 == 1 && fix(image.blocks_mut(), structure, block)
    }
}

/// A device with this content, shorter or longer.
fn of_length(image: &Image, blocks: u64) -> Image {
    let mut other = Image::new(blocks);
    for block in image.written().filter(|block| block.get() < blocks) {
        other.write(block, 0, image.block(block));
    }
    other
}

/// Makes the checksum of a structure that fills its block right.
fn fix(image: &mut Image, structure: Structure, block: BlockNo) -> bool {
    let mut bytes = *image.block(block);
    match structure {
        Structure::Superblock => superblock::set_crc(&mut bytes),
        Structure::Journal | Structure::Data | Structure::Unused => return false,
        _ => {
            let crc = crc32(&bytes[4..]);
            bytes[..4].copy_from_slice(&crc.to_le_bytes());
        }
    }
    image.write(block, 0, &bytes);
    true
}
