//! f04: four superblocks in their places, and what is taken for the pool. A reader that knows
//! `docs/FORMAT.md` alone takes the same one, or none; what was read is written the same; and the pool
//! that stands behind it opens and holds what it held, or does not open.
//!
//! ```text
//! length of the device (1); for each place: what (1), then either fields (12) or bytes (128);
//! behind them 4 bytes a change: place (1), at (1), xor, whether to fix the checksum
//! ```

use super::forge::{Forge, POOL, content};
use super::{Input, Reached};
use crate::run::Config;
use pando_engine::crc::crc32_of_parts;
use pando_engine::disk::sim::{SimDisk, SimOptions};
use pando_engine::error::ErrorKind;
use pando_engine::format::geometry::Geometry;
use pando_engine::format::group::BlockType;
use pando_engine::format::node::{Extent, LeafEntry, NodeBlock, NodePtr, Root, seal_crc};
use pando_engine::format::superblock::{Superblock, set_crc};
use pando_engine::pool::probe;
use pando_engine::units::{BLOCK_SIZE, BlockNo, Generation, Lba, Seqno, VolumeId, to_u64};
use zerocopy::IntoBytes;

/// What the corpus must come to.
pub(super) const REACHES: &[&str] =
    &["contradictions", "opened", "refused", "taken", "truncated", "unknown"];

const POOL_BLOCKS: u64 = 200;
const JOURNAL_BLOCKS: u64 = 8;
const SEAL: u64 = 9;
/// Bytes of a superblock that say something.
const FIELDS_END: usize = 120;
/// Events after which a pool is said to hang.
const EVENTS_MAX: u64 = 20_000;

type Block = [u8; BLOCK_SIZE];

pub(super) fn body(bytes: &[u8], reached: &mut Reached) {
    let mut input = Input::new(bytes);
    // Mostly the length of the pool; a longer device has no pool's superblocks at its end.
    let device_blocks = match input.byte() {
        byte @ 1..=16 => POOL_BLOCKS - u64::from(byte),
        byte @ 17..=32 => POOL_BLOCKS + u64::from(byte),
        _ => POOL_BLOCKS,
    };
    let (forge, block) = pool();
    let sound = forge.superblock.clone();
    let mut image = forge.seal().blocks().clone();
    let sound = Superblock::decode(image.block(BlockNo::new(0)), BlockNo::new(0))
        .unwrap_or_else(|error| panic!("{sound:?}: {error}"));
    let places = [0, 1, device_blocks - 2, device_blocks - 1].map(BlockNo::new);
    let mut slots: [Block; 4] = std::array::from_fn(|at| slot(&mut input, &sound, at));
    while !input.is_empty() {
        let (which, at) = (usize::from(input.byte()) % 4, usize::from(input.byte()));
        let (by, keep) = (input.byte(), input.byte() & 1 == 1);
        slots[which][if at < FIELDS_END { at } else { at * 16 }] ^= by;
        if !keep {
            set_crc(&mut slots[which]);
        }
    }
    let mut device = pando_engine::disk::sim::Image::new(device_blocks);
    for block in image.written().filter(|block| block.get() < device_blocks) {
        device.write(block, 0, image.block(block));
    }
    for (place, bytes) in places.iter().zip(&slots) {
        device.write(*place, 0, bytes);
    }
    image = device;
    let expected = choose(&slots, device_blocks);
    let sim = SimDisk::from_image(image.into(), 1, SimOptions::default());
    sim.set_cut_at(EVENTS_MAX);
    let done = sim.run(async {
        let found = probe::superblock(&sim.disk()).await;
        compare(&expected, &found, reached);
        if let Ok(found) = found {
            let again = Superblock::decode(&found.encode(), BlockNo::new(0));
            assert_eq!(again.ok().as_ref(), Some(&found), "what was read is written otherwise");
            open(&sim, &found, &sound, block, reached).await;
        }
    });
    assert!(done.is_some(), "it hangs");
}

/// A pool with a volume of one block.
fn pool() -> (Forge, BlockNo) {
    let mut forge = Forge::new(POOL_BLOCKS, JOURNAL_BLOCKS, SEAL);
    let (at, block) = (forge.block(10), forge.block(20));
    let extent = Extent { lba: Lba::new(3), block, len: 1, own: true };
    let mut node = NodeBlock::ZERO;
    node.0.reset(&POOL, 0);
    node.0.place(at, Seqno::new(SEAL));
    node.0.splice(0..0, &[LeafEntry::new(&extent)]);
    seal_crc(node.0.as_mut_bytes());
    forge.image.write(at, 0, node.0.as_bytes());
    forge.data(block);
    forge.refer(at, BlockType::Node);
    forge.refer(block, BlockType::Data);
    let ptr = NodePtr { lba: extent.lba, block: at, birth: Seqno::new(SEAL), mapped: 1, own: 1 };
    forge.volume("a", 8, Some(Root { ptr, level: 0 }));
    (forge, block)
}

/// What lies in a place.
fn slot(input: &mut Input<'_>, sound: &Superblock, at: usize) -> Block {
    let what = input.byte();
    let mut block = [0; BLOCK_SIZE];
    match what % 8 {
        0 => return block,
        1 => {
            let raw = input.bytes(128);
            block[..raw.len()].copy_from_slice(raw);
        }
        _ => {
            let fields: [u8; 12] = std::array::from_fn(|_| input.byte());
            block = changed(sound, fields, at).encode();
        }
    }
    if what & 0x80 == 0 {
        set_crc(&mut block);
    }
    block
}

/// A superblock that is mostly like the sound one, of a generation that mostly fits its place.
fn changed(sound: &Superblock, fields: [u8; 12], at: usize) -> Superblock {
    let [generation, misplaced, blocks, journal, pages, catalogue, bytes, offset, ..] = fields;
    let [.., offset_too, seal, salt, clean] = fields;
    let small = |number: u8, sound: u64| if number < 0x80 { sound } else { number.into() };
    let slot = to_u64(at % 2) + u64::from(misplaced & 7 == 7);
    let generation = u32::from(generation % 8) * 2 + u32::from(slot % 2 == 1);
    let geometry = Geometry {
        pool_blocks: small(blocks, sound.geometry.pool_blocks),
        journal_blocks: small(journal, sound.geometry.journal_blocks),
        group_pages: small(pages, sound.geometry.group_pages),
    };
    Superblock {
        uuid: POOL,
        geometry,
        generation: Generation::new(generation),
        catalogue: BlockNo::new(small(catalogue, sound.catalogue.get())),
        catalogue_bytes: small(bytes, sound.catalogue_bytes),
        journal_offset: small(offset, 0) * 512 + small(offset_too, 0) * 4096,
        seal: Seqno::new(small(seal, SEAL)),
        salt: u32::from(salt),
        clean: clean & 1 == 1,
    }
}

/// What a place holds, read by the description of the format alone.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Empty,
    Damaged,
    Unknown,
    Whole(u64, Vec<u64>),
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn place(block: &Block, slot: u64) -> Place {
    if &block[..8] != b"PANDO\x01\r\n" {
        return Place::Empty;
    }
    let crc = crc32_of_parts(&[&block[..8], &[0; 4], &block[12..]]);
    if number(block, 8, 4) != u64::from(crc) {
        return Place::Damaged;
    }
    let masks = [16, 24].map(|at| number(block, at, 8));
    if number(block, 12, 4) != 1 || masks != [0, 0] {
        return Place::Unknown;
    }
    let [blocks, journal] = [56, 64].map(|at| number(block, at, 8));
    let [pages, generation] = [72, 76].map(|at| number(block, at, 4));
    let [catalogue, bytes, offset, seal] = [80, 88, 96, 104].map(|at| number(block, at, 8));
    let (salt, clean) = (number(block, 112, 4), number(block, 116, 4));
    let fits = (1..=256).contains(&pages)
        && (8..=1 << 18).contains(&journal)
        && blocks <= (64 << 40) / 4096
        && is_in_a_group(blocks, journal, pages, catalogue)
        && offset < journal * 4096
        && offset.is_multiple_of(4096)
        && seal <= 1 << 62
        && generation <= u64::from(u32::MAX - 1024);
    if !fits || generation % 2 != slot {
        return Place::Damaged;
    }
    let uuid = [40, 48].map(|at| number(block, at, 8));
    let places =
        [blocks, journal, pages, catalogue, bytes, offset, seal, salt, u64::from(clean != 0)];
    Place::Whole(generation, uuid.into_iter().chain(places).collect())
}

/// Whether a block is one for data, nodes and catalogue of a pool that has at least 64 of them.
fn is_in_a_group(blocks: u64, journal: u64, pages: u64, block: u64) -> bool {
    let (tables, whole) = (2 + 4 * pages, 2 + 1024 * pages);
    let Some(area) = blocks.checked_sub(4 + journal) else { return false };
    let (groups, rest) = (area / whole, (area % whole).saturating_sub(tables));
    let usable = groups * 1020 * pages + rest;
    let Some(offset) = block.checked_sub(2 + journal) else { return false };
    let (group, within) = (offset / whole, offset % whole);
    let len = if group < groups { 1020 * pages } else { rest };
    usable >= 64 && group <= groups && within >= tables && within - tables < len
}

/// What is to be taken.
#[derive(Debug)]
enum Choice {
    Taken(u64, Vec<u64>),
    /// None; or this, if a contradiction between older ones is not looked at.
    Contradiction(u64),
    Unknown,
    None,
    Truncated,
}

fn choose(slots: &[Block; 4], device_blocks: u64) -> Choice {
    let places: Vec<Place> =
        slots.iter().zip([0, 1, 0, 1]).map(|(block, slot)| place(block, slot)).collect();
    if places.contains(&Place::Unknown) {
        return Choice::Unknown;
    }
    let whole = |place: &Place| match place {
        Place::Whole(generation, fields) => Some((*generation, fields.clone())),
        _ => None,
    };
    let all: Vec<(u64, Vec<u64>)> = places.iter().filter_map(whole).collect();
    let Some((newest, fields)) = all.iter().max_by_key(|(generation, _)| *generation).cloned()
    else {
        return Choice::None;
    };
    let contradicts = |(generation, said): &(u64, Vec<u64>)| {
        all.iter().any(|(other, fields)| other == generation && fields != said)
    };
    if let Some((generation, _)) = all.iter().filter(|found| contradicts(found)).max() {
        return Choice::Contradiction(if *generation == newest { u64::MAX } else { newest });
    }
    if fields[2] > device_blocks { Choice::Truncated } else { Choice::Taken(newest, fields) }
}

fn compare(
    expected: &Choice,
    found: &pando_engine::error::Result<Superblock>,
    reached: &mut Reached,
) {
    match (expected, found) {
        (Choice::Taken(generation, fields), Ok(found)) => {
            assert_eq!(u64::from(found.generation.get()), *generation, "not the newest");
            assert_eq!(said(found), *fields, "what was read is not what is there");
            reached.note("taken");
        }
        (Choice::Contradiction(newest), Ok(found)) => {
            assert_eq!(u64::from(found.generation.get()), *newest, "of two that differ");
        }
        (Choice::Contradiction(_), Err(error)) => {
            assert!(matches!(error.kind(), ErrorKind::Corrupt), "{error}");
            reached.note("contradictions");
        }
        (Choice::Unknown, Err(error)) => {
            // Unless it contradicts itself before the unknown one is met.
            assert!(matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Corrupt), "{error}");
            reached.note("unknown");
        }
        (Choice::Truncated, Err(error)) => {
            assert!(error.to_string().contains("truncated"), "{error}");
            reached.note("truncated");
        }
        (Choice::None, Err(error)) => {
            assert!(matches!(error.kind(), ErrorKind::NotAPool | ErrorKind::Corrupt), "{error}");
            reached.note("refused");
        }
        _ => panic!("{found:?}, not {expected:?}"),
    }
}

/// The fields, in the order of [`place`].
fn said(superblock: &Superblock) -> Vec<u64> {
    let geometry = &superblock.geometry;
    let uuid = [0, 8].map(|at| number(&superblock.uuid, at, 8));
    let places = [
        geometry.pool_blocks,
        geometry.journal_blocks,
        geometry.group_pages,
        superblock.catalogue.get(),
        superblock.catalogue_bytes,
        superblock.journal_offset,
        superblock.seal.get(),
        superblock.salt.into(),
        superblock.clean.into(),
    ];
    uuid.into_iter().chain(places).collect()
}

/// Opens the pool that a superblock stands for. If that says of the pool what the sound one says, it
/// holds what it held; else it may refuse, or be another pool.
async fn open(
    sim: &SimDisk,
    found: &Superblock,
    sound: &Superblock,
    block: BlockNo,
    reached: &mut Reached,
) {
    let Superblock { generation, seal, salt, clean, journal_offset, .. } = found.clone();
    let same = Superblock { generation, seal, salt, clean, journal_offset, ..sound.clone() };
    let may_be = generation == sound.generation && seal >= sound.seal;
    let opened = Config::default().open(sim).await;
    if let Err(error) = &opened {
        assert!(*found != same || !may_be, "a sound pool does not open: {error}");
    }
    let Ok(pool) = opened else { return };
    reached.note("opened");
    let Ok(device) = pool.device(VolumeId::new(1)) else { return };
    if let Ok(read) = device.read(0, to_u64(8 * BLOCK_SIZE).try_into().expect("32 KiB")).await {
        let blocks = read.bytes().chunks_exact(BLOCK_SIZE).enumerate();
        for (lba, bytes) in blocks {
            let right = if lba == 3 { bytes == content(block) } else { bytes == [0; BLOCK_SIZE] };
            assert!(right, "lba {lba} is wrong");
        }
    }
}
