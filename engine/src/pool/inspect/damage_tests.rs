//! Damage to a pool at rest: opening and reading it returns correct data or an error that names the
//! structure and its place; never wrong data, never a panic.

use std::collections::BTreeMap;

use crate::crc::crc32;
use crate::disk::sim::{CutPlan, Image, Rng, SimDisk, SimImage, SimOptions};
use crate::error::{ErrorKind, Result};
use crate::format::geometry::{Geometry, PageId, Table};
use crate::format::group::BlockType;
use crate::format::superblock;
use crate::pool::testing::{Content, LBAS, World, block_of, durable_of, image, open};
use crate::pool::{DumpForm, Pool, check_offline, dump_offline};
use crate::space::{Run, TakeError};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, BlockNo, VolumeId, to_u64, to_usize};

const BLOCKS: u64 = 4096;

type Volumes = BTreeMap<VolumeId, Content>;

/// Result of reading all volumes.
#[derive(Default)]
struct Outcome {
    /// Blocks with the expected content.
    right: u64,
    /// Errors without repetition.
    errors: std::collections::BTreeSet<String>,
    /// Blocks that differ from the model.
    wrong: Vec<(VolumeId, u64)>,
}

/// Reads every block of every volume.
async fn read_all(pool: &Pool, volumes: &Volumes) -> Outcome {
    let mut outcome = Outcome::default();
    for (id, content) in volumes {
        let Ok(device) = pool.device(*id) else {
            outcome.wrong.push((*id, 0));
            continue;
        };
        for lba in 0..LBAS - 1 {
            match device.read(lba * BLOCK_BYTES, 4096).await {
                Ok(data) => {
                    let expected = content.get(&lba).map_or([0; BLOCK_SIZE], |s| block_of(*s, lba));
                    if data.bytes() == expected {
                        outcome.right += 1;
                    } else {
                        outcome.wrong.push((*id, lba));
                    }
                }
                Err(error) => {
                    let kind = error.kind();
                    assert!(matches!(kind, ErrorKind::Corrupt | ErrorKind::Checksum), "{error}");
                    outcome.errors.insert(error.to_string());
                }
            }
        }
    }
    outcome
}

/// Opens the image and reads all volumes.
fn open_and_read(image: &SimImage, volumes: &Volumes) -> Result<Outcome> {
    let sim = SimDisk::from_image(image.clone(), 1, SimOptions::default());
    let outcome = sim.run(async {
        let pool = open(&sim).await?;
        Ok(read_all(&pool, volumes).await)
    });
    outcome.unwrap()
}

/// The error, or the first of them, that an image with this damage causes. All data read must be
/// correct.
fn error_of(image: &SimImage, volumes: &Volumes) -> String {
    match open_and_read(image, volumes) {
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            error.to_string()
        }
        Ok(outcome) => {
            assert_eq!(outcome.wrong, []);
            outcome.errors.into_iter().next().unwrap_or_default()
        }
    }
}

fn flipped(image: &SimImage, block: BlockNo) -> SimImage {
    let mut image = image.clone();
    image.blocks_mut().flip_bit(block, 8 * 100 + 3);
    image
}

/// Places of the structures of an image.
struct Places {
    geometry: Geometry,
    catalogue: Vec<BlockNo>,
    roots: Vec<BlockNo>,
    nodes: Vec<BlockNo>,
    data: Vec<BlockNo>,
    headers: Vec<BlockNo>,
    refs: Vec<(PageId, BlockNo)>,
    sums: Vec<(PageId, BlockNo)>,
}

fn places(image: &SimImage) -> Places {
    let sim = SimDisk::from_image(image.clone(), 1, SimOptions::default());
    let places = sim.run(async {
        let durable = durable_of(&sim.disk()).await;
        let geometry = durable.superblock.geometry;
        let catalogue = &durable.found.catalogue;
        let mut places = Places {
            geometry,
            catalogue: durable.found.catalogue_blocks.clone(),
            roots: Vec::new(),
            nodes: Vec::new(),
            data: Vec::new(),
            headers: Vec::new(),
            refs: Vec::new(),
            sums: Vec::new(),
        };
        for root in catalogue.volumes.iter().filter_map(|volume| volume.root) {
            places.roots.push(root.ptr.block);
        }
        for group in 0..geometry.groups() {
            let (first, len) = (geometry.block_at(group, 0), geometry.group_len(group));
            let entries = durable.entries(Table::Refs, first, len).await.unwrap();
            let blocks = (0..len).map(|index| first.plus(index)).zip(entries);
            for (block, entry) in blocks {
                match BlockType::of(entry) {
                    BlockType::Node => places.nodes.push(block),
                    BlockType::Data => places.data.push(block),
                    BlockType::Free | BlockType::Catalogue => {}
                }
            }
        }
        for (group, entry) in (0u32..).zip(&catalogue.groups) {
            if entry.generation.get() == 0 {
                continue;
            }
            places.headers.push(geometry.header_place(u64::from(group), u64::from(entry.slot)));
            let header = durable.header(group).await.unwrap();
            for table in [Table::Refs, Table::Sums] {
                let id = PageId { group, table, page: 0 };
                let (slot, generation) = header.version(id);
                let list = if table == Table::Refs { &mut places.refs } else { &mut places.sums };
                if generation.get() > 0 {
                    list.push((id, geometry.page_place(id, slot)));
                }
            }
        }
        places
    });
    places.unwrap()
}

#[test]
fn superblocks() {
    let (image, volumes) = image(1, BLOCKS, 200);
    let geometry = places(&image).geometry;
    let mut none = image.clone();
    for place in [0, 1].into_iter().flat_map(|slot| geometry.super_places(slot)) {
        let outcome = open_and_read(&flipped(&image, place), &volumes).unwrap();
        assert!(outcome.errors.is_empty() && outcome.wrong.is_empty(), "{place}: its twin serves");
        none = flipped(&none, place);
    }
    let error = error_of(&none, &volumes);
    assert!(error.contains("superblock at block ") && error.contains("checksum"), "{error}");
}

#[test]
fn catalogue_and_nodes_and_data() {
    let (image, volumes) = image(1, BLOCKS, 200);
    let places = places(&image);
    for block in places.catalogue {
        let error = error_of(&flipped(&image, block), &volumes);
        assert_eq!(error, format!("catalogue at {block}: checksum does not match"));
    }
    for block in places.roots {
        let error = error_of(&flipped(&image, block), &volumes);
        assert!(
            error.contains(&format!("map node at {block}: checksum does not match")),
            "{error}"
        );
    }
    assert!(places.data.len() > 100, "{} blocks of data", places.data.len());
    for block in places.data.into_iter().step_by(7) {
        let error = error_of(&flipped(&image, block), &volumes);
        assert!(error.contains(&format!("on {block}: data does not match")), "{error}");
    }
}

#[test]
fn tables() {
    let (image, volumes) = image(1, BLOCKS, 200);
    let places = places(&image);
    let mut met = 0;
    for block in places.headers {
        let error = error_of(&flipped(&image, block), &volumes);
        assert!(error.contains("header of group ") && error.contains("checksum"), "{error}");
    }
    for (id, block) in places.sums.into_iter().chain(places.refs) {
        let error = error_of(&flipped(&image, block), &volumes);
        // Counts are read only when they change.
        let silent = error.is_empty() && id.table == Table::Refs;
        assert!(silent || error.contains(&format!("{id}: checksum does not match")), "{error}");
        met += u32::from(!silent);
    }
    assert!(met > 1);
}

/// An image with flushed records after the last checkpoint, each in a block of its own; the block
/// and the number of the first record.
fn with_records() -> (SimImage, Volumes, BlockNo, u64) {
    let sim = SimDisk::new(4, BLOCKS, SimOptions::default());
    let volumes = sim.run(async {
        let mut world = World::new(&sim, 4).await;
        let volume = world.create(None, false).await;
        world.write(volume, 0, 50).await;
        world.pool.checkpoint().await.unwrap();
        for lba in [3, 20, 40, 60] {
            world.write(volume, lba, 1).await;
            world.pool.flush().await.unwrap();
        }
        let clone = world.create(Some(volume), false).await;
        world.discard(clone, 4, 7).await;
        world.pool.flush().await.unwrap();
        world.delete(volume).await;
        world.volumes
    });
    let image = sim.image_after_cut(CutPlan::KeepNone);
    let sim = SimDisk::from_image(image.clone(), 1, SimOptions::default());
    let superblock = sim.run(async { durable_of(&sim.disk()).await.superblock.clone() }).unwrap();
    let start = superblock.geometry.journal_start().plus(superblock.journal_offset / BLOCK_BYTES);
    (image, volumes.unwrap(), start, superblock.seal.get() + 1)
}

#[test]
fn a_flushed_record_is_not_lost_in_silence() {
    let (image, volumes, start, first) = with_records();
    let outcome = open_and_read(&image, &volumes).unwrap();
    assert!(outcome.wrong.is_empty() && outcome.errors.is_empty());
    // Each flush starts a new block. No later record confirms that the last one was flushed.
    for record in 0..6 {
        let mut bad = image.clone();
        bad.blocks_mut().flip_bit(start.plus(record), 300);
        let seqno = first + record;
        let error = open_and_read(&bad, &volumes).err().unwrap().to_string();
        assert!(error.starts_with(&format!("journal: record {seqno} is damaged")), "{error}");
    }
}

/// Damages a few blocks that were written, at most one superblock.
fn damage(image: &mut Image, geometry: &Geometry, random: &mut Rng) {
    let written: Vec<BlockNo> = image.written().collect();
    let is_super = |block: BlockNo| block.get() < 2 || block.get() >= geometry.pool_blocks - 2;
    let mut supers = 0;
    for _ in 0..1 + random.below(3) {
        let any = |random: &mut Rng| written[to_usize(random.below(to_u64(written.len())))];
        let block = any(random);
        supers += u32::from(is_super(block));
        if is_super(block) && supers > 1 {
            continue;
        }
        match random.below(4) {
            0 => image.write(block, 0, &[0; BLOCK_SIZE]),
            1 => {
                let other = *image.block(any(random));
                image.write(block, 0, &other);
            }
            2 => {
                for _ in 0..1 + random.below(20) {
                    let byte = random.bits().to_le_bytes()[0];
                    image.write(block, to_usize(random.below(4096)), &[byte]);
                }
            }
            _ => image.flip_bit(block, to_usize(random.below(32768))),
        }
    }
}

#[test]
fn random_damage_gives_correct_data_or_an_error() {
    let (mut damaged, mut refused) = (0, 0);
    for seed in 0..6 {
        let (image, volumes) = image(seed, BLOCKS, 250);
        let geometry = places(&image).geometry;
        let mut random = Rng::new(seed);
        for round in 0..60 {
            let mut bad = image.clone();
            damage(bad.blocks_mut(), &geometry, &mut random);
            match open_and_read(&bad, &volumes) {
                Ok(outcome) => {
                    assert_eq!(outcome.wrong, [], "seed {seed} round {round}");
                    damaged += u32::from(!outcome.errors.is_empty());
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                    refused += 1;
                }
            }
        }
    }
    assert!(damaged > 20 && refused > 0, "the damage was met: {damaged} {refused}");
}

/// Changes bytes of a metadata block and fixes its checksum.
fn forge(image: &mut Image, geometry: &Geometry, block: BlockNo, random: &mut Rng) {
    let mut bytes = *image.block(block);
    let is_super = block.get() < 2 || block.get() >= geometry.pool_blocks - 2;
    for _ in 0..1 + random.below(3) {
        // Most of the significant fields are near the start.
        let within = [128, 600, 4096][to_usize(random.below(3))];
        let at = to_usize(random.below(within));
        bytes[at] = match random.below(4) {
            0 => 0,
            1 => 0xFF,
            2 => bytes[at].wrapping_add(1),
            _ => random.bits().to_le_bytes()[0],
        };
    }
    if is_super {
        superblock::set_crc(&mut bytes);
    } else {
        let crc = crc32(&bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
    }
    image.write(block, 0, &bytes);
}

/// Sets all free blocks aside for nodes.
async fn set_all_aside(pool: &Pool) {
    loop {
        let refilled = pool.core.lock().refill_nodes(to_usize(BLOCKS));
        match refilled {
            Err(TakeError::Load(group)) => pool.load_group(group).await.unwrap(),
            _ => break,
        }
    }
}

/// Counts that are too low have dropped a node that a map still names. The node stays readable
/// until its block is set aside for another node.
#[test]
fn a_node_in_a_free_block_is_refused() {
    let sim = SimDisk::new(4, BLOCKS, SimOptions::default());
    sim.run(async {
        let mut world = World::new(&sim, 4).await;
        let volume = world.create(None, false).await;
        world.write(volume, 0, 50).await;
        world.pool.close().await.unwrap();
        let pool = open(&sim).await.unwrap();
        let root = pool.core.lock().state.volume(volume).unwrap().entry.root.unwrap().ptr.block;
        pool.core.lock().state.space.release(Run { block: root, len: 1 }).unwrap();
        let outcome = read_all(&pool, &world.volumes).await;
        assert!(outcome.wrong.is_empty() && outcome.errors.is_empty(), "it is still there");
        set_all_aside(&pool).await;
        let error = pool.device(volume).unwrap().read(0, 4096).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        let expected = format!("map node at {root}: its block counts as free");
        assert!(error.to_string().contains(&expected), "{error}");
    })
    .unwrap();
}

/// Uses a pool in every way; errors are allowed.
async fn use_all(sim: &SimDisk, volumes: &Volumes) {
    let disk = sim.disk();
    drop(check_offline(&disk, &|_, _| ()).await);
    drop(dump_offline(&disk, DumpForm::Text, &mut std::io::sink()).await);
    let Ok(pool) = open(sim).await else { return };
    let ids: Vec<VolumeId> = volumes.keys().copied().collect();
    for id in &ids {
        let Ok(device) = pool.device(*id) else { continue };
        for lba in (0..LBAS - 20).step_by(13) {
            drop(device.read(lba * BLOCK_BYTES, 16 * 4096).await);
            let buf = crate::runtime::Buf::zeroed(3);
            drop(device.write(lba * BLOCK_BYTES, 3 * 4096, buf, false).await);
        }
        drop(device.discard(0, 100 * BLOCK_BYTES, false).await);
        drop(pool.space(*id).await);
        drop(pool.changed(ids.first().copied(), *id, 0, 100).await);
    }
    drop(pool.check(&|_, _| ()).await);
    drop(pool.scrub(0, 1000).await);
    drop(pool.delete(ids[to_usize(sim.io_count()) % ids.len()]).await);
    drop(pool.checkpoint().await);
    drop(pool.checkpoint().await);
    drop(pool.close().await);
}

#[test]
fn forged_structures_never_cause_a_panic() {
    for seed in 0..4 {
        let (image, volumes) = image(seed, BLOCKS, 250);
        let places = places(&image);
        let geometry = places.geometry;
        let mut targets: Vec<BlockNo> = places.nodes;
        targets.truncate(60);
        targets.extend(places.roots);
        targets.extend(places.catalogue);
        targets.extend(places.headers);
        targets.extend(places.refs.iter().chain(&places.sums).map(|(_, block)| *block));
        targets.extend([0, 1].into_iter().flat_map(|slot| geometry.super_places(slot)));
        let mut random = Rng::new(seed);
        for _ in 0..150 {
            let mut bad = image.clone();
            let block = targets[to_usize(random.below(to_u64(targets.len())))];
            forge(bad.blocks_mut(), &geometry, block, &mut random);
            let sim = SimDisk::from_image(bad, 1, SimOptions::default());
            sim.run(use_all(&sim, &volumes));
        }
    }
}

#[test]
fn forged_records_never_cause_a_panic() {
    let (image, volumes, start, _) = with_records();
    let mut random = Rng::new(1);
    for _ in 0..300 {
        let mut bad = image.clone();
        let block = start.plus(random.below(7));
        let mut bytes = *bad.blocks_mut().block(block);
        let payload = to_usize(u64::from(u32::from_le_bytes(bytes[4..8].try_into().unwrap())));
        let end = 32 + payload.next_multiple_of(8);
        for _ in 0..1 + random.below(2) {
            let at = 32 + to_usize(random.below(to_u64(payload)));
            bytes[at] = [0, 0xFF, bytes[at].wrapping_add(1)][to_usize(random.below(3))];
        }
        let crc = crc32(&bytes[4..end]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        bad.blocks_mut().write(block, 0, &bytes);
        let sim = SimDisk::from_image(bad, 1, SimOptions::default());
        sim.run(use_all(&sim, &volumes));
    }
}
