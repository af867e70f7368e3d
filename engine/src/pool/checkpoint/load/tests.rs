//! Which superblock is chosen, and which catalogues are refused.

use super::*;
use crate::disk::sim::{CutPlan, Effect, Fault, FaultOp, Image, SimDisk, SimOptions};
use crate::format::catalogue::{GroupEntry, IoLimits, NodeDrop, VolumeEntry};
use crate::format::geometry::Geometry;
use crate::format::node::{NodePtr, Root};
use crate::format::superblock::set_crc;
use crate::limits::MAP_LEVELS_MAX;
use crate::units::{BLOCK_SIZE, Generation, Lba, Seqno, VolumeId};

const BLOCKS: u64 = 3000;

fn superblock_of(generation: u32) -> Superblock {
    let geometry = Geometry::new(BLOCKS, 8, 1).unwrap();
    Superblock {
        uuid: [7; 16],
        geometry,
        generation: Generation::new(generation),
        catalogue: geometry.block_at(0, 3),
        catalogue_bytes: 100,
        journal_offset: 0,
        seal: Seqno::new(50),
        salt: generation,
        clean: false,
    }
}

/// The superblock found on a disk with these blocks.
fn found(blocks: &[(u64, [u8; BLOCK_SIZE])]) -> Result<Superblock> {
    let mut image = Image::new(BLOCKS);
    for (at, bytes) in blocks {
        image.write(BlockNo::new(*at), 0, bytes);
    }
    let sim = SimDisk::from_image(image.into(), 1, SimOptions::default());
    sim.run(async { superblock(&sim.disk()).await }).unwrap()
}

/// An encoded superblock with one byte changed and a valid checksum.
fn forged(superblock: &Superblock, at: usize, byte: u8) -> [u8; BLOCK_SIZE] {
    let mut block = superblock.encode();
    block[at] = byte;
    set_crc(&mut block);
    block
}

#[test]
fn the_newest_whole_superblock_of_the_four_is_taken() {
    let [old, new] = [4, 5].map(|generation| superblock_of(generation).encode());
    let generation = |blocks: &[(u64, [u8; BLOCK_SIZE])]| found(blocks).unwrap().generation.get();
    let mut torn = new;
    torn[60] ^= 1;
    assert_eq!(generation(&[(0, old), (1, new)]), 5);
    assert_eq!(generation(&[(0, old), (BLOCKS - 1, new)]), 5);
    assert_eq!(generation(&[(BLOCKS - 2, old), (1, torn), (BLOCKS - 1, new)]), 5);
    assert_eq!(generation(&[(BLOCKS - 2, old), (1, torn), (BLOCKS - 1, torn)]), 4);
    assert_eq!(generation(&[(0, old), (1, torn)]), 4, "a torn slot is never repaired");
}

#[test]
fn superblocks_that_cannot_be_are_not_taken() {
    let error = found(&[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotAPool);
    let (old, new) = (superblock_of(4), superblock_of(5));
    // In a place of the other slot, where no checkpoint writes.
    let error = found(&[(1, old.encode())]).unwrap_err();
    assert!(error.to_string().contains("belongs into the other slot"), "{error}");
    // Of the same generation, but different.
    let other = Superblock { seal: Seqno::new(51), ..new.clone() };
    let error = found(&[(1, new.encode()), (BLOCKS - 1, other.encode())]).unwrap_err();
    assert!(error.to_string().contains("which says otherwise"), "{error}");
    // Of an unknown version: an older checkpoint must not be used instead.
    let error = found(&[(0, old.encode()), (1, forged(&new, 12, 2))]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    // Of a longer pool than the device.
    let geometry = Geometry::new(BLOCKS + 1, 8, 1).unwrap();
    let error = found(&[(1, Superblock { geometry, ..new }.encode())]).unwrap_err();
    assert!(error.to_string().ends_with("it was truncated"), "{error}");
}

/// A disk with a whole superblock of generation 4, and these blocks in the places of generation 5.
fn torn_disk(places: [&[u8; BLOCK_SIZE]; 2]) -> SimDisk {
    let mut image = Image::new(BLOCKS);
    let superblock = superblock_of(4);
    image.write(BlockNo::new(0), 0, &superblock.encode());
    for (place, bytes) in superblock.geometry.super_places(1).into_iter().zip(places) {
        image.write(place, 0, bytes);
    }
    SimDisk::from_image(image.into(), 1, SimOptions::default())
}

/// Runs `forget_torn` while the first `unreadable` reads fail; returns the content of the two
/// places after a power failure.
fn forgotten(sim: &SimDisk, unreadable: u64) -> Result<[[u8; BLOCK_SIZE]; 2]> {
    for after in 0..unreadable {
        let effect = Effect::Error { errno: 5, landed: false };
        sim.inject(Fault { op: FaultOp::Read, after, sticky: false, effect });
    }
    sim.run(async { forget_torn(&sim.disk(), &superblock_of(4)).await }).unwrap()?;
    let left = sim.image_after_cut(CutPlan::KeepNone);
    Ok(superblock_of(4).geometry.super_places(1).map(|place| *left.blocks().block(place)))
}

#[test]
fn what_is_left_of_a_torn_superblock_is_overwritten_durably() {
    let zeros = [0; BLOCK_SIZE];
    let (whole, older) = (superblock_of(5).encode(), superblock_of(3).encode());
    let mut torn = whole;
    torn[60] ^= 1;
    assert_eq!(forgotten(&torn_disk([&torn, &torn]), 0).unwrap(), [zeros; 2]);
    assert_eq!(forgotten(&torn_disk([&torn, &older]), 0).unwrap(), [zeros, older]);
    assert_eq!(forgotten(&torn_disk([&older, &torn]), 0).unwrap(), [older, zeros]);
    let untouched = torn_disk([&older, &zeros]);
    let before = untouched.io_count();
    assert_eq!(forgotten(&untouched, 0).unwrap(), [older, zeros]);
    assert_eq!(untouched.io_count(), before, "nothing is torn");
}

/// Such a superblock may be whole, and the newest, as soon as it can be read again.
#[test]
fn a_superblock_that_cannot_be_read_is_forgotten_where_its_twin_is_known() {
    let zeros = [0; BLOCK_SIZE];
    let (whole, older) = (superblock_of(5).encode(), superblock_of(3).encode());
    assert_eq!(forgotten(&torn_disk([&whole, &older]), 1).unwrap(), [zeros, older]);
    let error = forgotten(&torn_disk([&whole, &whole]), 2).unwrap_err();
    assert!(error.to_string().starts_with("superblock at "), "{error}");
}

fn volume(id: u64) -> VolumeEntry {
    VolumeEntry {
        id: VolumeId::new(id),
        name: format!("v{id}"),
        size_bytes: 1 << 20,
        source: None,
        snapshot: false,
        read_only: false,
        reservation_blocks: 0,
        growth_limit_blocks: 0,
        io_limits: IoLimits::default(),
        labels: Vec::new(),
        created_at: 0,
        root: Some(Root { ptr: pointer(), level: 1 }),
        shared_at: Seqno::new(0),
        held_blocks: 0,
        frozen_blocks: 0,
    }
}

fn pointer() -> NodePtr {
    let block = superblock_of(5).geometry.block_at(1, 9);
    NodePtr { lba: Lba::new(0), block, birth: Seqno::new(50), mapped: 20, own: 20 }
}

fn sound() -> Catalogue {
    let geometry = superblock_of(5).geometry;
    let group = |_| GroupEntry { generation: Generation::new(5), slot: 1, free: 10 };
    let (block, birth) = (geometry.block_at(0, 1), Seqno::new(3));
    Catalogue {
        next_id: 9,
        volumes: vec![volume(2), volume(4), volume(8)],
        drops: vec![NodeDrop { block, birth }],
        groups: (0..geometry.groups()).map(group).collect(),
    }
}

/// The error for the valid catalogue with one change.
fn refusal(change: impl FnOnce(&mut Catalogue)) -> String {
    let mut catalogue = sound();
    change(&mut catalogue);
    check(&superblock_of(5), &catalogue).expect_err("it cannot be").to_string()
}

fn root_refusal(change: impl FnOnce(&mut Root)) -> String {
    refusal(|c| change(c.volumes[1].root.as_mut().unwrap()))
}

#[test]
fn groups_that_cannot_be_are_refused() {
    check(&superblock_of(5), &sound()).unwrap();
    assert_eq!(refusal(|c| c.groups.truncate(1)), "catalogue: 1 groups");
    let entries: [fn(&mut GroupEntry); 3] =
        [|g| g.generation = Generation::new(6), |g| g.slot = 2, |g| g.free = 1021];
    for change in entries {
        let error = refusal(|c| change(&mut c.groups[1]));
        assert_eq!(error, "catalogue: entry of group 1 is impossible");
    }
    let error = refusal(|c| c.drops[0].block = BlockNo::new(0));
    assert_eq!(error, "catalogue: a deletion is out of bounds");
}

#[test]
fn volumes_that_cannot_be_are_refused() {
    assert!(refusal(|c| c.next_id = VOLUME_ID_MAX + 1).contains("the next volume is said to be"));
    assert_eq!(refusal(|c| c.next_id = 8), "catalogue: volume 8 is out of order");
    assert_eq!(refusal(|c| c.volumes.swap(0, 1)), "catalogue: volume 2 is out of order");
    let twice = refusal(|c| c.volumes[2].id = VolumeId::new(4));
    assert_eq!(twice, "catalogue: volume 4 is out of order");
    let named = refusal(|c| c.volumes[2].name = "v4".into());
    assert_eq!(named, "catalogue: two volumes are named v4");
    let entries: [fn(&mut VolumeEntry); 5] = [
        |v| v.name = "/".into(),
        |v| v.size_bytes = 100,
        |v| v.labels = vec![(String::new(), "x".into())],
        |v| v.reservation_blocks = u64::MAX,
        |v| v.held_blocks = u64::MAX,
    ];
    for (number, change) in entries.into_iter().enumerate() {
        let error = refusal(|c| change(&mut c.volumes[1]));
        assert!(error.starts_with("catalogue: "), "{number}: {error}");
    }
    assert!(root_refusal(|root| root.ptr.own = 21).contains("20 blocks mapped, 21 of its own"));
    let impossible = "catalogue: the map of volume v4 is impossible";
    let top = u8::try_from(MAP_LEVELS_MAX).unwrap();
    assert_eq!(root_refusal(|root| root.level = top), impossible);
    assert_eq!(root_refusal(|root| root.ptr.block = BlockNo::new(1)), impossible);
    assert_eq!(root_refusal(|root| root.ptr.birth = Seqno::new(51)), impossible);
}
