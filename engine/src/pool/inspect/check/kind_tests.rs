//! Damage of each kind is planted in an image, with valid checksums unless the checksum itself is
//! damaged. The checker must find that kind alone: offline, window by window, and on an open pool.
//! Opening must do what the table of kinds promises.

use std::collections::BTreeSet;

use super::tests::{BLOCKS, Sound, check_image, sound, sound_of};
use super::{CheckReport, FindingKind, Policy};
use crate::disk::sim::{CutPlan, SimDisk, SimOptions};
use crate::error::ErrorKind;
use crate::format::catalogue::NodeDrop;
use crate::format::geometry::{PageId, Table};
use crate::format::group::BlockType;
use crate::format::node::{LeafEntry, Node, NodeRef, Root};
use crate::format::superblock::Superblock;
use crate::map::Extent;
use crate::pool::Pool;
use crate::pool::testing::{World, open};
use crate::runtime::Buf;
use crate::space::Run;
use crate::units::{BlockNo, Generation, Lba, Seqno, to_usize};
use zerocopy::FromBytes;

/// The finding and its place must be reported, offline and window by window.
fn finds(sound: &Sound, code: &str, place: &str) {
    let report = check_image(&sound.image, u64::MAX);
    expect(&report, code, place);
    let windows = check_image(&sound.image, 1);
    let sorted = |report: &CheckReport| {
        let mut found: Vec<_> = report.findings.iter().map(|f| f.what.clone()).collect();
        found.sort();
        found
    };
    assert_eq!(sorted(&windows), sorted(&report), "window by window");
}

/// The report must have this kind and no other, and name the place.
fn expect(report: &CheckReport, code: &str, place: &str) {
    let codes: BTreeSet<&str> = report.findings.iter().map(|f| f.code.as_str()).collect();
    assert_eq!(codes, BTreeSet::from([code]), "{:#?}", report.findings);
    let named = report.findings.iter().any(|finding| finding.what.contains(place));
    assert!(named, "{place}: {:?}", report.findings);
}

/// Plants damage; returns the text that must name its place.
type Plant = fn(&mut Sound) -> String;

/// The same on an open pool: the damage to the image is written below it.
fn finds_live(code: &str, plant: Plant) {
    let sim = SimDisk::from_image(sound(1).image, 1, SimOptions::default());
    let opened = sim.run(async {
        let pool = open(&sim).await.unwrap();
        // After two checkpoints of its own the pool has rewritten both slots.
        pool.checkpoint().await.unwrap();
        pool
    });
    let pool: Pool = opened.unwrap();
    let before = sim.image_after_cut(CutPlan::KeepAll);
    let mut sound = sound_of(before.clone());
    let place = plant(&mut sound);
    let report = sim.run(async {
        let mut after = sound.image.clone();
        let (before, after) = (before.blocks(), after.blocks_mut());
        for block in (0..BLOCKS).map(BlockNo::new) {
            if before.block(block) != after.block(block) {
                let mut buf = Buf::new(1);
                buf.as_mut_bytes().copy_from_slice(after.block(block));
                pool.disk().write(block, vec![buf]).await.unwrap();
            }
        }
        pool.core.checkpointer.lock().await.superblock = sound.superblock;
        pool.check(&|_, _| ()).await.unwrap()
    });
    expect(&report.unwrap(), code, &place);
}

/// Opening a damaged pool must do what its kind promises.
fn opens(sound: &Sound, kind: FindingKind) {
    let sim = SimDisk::from_image(sound.image.clone(), 1, SimOptions::default());
    let opened = sim.run(async { open(&sim).await.map(drop) }).unwrap();
    match (kind.policy(), opened) {
        (Policy::Detect, Ok(())) => {}
        (Policy::Refuse, Err(error)) => assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}"),
        (policy, opened) => panic!("{} is to {policy:?}: {opened:?}", kind.code()),
    }
}

fn leaf(sound: &Sound) -> NodeRef {
    sound.leaf
}

/// Damage that can be planted in an image, by kind.
const PLANTS: [(FindingKind, Plant); 26] = [
    (FindingKind::Node, |sound| {
        let block = leaf(sound).block;
        sound.blocks().flip_bit(block, 3000);
        format!("map node at {block}: checksum")
    }),
    (FindingKind::Node, |sound| {
        let block = leaf(sound).block;
        sound.edit_node(block, |bytes| bytes[9] ^= 1);
        format!("map node at {block}: belongs to another pool")
    }),
    (FindingKind::Node, |sound| {
        let NodeRef { block, birth, .. } = leaf(sound);
        let elsewhere = block.plus(1);
        sound
            .edit_node(block, |bytes| Node::mut_from_bytes(bytes).unwrap().place(elsewhere, birth));
        format!("map node at {block}: block {}", elsewhere.get())
    }),
    (FindingKind::Node, |sound| {
        let (block, birth) = (leaf(sound).block, sound.superblock.seal.next());
        sound.edit_node(block, |bytes| Node::mut_from_bytes(bytes).unwrap().place(block, birth));
        format!("map node at {block}: born at {birth}, behind the last record")
    }),
    (FindingKind::Birth, |sound| {
        let NodeRef { block, birth, .. } = leaf(sound);
        let birth = Seqno::new(birth.get() - 1);
        sound.edit_node(block, |bytes| Node::mut_from_bytes(bytes).unwrap().place(block, birth));
        format!("map node at {block}: born at {birth}")
    }),
    (FindingKind::Shape, |sound| {
        sound.edit_leaf(|entries| entries.swap(1, 2));
        format!("map node at {}: extents overlap or are not sorted", leaf(sound).block)
    }),
    (FindingKind::Shape, |sound| {
        let block = leaf(sound).block;
        sound.edit_node(block, |bytes| bytes[40] = 1);
        format!("map node at {block}: level 1")
    }),
    (FindingKind::Count, |sound| {
        let block = sound.first(BlockType::Data);
        sound.set_count(block, BlockType::Data.entry(77));
        format!("{block}: counted 77 times as Data")
    }),
    (FindingKind::UsedAndFree, |sound| {
        let block = sound.first(BlockType::Data);
        sound.set_count(block, 0);
        sound.edit_catalogue(|catalogue| catalogue.groups[0].free += 1);
        format!("{block}: counted as free")
    }),
    (FindingKind::Type, |sound| {
        let block = leaf(sound).block;
        sound.set_count(block, BlockType::Data.entry(1));
        format!("{block}: counted 1 times as Data")
    }),
    (FindingKind::Drop, |sound| {
        let NodeRef { block, birth, .. } = leaf(sound);
        sound.edit_catalogue(|catalogue| catalogue.drops.push(NodeDrop { block, birth }));
        format!("{block}: counted 1 times as Node, 2 references")
    }),
    (FindingKind::Bounds, |sound| {
        sound.edit_leaf(|entries| {
            let extent = entries[1].extent();
            entries[1] = LeafEntry::new(&Extent { block: BlockNo::new(BLOCKS - 1), ..extent });
        });
        format!("map node at {}", leaf(sound).block)
    }),
    (FindingKind::Bounds, |sound| {
        let volumes = &sound.catalogue.volumes;
        let shrunk = volumes.iter().position(|volume| volume.root.is_some()).unwrap();
        sound.edit_catalogue(|catalogue| catalogue.volumes[shrunk].size_bytes = 4096);
        "are beyond its 1 blocks".into()
    }),
    (FindingKind::Superblock, |sound| flipped_superblock(sound, 0, 0)),
    (FindingKind::Superblock, |sound| flipped_superblock(sound, 0, 1)),
    (FindingKind::Superblock, |sound| flipped_superblock(sound, 1, 0)),
    (FindingKind::Superblock, |sound| {
        // Both places of the older slot are whole, but older than expected.
        let older = sound.superblock.generation.get() - 5;
        let generation = Generation::new(older);
        let bytes = Superblock { generation, ..sound.superblock.clone() }.encode();
        for place in sound.geometry().super_places(u64::from(older % 2)) {
            sound.blocks().write(place, 0, &bytes);
        }
        format!("{generation} lies there, which is not the one before")
    }),
    (FindingKind::Catalogue, |sound| {
        let name = sound.catalogue.volumes[0].name.clone();
        let other = sound.catalogue.volumes.iter().rposition(|v| v.name.len() == name.len());
        sound.edit_catalogue(|catalogue| catalogue.volumes[other.unwrap()].name.clone_from(&name));
        format!("two volumes are named {name}")
    }),
    (FindingKind::Catalogue, |sound| {
        let place = sound.chain[0];
        sound.blocks().flip_bit(place, 700);
        format!("catalogue at {place}: checksum")
    }),
    (FindingKind::Catalogue, |sound| {
        sound.edit_catalogue(|catalogue| catalogue.next_id = catalogue.volumes[1].id.get());
        "the next is said to be".into()
    }),
    (FindingKind::Sum, |sound| {
        sound.edit_catalogue(|catalogue| catalogue.groups[1].free -= 1);
        "group 1: ".into()
    }),
    (FindingKind::Sum, |sound| {
        let roots = sound.catalogue.volumes.iter().filter_map(|volume| volume.root);
        let Root { ptr, .. } = roots.clone().next().unwrap();
        // In the entries of all volumes that share the root.
        sound.edit_catalogue(|catalogue| {
            for root in catalogue.volumes.iter_mut().filter_map(|volume| volume.root.as_mut()) {
                root.ptr.mapped += u64::from(root.ptr.block == ptr.block);
            }
        });
        format!("map node at {}: maps {} blocks", ptr.block, ptr.mapped)
    }),
    (FindingKind::Table, |sound| flipped_page(sound, Table::Refs)),
    (FindingKind::Table, |sound| flipped_page(sound, Table::Sums)),
    (FindingKind::Table, |sound| {
        let slot = u64::from(sound.catalogue.groups[0].slot);
        let place = sound.geometry().header_place(0, slot);
        sound.blocks().flip_bit(place, 3000);
        format!("{place}: header of group 0: checksum")
    }),
    (FindingKind::Leak, |sound| {
        let block = sound.free_block();
        sound.set_count(block, BlockType::Data.entry(1));
        sound.edit_catalogue(|catalogue| catalogue.groups[0].free -= 1);
        format!("{block}: counted 1 times as Data, no reference")
    }),
];

fn flipped_superblock(sound: &mut Sound, back: u32, end: usize) -> String {
    let slot = (sound.superblock.generation.get() - back) % 2;
    let place = sound.geometry().super_places(u64::from(slot))[end];
    sound.blocks().flip_bit(place, 500);
    format!("superblock at {place}: checksum")
}

fn flipped_page(sound: &mut Sound, table: Table) -> String {
    let id = PageId { group: 0, table, page: 0 };
    let place = sound.page_place(id);
    sound.blocks().flip_bit(place, 3000);
    format!("{place}: {id}: checksum")
}

#[test]
fn each_kind_is_found_in_an_image() {
    for (number, (kind, plant)) in PLANTS.into_iter().enumerate() {
        println!("plant {number}: {}", kind.code());
        let mut sound = sound(1);
        let place = plant(&mut sound);
        finds(&sound, kind.code(), &place);
    }
}

#[test]
fn each_kind_is_found_under_an_open_pool() {
    for (number, (kind, plant)) in PLANTS.into_iter().enumerate() {
        println!("plant {number}: {}", kind.code());
        finds_live(kind.code(), plant);
    }
}

/// A damaged table page or header makes opening fail only if its final checkpoint needs it. Other
/// damage is met later, by the operation that uses it.
#[test]
fn opening_does_what_the_kind_promises() {
    for (number, (kind, plant)) in PLANTS.into_iter().enumerate() {
        println!("plant {number}: {}", kind.code());
        let mut sound = sound(1);
        plant(&mut sound);
        if kind != FindingKind::Table {
            opens(&sound, kind);
        }
    }
}

#[test]
fn each_kind_has_a_plant() {
    let planted = PLANTS.iter().map(|(kind, _)| *kind);
    let elsewhere = [
        FindingKind::Journal,     // k10_*
        FindingKind::Clean,       // k12_*
        FindingKind::Allocatable, // k7_and_k18_*
        FindingKind::Waiting,
    ];
    let all: BTreeSet<FindingKind> = planted.chain(elsewhere).collect();
    assert_eq!(all, BTreeSet::from(FindingKind::ALL));
    let numbers = FindingKind::ALL.map(FindingKind::code);
    let expected = (1..=18).filter(|number| *number != 15).map(|number| format!("K{number}"));
    assert!(numbers.into_iter().eq(expected), "K15 is the scrub");
}

#[test]
fn a_data_page_without_checksums_is_found() {
    let mut sound = sound(1);
    let id = PageId { group: 0, table: Table::Sums, page: 0 };
    let slot = u64::from(sound.catalogue.groups[0].slot);
    let place = sound.geometry().header_place(0, slot);
    // The generation of the checksum page, after 32 bytes, 512 slots and 256 generations.
    let mut bytes = *sound.blocks().block(place);
    bytes[32 + 512 + 1024..][..4].fill(0);
    let crc = crate::crc::crc32(&bytes[4..]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    sound.blocks().write(place, 0, &bytes);
    finds(&sound, "K16", &format!("{id} was never written, and there is data"));
}

/// An image with flushed records after the last checkpoint.
fn with_records() -> Sound {
    let sim = SimDisk::new(4, BLOCKS, SimOptions::default());
    sim.run(async {
        let mut world = World::new(&sim, 4).await;
        world.steps(100).await;
        let volume = world.create(None, false).await;
        world.write(volume, 0, 9).await;
        world.pool.checkpoint().await.unwrap();
        for lba in [3, 20, 40] {
            world.write(volume, lba, 1).await;
            world.pool.flush().await.unwrap();
        }
    })
    .unwrap();
    sound_of(sim.image_after_cut(CutPlan::KeepNone))
}

#[test]
fn k10_flushed_record_damaged() {
    let mut sound = with_records();
    assert_eq!(check_image(&sound.image, u64::MAX).findings, []);
    let start = sound.superblock.journal_offset;
    let block = sound.geometry().journal_start().plus(start / 4096);
    sound.blocks().flip_bit(block, to_usize(start % 4096) * 8 + 400);
    let next = sound.superblock.seal.next().get();
    finds(&sound, "K10", &format!("record {next} is damaged or lost"));
    opens(&sound, FindingKind::Journal);
}

/// Changes a field of the first record after the checkpoint and fixes its checksum.
fn forge_record(sound: &mut Sound, offset: usize, value: u64) {
    let start = sound.superblock.journal_offset;
    let block = sound.geometry().journal_start().plus(start / 4096);
    let mut bytes = *sound.blocks().block(block);
    let payload = to_usize(u64::from(u32::from_le_bytes(bytes[4..8].try_into().unwrap())));
    bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    let crc = crate::crc::crc32(&bytes[4..32 + payload.next_multiple_of(8)]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    sound.blocks().write(block, 0, &bytes);
}

#[test]
fn k10_records_that_cannot_be_carried_out() {
    // After the header, the tag and the number of runs: volume, LBA, block.
    let forged = [
        (44, 9999, "no volume 9999"),
        (52, 1 << 40, "beyond the end of volume"),
        (52, u64::MAX, "beyond the end of volume"),
    ];
    for (offset, value, what) in forged {
        let mut sound = with_records();
        forge_record(&mut sound, offset, value);
        finds(&sound, "K10", what);
        opens(&sound, FindingKind::Journal);
    }
    let mut sound = with_records();
    let used = sound.first(BlockType::Data);
    forge_record(&mut sound, 60, used.get());
    finds(&sound, "K10", &format!("{used} was written by a record, and the checkpoint before it"));
    opens(&sound, FindingKind::Journal);
}

#[test]
fn k12_clean_with_records() {
    let mut sound = with_records();
    sound.superblock.clean = true;
    sound.write_superblock();
    let next = sound.superblock.seal.next().get();
    finds(&sound, "K12", &format!("record {next} follows"));
    opens(&sound, FindingKind::Clean);
}

#[test]
fn two_superblocks_that_contradict_each_other() {
    let mut sound = sound(1);
    let mut other = sound.superblock.clone();
    other.seal = other.seal.next();
    let [front, back] = sound.geometry().super_places(u64::from(other.generation.get() % 2));
    sound.blocks().write(back, 0, &other.encode());
    let sim = SimDisk::from_image(sound.image.clone(), 1, SimOptions::default());
    let error = sim.run(async { open(&sim).await.map(drop) }).unwrap().unwrap_err();
    assert!(
        error.to_string().contains(&format!("superblock at {back}: there is another")),
        "{error}"
    );
    // A superblock in the wrong slot does not count.
    let newest = sound.superblock.encode();
    let mut sound = self::sound(1);
    let [misplaced, _] = sound.geometry().super_places(1 - front.get());
    sound.blocks().write(misplaced, 0, &newest);
    finds(&sound, "K11", &format!("superblock at {misplaced}: "));
    opens(&sound, FindingKind::Superblock);
}

#[test]
fn k7_and_k18_what_an_open_pool_would_allocate() {
    let sim = SimDisk::new(6, BLOCKS, SimOptions::default());
    sim.run(async {
        let mut world = World::new(&sim, 6).await;
        let volume = world.create(None, false).await;
        world.write(volume, 0, 9).await;
        world.pool.checkpoint().await.unwrap();
        let check = || async { world.pool.check(&|_, _| ()).await.unwrap() };
        let first = || async {
            let found = world.pool.extents(volume, Lba::new(0), Lba::new(1)).await.unwrap();
            Run { block: found.0[0].block, len: 1 }
        };
        let release = |run| world.pool.core.lock().state.space.release(run).unwrap();
        let take = |run| {
            let mut inner = world.pool.core.lock();
            inner.state.space.take_exactly(run).unwrap();
            inner.state.space.recorded(run);
        };
        // A block that the last checkpoint needs.
        let run = first().await;
        release(run);
        expect(&check().await, "K7", &format!("{} may be allocated", run.block));
        take(run);
        // A block written since.
        let device = world.pool.device(volume).unwrap();
        device.write(0, 4096, Buf::zeroed(1), false).await.unwrap();
        let run = first().await;
        release(run);
        let what = format!("{} is in use since the last checkpoint", run.block);
        expect(&check().await, "K7", &what);
        take(run);
        // A block set aside for nodes.
        let block = world.pool.core.lock().state.node_blocks[0];
        release(Run { block, len: 1 });
        expect(&check().await, "K7", &format!("{block} is set aside for a node"));
        take(Run { block, len: 1 });
        assert_eq!(check().await.findings, []);
        // A freed block that waits for its readers.
        {
            let mut inner = world.pool.core.lock();
            let free = inner.state.space.take(1).unwrap();
            inner.state.space.untake(free);
            inner.state.reuse.freed(vec![free]);
        }
        expect(&check().await, "K18", "waits and may be allocated");
    })
    .unwrap();
}

#[test]
fn k14_sums_of_an_open_pool() {
    let sim = SimDisk::new(6, BLOCKS, SimOptions::default());
    sim.run(async {
        let mut world = World::new(&sim, 6).await;
        world.steps(100).await;
        let volume = world.create(None, false).await;
        world.pool.core.lock().state.promises_max += 1;
        let report = world.pool.check(&|_, _| ()).await.unwrap();
        expect(&report, "K14", "blocks promised at most: 0, 1 are kept in memory");
        {
            let mut inner = world.pool.core.lock();
            inner.state.promises_max -= 1;
            inner.state.volume_mut(volume).unwrap().frozen_blocks += 1;
        }
        let report = world.pool.check(&|_, _| ()).await.unwrap();
        expect(&report, "K14", &format!("blocks frozen of {volume}: 0, 1 are"));
    })
    .unwrap();
}

/// `docs/OPERATIONS.md` has a row for each kind, with the same facts as the code.
#[test]
fn the_table_of_kinds_is_true() {
    let text = include_str!("../../../../../docs/OPERATIONS.md");
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| K")).collect();
    let scrub = "| K15 | data does not match its checksum | detect |";
    let expected = FindingKind::ALL
        .map(|kind| format!("| {} | {} | {} |", kind.code(), kind.name(), kind.policy().name()));
    let mut expected: Vec<String> = expected.into();
    expected.insert(14, scrub.into());
    assert_eq!(rows.len(), expected.len(), "one row for each kind");
    for (row, start) in rows.iter().zip(&expected) {
        assert!(row.starts_with(start.as_str()), "{row}\nmust begin with\n{start}");
    }
}
