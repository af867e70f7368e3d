//! f06: one block as a node of a map. The decoder and the one below, which knows `docs/FORMAT.md` and
//! nothing else, agree: both say no, or both say the same; and what was read is written the same.
//!
//! ```text
//! how (1): fix the checksum, raw bytes or entries; what the pointer says (3); level, entries (2), then
//!          entries of 6 bytes, or bytes of the block; in the end 3 bytes a change: place (2), xor
//! ```

use super::{Input, Reached};
use pando_engine::crc::crc32;
use pando_engine::format::node::{
    Extent, HEADER_BYTES, InnerEntry, LeafEntry, Node, NodeBlock, NodeChild, NodePtr, NodeRef,
    children, seal_crc,
};
use pando_engine::units::{BLOCK_SIZE, BlockNo, Lba, Seqno, to_usize};
use zerocopy::{FromBytes, IntoBytes};

/// What the corpus must come to.
pub(super) const REACHES: &[&str] = &["inner nodes", "leaves", "orphans", "refused"];

const POOL: [u8; 16] = [7; 16];
const PLACE: u64 = 33;
const BIRTH: u64 = 5;
const LBA_END: u64 = 1 << 48;

/// What the pointer to a node says; without bounds if there is no pointer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) block: u64,
    pub(super) birth: u64,
    pub(super) level: u64,
    pub(super) end: u64,
    /// First LBA, and blocks mapped below.
    pub(super) told: Option<(u64, u64)>,
}

/// What a node refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// LBA, blocks, block.
    Extent(u64, u64, u64, bool),
    /// LBA, block, birth, blocks mapped and own blocks below.
    Pointer { lba: u64, block: u64, birth: u64, mapped: u64, own: u64 },
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// A node, read by the description of the format alone.
pub(super) fn reference(bytes: &[u8], wanted: &Wanted, pool: &[u8; 16]) -> Option<Vec<Item>> {
    let (level, count) = (number(bytes, 40, 2), number(bytes, 42, 2));
    let (most, size) = if level == 0 { (252, 16) } else { (100, 40) };
    let whole = number(bytes, 0, 4) == u64::from(crc32(&bytes[4..]))
        && &bytes[4..8] == b"PNod"
        && bytes[8..24] == *pool
        && number(bytes, 24, 8) == wanted.block
        && number(bytes, 32, 8) == wanted.birth
        && level == wanted.level
        && level < 10
        && (1..=most).contains(&count)
        && bytes[44..64].iter().all(|byte| *byte == 0);
    if !whole {
        return None;
    }
    let end = wanted.end.min(LBA_END);
    let (mut items, mut from, mut sum) = (Vec::new(), 0, 0_u64);
    for entry in bytes[64..].chunks_exact(size).take(to_usize(count)) {
        let (lba, mapped, item) = if level == 0 {
            let (lba, len) = (number(entry, 2, 6), number(entry, 0, 2));
            let block = number(entry, 8, 8);
            (lba, len, Item::Extent(lba, len, block >> 1, block & 1 == 1))
        } else {
            let [lba, block, birth, mapped, own] =
                [0, 8, 16, 24, 32].map(|at| number(entry, at, 8));
            if own > mapped {
                return None;
            }
            (lba, mapped, Item::Pointer { lba, block, birth, mapped, own })
        };
        if lba < from || mapped == 0 {
            return None;
        }
        sum = sum.checked_add(mapped)?;
        from = lba.checked_add(if level == 0 { mapped } else { 1 })?;
        items.push(item);
    }
    let first = match items[0] {
        Item::Extent(lba, ..) | Item::Pointer { lba, .. } => lba,
    };
    let as_told = wanted.told.is_none_or(|told| told == (first, sum));
    (from <= end && as_told).then_some(items)
}

impl From<NodeChild> for Item {
    fn from(child: NodeChild) -> Self {
        match child {
            NodeChild::Data(Extent { lba, block, len, own }) => {
                Self::Extent(lba.get(), len, block.get(), own)
            }
            NodeChild::Node(NodePtr { lba, block, birth, mapped, own }) => {
                let (lba, block, birth) = (lba.get(), block.get(), birth.get());
                Self::Pointer { lba, block, birth, mapped, own }
            }
        }
    }
}

pub(super) fn body(bytes: &[u8], reached: &mut Reached) {
    let mut input = Input::new(bytes);
    let how = input.byte();
    let tweak = [input.byte(), input.byte(), input.byte()];
    let mut node = NodeBlock::ZERO;
    if how & 2 == 0 {
        fill(&mut node.0, &mut input);
    } else {
        let raw = input.bytes(BLOCK_SIZE);
        node.0.as_mut_bytes()[..raw.len()].copy_from_slice(raw);
    }
    let block = node.0.as_mut_bytes();
    if how & 1 == 0 {
        seal_crc(block);
    }
    while how & 2 == 0 && !input.is_empty() {
        let (at, by) = (usize::from(input.short()) % BLOCK_SIZE, input.byte());
        block[at] ^= by;
        if how & 4 == 0 {
            seal_crc(block);
        }
    }
    let wanted = wanted(&*block, tweak);
    compare(block, &wanted, reached);
    compare(block, &Wanted { told: None, end: LBA_END, ..wanted }, reached);
}

/// A node of entries that mostly fit.
fn fill(node: &mut Node, input: &mut Input<'_>) {
    let level = input.byte() % 11;
    let count = to_usize(input.below(253));
    node.reset(&POOL, level);
    node.place(BlockNo::new(PLACE), Seqno::new(BIRTH));
    let mut lba = 0;
    for at in 0..count.min(if level == 0 { 252 } else { 100 }) {
        let [gap, len, more] = [input.short(), input.short(), input.short()].map(u64::from);
        lba += gap;
        if level == 0 {
            let len = 1 + len % 65535;
            let (own, block) = (more & 1 == 1, BlockNo::new(more >> 1));
            let extent = Extent { lba: Lba::new(lba), block, len, own };
            node.splice(at..at, &[LeafEntry::new(&extent)]);
            lba += len;
        } else {
            let (block, birth) = (BlockNo::new(more), Seqno::new(len));
            let ptr = NodePtr { lba: Lba::new(lba), block, birth, mapped: 1 + len, own: len / 2 };
            node.splice(at..at, &[InnerEntry::new(&ptr)]);
            lba += 1;
        }
    }
}

/// The pointer that goes with a block, mostly.
fn wanted(block: &[u8], [who, end, told]: [u8; 3]) -> Wanted {
    let level = number(block, 40, 2);
    let size = if level == 0 { 16 } else { 40 };
    let entries: Vec<&[u8]> =
        block[HEADER_BYTES..].chunks_exact(size).take(to_usize(number(block, 42, 2))).collect();
    let key = |entry: &&[u8]| if level == 0 { number(entry, 2, 6) } else { number(entry, 0, 8) };
    let len = |entry: &&[u8]| if level == 0 { number(entry, 0, 2) } else { number(entry, 24, 8) };
    let first = entries.first().map_or(0, key);
    let last =
        entries.last().map_or(0, |e| key(e).saturating_add(if level == 0 { len(e) } else { 1 }));
    let sum = entries.iter().map(len).fold(0, u64::wrapping_add);
    Wanted {
        block: number(block, 24, 8) ^ u64::from(who & 3 == 3),
        birth: number(block, 32, 8) ^ u64::from(who & 12 == 12),
        level: (level & 0xFF) ^ u64::from(who & 48 == 48),
        end: match end % 4 {
            0 => LBA_END,
            1 => last,
            2 => last.saturating_sub(1),
            _ => u64::MAX,
        },
        told: Some((first ^ u64::from(told & 3 == 3), sum ^ u64::from(told & 12 == 12))),
    }
}

/// Both decoders on a block.
fn compare(block: &[u8], wanted: &Wanted, reached: &mut Reached) {
    let pool: [u8; 16] = if block[8..24] == POOL { POOL } else { [0; 16] };
    let expected = reference(block, wanted, &pool);
    let (place, birth) = (BlockNo::new(wanted.block), Seqno::new(wanted.birth));
    let decoded = if let Some((lba, mapped)) = wanted.told {
        let level = u8::try_from(wanted.level).unwrap_or(u8::MAX);
        let (lba, end) = (Lba::new(lba), Lba::new(wanted.end));
        Node::verify(block, &NodeRef { block: place, birth, level, lba, end, mapped }, &pool)
    } else {
        reached.note("orphans");
        Node::verify_orphan(block, place, birth, &pool)
    };
    let Ok(node) = decoded else {
        // A node whose parent is gone has the level that it says.
        let other_level = wanted.told.is_none() && wanted.level != number(block, 40, 2);
        assert!(expected.is_none() || other_level, "refused: {decoded:?}", decoded = decoded.err());
        return reached.note("refused");
    };
    let items: Vec<Item> = children(node).map(Item::from).collect();
    if wanted.told.is_some() || wanted.level == number(block, 40, 2) {
        assert_eq!(Some(&items), expected.as_ref(), "what was read is not what is there");
    }
    reached.note(if node.level() == 0 { "leaves" } else { "inner nodes" });
    write_again(block, node, &items);
}

/// Writes what was read: the same bytes, but for what lies behind the last entry.
fn write_again(block: &[u8], node: &Node, items: &[Item]) {
    let mut again = NodeBlock::ZERO;
    let pool: [u8; 16] = block[8..24].try_into().expect("16 bytes");
    again.0.reset(&pool, node.level());
    again.0.place(BlockNo::new(number(block, 24, 8)), node.birth());
    for (at, item) in items.iter().enumerate() {
        match *item {
            Item::Extent(lba, len, block, own) => {
                let extent = Extent { lba: Lba::new(lba), block: BlockNo::new(block), len, own };
                again.0.splice(at..at, &[LeafEntry::new(&extent)]);
            }
            Item::Pointer { lba, block, birth, mapped, own } => {
                let (lba, block, birth) = (Lba::new(lba), BlockNo::new(block), Seqno::new(birth));
                let ptr = NodePtr { lba, block, birth, mapped, own };
                again.0.splice(at..at, &[InnerEntry::new(&ptr)]);
            }
        }
    }
    let size = if node.level() == 0 { size_of::<LeafEntry>() } else { size_of::<InnerEntry>() };
    let used = 4..HEADER_BYTES + items.len() * size;
    let bytes = again.0.as_bytes();
    assert!(bytes[used.clone()] == block[used], "what was read is written otherwise");
    assert!(Node::ref_from_bytes(bytes).is_ok_and(|node| node.count() == items.len()));
}
