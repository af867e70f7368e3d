//! Every field of every structure of an image, with the checksum that covers it, and what can be put
//! in its place. The lists come from the structures' own code: see `format::layout` for the fixed
//! ones and `format::codec::spans` for the encoded ones.

use std::ops::Range;

use super::places::{Places, Structure};
use pando_engine::crc::crc32;
use pando_engine::disk::sim::{Image, Rng};
use pando_engine::format::codec::spans;
use pando_engine::format::layout::Field;
use pando_engine::format::node::Node;
use pando_engine::format::{catalogue, group, node, record, superblock};
use pando_engine::units::{BLOCK_BYTES, BLOCK_SIZE, BlockNo, to_u64, to_usize};
use zerocopy::FromBytes;

/// Of an array's elements that are zero, one in so many is changed.
const ZERO_ELEMENTS: usize = 97;

/// How the checksum of a structure is made right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seal {
    Superblock,
    /// At the start, over all that follows.
    Front,
}

/// A structure: bytes with a checksum of their own.
pub struct Target {
    /// What it is.
    pub structure: Structure,
    /// Its first byte in the pool, and its bytes.
    start: u64,
    len: usize,
    seal: Seal,
    /// Its fields; the checksum is not among them.
    pub spots: Vec<Spot>,
}

/// A field, or an element of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spot {
    /// The field's name.
    pub name: &'static str,
    /// Where in the structure.
    pub at: Range<usize>,
}

/// What is put in the place of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// All bits 0.
    Zero,
    /// All bits 1.
    Max,
    /// One more.
    Plus,
    /// One less.
    Minus,
    /// What the next field of the same width holds, and that field what this one held.
    Swap,
    /// Random bits.
    Random,
}

impl Change {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Zero, Self::Max, Self::Plus, Self::Minus, Self::Swap, Self::Random];
}

impl Target {
    /// Where it lies.
    #[must_use]
    pub const fn block(&self) -> BlockNo {
        BlockNo::new(self.start / BLOCK_BYTES)
    }

    /// Changes field number `spot` and makes the checksum right. False when that changes nothing.
    pub fn forge(&self, image: &mut Image, spot: usize, change: Change, seed: u64) -> bool {
        let before = self.bytes(image);
        let mut bytes = before.clone();
        let at = self.spots[spot].at.clone();
        match change {
            Change::Zero => bytes[at].fill(0),
            Change::Max => bytes[at].fill(0xFF),
            Change::Plus => add(&mut bytes[at], 1),
            Change::Minus => add(&mut bytes[at], u64::MAX),
            Change::Random => {
                let mut rng = Rng::new(seed);
                bytes[at].fill_with(|| rng.bits().to_le_bytes()[0]);
            }
            Change::Swap => {
                let mut others = self.spots[spot + 1..].iter().filter(|s| s.at.len() == at.len());
                let Some(other) = others.next() else { return false };
                for (left, right) in at.zip(other.at.clone()) {
                    bytes.swap(left, right);
                }
            }
        }
        if bytes == before {
            return false;
        }
        self.seal(&mut bytes);
        for (number, part) in (0..).zip(bytes.chunks(BLOCK_SIZE - self.within())) {
            // Only a record may begin inside a block, and then its first part is shorter.
            let (block, offset) = if number == 0 { (0, self.within()) } else { (number, 0) };
            image.write(self.block().plus(block), offset, part);
        }
        true
    }

    fn within(&self) -> usize {
        to_usize(self.start % BLOCK_BYTES)
    }

    fn bytes(&self, image: &Image) -> Vec<u8> {
        let blocks = to_u64((self.within() + self.len).div_ceil(BLOCK_SIZE));
        let all = (0..blocks).flat_map(|offset| *image.block(self.block().plus(offset)));
        all.skip(self.within()).take(self.len).collect()
    }

    fn seal(&self, bytes: &mut [u8]) {
        match self.seal {
            Seal::Superblock => {
                if let Ok(block) = bytes.try_into() {
                    superblock::set_crc(block);
                }
            }
            Seal::Front => {
                let crc = crc32(&bytes[4..]);
                bytes[..4].copy_from_slice(&crc.to_le_bytes());
            }
        }
    }
}

/// Adds to the number that some bytes are; of more than eight, to the first eight.
fn add(bytes: &mut [u8], by: u64) {
    let mut wide = [0; 8];
    let len = bytes.len().min(wide.len());
    wide[..len].copy_from_slice(&bytes[..len]);
    let sum = u64::from_le_bytes(wide).wrapping_add(by);
    bytes[..len].copy_from_slice(&sum.to_le_bytes()[..len]);
}

/// All structures of an image that are needed, with all their fields.
#[must_use]
pub fn targets(image: &Image, places: &Places) -> Vec<Target> {
    let mut targets = Vec::new();
    for (number, structure) in (0..).zip(&places.holds) {
        let block = BlockNo::new(number);
        let spots = match structure {
            Structure::Unused | Structure::Data | Structure::Journal => continue,
            Structure::Superblock => fixed(superblock::FIELDS, image.block(block), 0),
            Structure::GroupHeader => fixed(group::HEADER_FIELDS, image.block(block), 0),
            Structure::Counts | Structure::Sums => fixed(group::PAGE_FIELDS, image.block(block), 0),
            Structure::Inner | Structure::Leaf => node_spots(image.block(block)),
            Structure::Catalogue => catalogue_spots(image, places, block),
        };
        let seal = match structure {
            Structure::Superblock => Seal::Superblock,
            _ => Seal::Front,
        };
        let start = block.byte_offset();
        targets.push(Target { structure: *structure, start, len: BLOCK_SIZE, seal, spots });
    }
    targets.extend(records(image, places));
    targets
}

/// The fields of a fixed structure that begins at `base`. Of elements of an array that hold nothing
/// only some are taken.
fn fixed(fields: &[Field], bytes: &[u8], base: usize) -> Vec<Spot> {
    let mut spots = Vec::new();
    for field in fields.iter().filter(|field| field.name != "crc") {
        let starts = (0..field.bytes).step_by(field.element);
        for (number, start) in starts.map(|start| base + field.offset + start).enumerate() {
            let at = start..start + field.element;
            let empty = bytes[at.clone()].iter().all(|byte| *byte == 0);
            let one_of_many = field.bytes > 16 * field.element;
            if !(empty && one_of_many) || number.is_multiple_of(ZERO_ELEMENTS) {
                spots.push(Spot { name: field.name, at });
            }
        }
    }
    spots
}

fn node_spots(bytes: &[u8]) -> Vec<Spot> {
    let mut spots = fixed(node::HEADER_FIELDS, bytes, 0);
    let whole = Node::ref_from_bytes(bytes).expect("a block");
    let leaf = whole.level() == 0;
    let fields = if leaf { node::LEAF_FIELDS } else { node::INNER_FIELDS };
    let size: usize = fields.iter().map(|field| field.bytes).sum();
    // One entry more than there are: what lies behind the last must not count.
    for entry in 0..=whole.count() {
        spots.extend(fixed(fields, bytes, node::HEADER_BYTES + entry * size));
    }
    spots
}

fn catalogue_spots(image: &Image, places: &Places, block: BlockNo) -> Vec<Spot> {
    let header: usize = catalogue::FIELDS.iter().map(|field| field.bytes).sum();
    let mut spots = fixed(catalogue::FIELDS, image.block(block), 0);
    let index = places.chain.iter().position(|place| *place == block).expect("of the chain");
    let payload = index * catalogue::CHAIN_PAYLOAD..(index + 1) * catalogue::CHAIN_PAYLOAD;
    for (name, span) in catalogue_spans(&places.catalogue) {
        if payload.start <= span.start && span.end <= payload.end {
            let at = span.start - payload.start + header..span.end - payload.start + header;
            spots.push(Spot { name, at });
        }
    }
    spots
}

/// The numbers and strings of the encoded catalogue, each with the part that it belongs to.
fn catalogue_spans(whole: &catalogue::Catalogue) -> Vec<(&'static str, Range<usize>)> {
    let len = |spans: Vec<Range<usize>>| spans.len();
    let mut names = vec!["next_id", "volumes"];
    for volume in &whole.volumes {
        // The root is followed by three numbers.
        let (all, root) = (len(spans(volume)), len(spans(&volume.root)));
        names.extend(std::iter::repeat_n("volume", all - root - 3));
        names.extend(std::iter::repeat_n("root", root));
        names.extend(["shared_at", "held_blocks", "frozen_blocks"]);
    }
    names.push("drops");
    names.extend(whole.drops.iter().flat_map(|_| ["drop", "drop"]));
    names.push("groups");
    names.extend(whole.groups.iter().flat_map(|_| ["group", "group", "group"]));
    let spans = spans(whole);
    assert_eq!(spans.len(), names.len(), "a field of the catalogue has no name here");
    names.into_iter().zip(spans).collect()
}

/// The records behind the checkpoint.
fn records(image: &Image, places: &Places) -> Vec<Target> {
    let superblock = &places.superblock;
    let geometry = superblock.geometry;
    let blocks = (0..geometry.journal_blocks).map(|n| geometry.journal_start().plus(n));
    let ring: Vec<u8> = blocks.flat_map(|block| *image.block(block)).collect();
    let mut targets = Vec::new();
    let mut next = superblock.seal.next();
    // The order in which they lie in the ring is not that of their numbers.
    loop {
        let starts = (0..ring.len()).step_by(record::ALIGN);
        let found = starts
            .filter(|at| record::seqno_at(&ring[*at..], superblock.salt) == Some(next))
            .find_map(|at| Some((at, record::decode(&ring[at..], next, superblock.salt)?)));
        let Some((at, framed)) = found else { return targets };
        let mut spots = fixed(record::FIELDS, &ring[at..], 0);
        let payload = spans(&framed.record).into_iter().filter(|span| !span.is_empty());
        spots.extend(payload.map(|span| Spot {
            name: "payload",
            at: record::HEADER_BYTES + span.start..record::HEADER_BYTES + span.end,
        }));
        targets.push(Target {
            structure: Structure::Journal,
            start: geometry.journal_start().byte_offset() + to_u64(at),
            len: framed.bytes,
            seal: Seal::Front,
            spots,
        });
        next = next.next();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_any_width_are_counted_up_and_down() {
        for (before, by, after) in [
            ([0xFF, 0, 0, 7], 1, [0, 1, 0, 7]),
            ([0, 1, 0, 7], u64::MAX, [0xFF, 0, 0, 7]),
            ([0, 0, 0, 0], u64::MAX, [0xFF; 4]),
            ([5, 0, 0, 0], u64::MAX, [4, 0, 0, 0]),
        ] {
            let mut bytes = before;
            add(&mut bytes, by);
            assert_eq!(bytes, after, "{before:?} and {by}");
        }
    }
}
