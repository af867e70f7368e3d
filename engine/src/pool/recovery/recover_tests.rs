//! Recovery: numbers of a dead process are not used again, a transient read error is not taken for
//! lost data, and flushed records need no proof.

use crate::crc::crc32;
use crate::disk::sim::gate::pass_time;
use crate::disk::sim::{CutPlan, Effect, Fault, FaultOp, Image, SimDisk, SimImage, SimOptions};
use crate::error::{ErrorKind, Result};
use crate::format::geometry::{Geometry, PageId, Table};
use crate::format::group::PAGE_FIELDS;
use crate::format::node::Node;
use crate::pool::Pool;
use crate::pool::testing::{World, open};
use crate::units::{BLOCK_BYTES, BlockNo, Generation, Lba, Seqno, VolumeId, to_u32};

const BLOCKS: u64 = 2500;

/// A pool with a volume whose blocks are all in the last checkpoint, and the volume's id.
fn pool_with_a_volume() -> (SimImage, VolumeId) {
    let sim = SimDisk::new(1, BLOCKS, SimOptions::default());
    let id = sim.run(async {
        let mut world = World::new(&sim, 1).await;
        let id = world.create(None, false).await;
        world.write(id, 0, 60).await;
        world.pool.close().await.unwrap();
        id
    });
    (sim.image_after_cut(CutPlan::KeepNone), id.unwrap())
}

async fn write(pool: &Pool, id: VolumeId, lba: u64) -> Result<()> {
    let mut buf = crate::runtime::Buf::new(1);
    buf.as_mut_bytes().fill(7);
    pool.device(id)?.write(lba * BLOCK_BYTES, 4096, buf, false).await
}

/// The newest generation of a table page or header, and the youngest birth of a node, referenced or
/// not.
fn newest(image: &Image, geometry: &Geometry, uuid: &[u8; 16]) -> (Generation, Seqno) {
    let whole = |block: BlockNo| {
        let bytes = image.block(block);
        (bytes[..4] == crc32(&bytes[4..]).to_le_bytes()).then_some(bytes)
    };
    let mut generations = vec![0];
    let at = PAGE_FIELDS.iter().find(|field| field.name == "generation").unwrap().offset;
    for group in 0..geometry.groups() {
        for slot in 0..2 {
            let pages = [Table::Refs, Table::Sums].into_iter().filter_map(|table| {
                let id = PageId { group: to_u32(group), table, page: 0 };
                whole(geometry.page_place(id, slot))
            });
            let of = |bytes: &[u8]| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            generations.extend(pages.map(|bytes| of(bytes)));
        }
    }
    let mut births = vec![Seqno::new(0)];
    for group in 0..geometry.groups() {
        for index in 0..geometry.group_len(group) {
            let block = geometry.block_at(group, index);
            let node = Node::identify(image.block(block), block, uuid);
            births.extend(node.map(Node::birth));
        }
    }
    let generation = generations.into_iter().max().unwrap_or_default();
    (Generation::new(generation), births.into_iter().max().unwrap_or(Seqno::new(0)))
}

/// redb (8e04e95b, 76aec0aa) reused the number of a transaction that a crash had interrupted; then
/// no reader can tell which of the two wrote a block.
#[test]
fn no_number_of_a_dead_life_is_used_again() {
    let (base, id) = pool_with_a_volume();
    let (mut pages, mut nodes) = (0, 0);
    for cut in 20.. {
        let sim = SimDisk::from_image(base.clone(), cut, SimOptions::default());
        sim.set_cut_at(cut);
        let ended = sim.run(async {
            let pool = open(&sim).await.unwrap();
            for lba in 0..40 {
                write(&pool, id, lba * 7 % 200).await.unwrap();
            }
            pool.checkpoint().await.unwrap();
        });
        let image = sim.image_after_cut(CutPlan::KeepAll);
        let next = SimDisk::from_image(image.clone(), cut, SimOptions::default());
        next.run(async {
            let durable = crate::pool::testing::durable_of(&next.disk()).await;
            let superblock = &durable.superblock;
            let (generation, birth) =
                newest(image.blocks(), &superblock.geometry, &superblock.uuid);
            pages += u32::from(generation > superblock.generation);
            nodes += u32::from(birth > superblock.seal);
            let pool = open(&next).await.unwrap();
            let inner = pool.core.lock();
            assert!(inner.generation > generation, "cut {cut}: {generation} again");
            assert!(inner.state.seqno > birth, "cut {cut}: birth {birth} again");
        })
        .unwrap();
        if ended.is_some() {
            break;
        }
    }
    assert!(pages > 3 && nodes > 3, "checkpoints were cut in the middle: {pages}, {nodes}");
}

/// A transient read error must not end the log.
#[test]
fn what_cannot_be_read_just_now_is_not_lost() {
    let (base, id) = pool_with_a_volume();
    let sim = SimDisk::from_image(base, 1, SimOptions::default());
    sim.run(async {
        let pool = open(&sim).await.unwrap();
        for lba in 100..110 {
            write(&pool, id, lba).await.unwrap();
        }
    });
    let killed = sim.image_after_kill(1);
    let (mut refused, mut opened) = (0, 0);
    for after in 0.. {
        let sim = SimDisk::from_image(killed.clone(), 1, SimOptions::default());
        let effect = Effect::Error { errno: libc::EIO, landed: false };
        sim.inject(Fault { op: FaultOp::Read, after, sticky: false, effect });
        sim.run(async {
            let pool = match open(&sim).await {
                Ok(pool) => pool,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
                    refused += 1;
                    return;
                }
            };
            opened += 1;
            let device = pool.device(id).unwrap();
            for lba in 100..110 {
                let read = device.read(lba * BLOCK_BYTES, 4096).await;
                // The injected error may hit this read.
                assert!(read.is_err() || read.unwrap().bytes() == [7; 4096], "read {after}: {lba}");
            }
        });
        if sim.faults_struck() == 0 {
            break;
        }
    }
    assert!(refused > 10 && opened > 1, "{refused} refused, {opened} opened");
}

/// A metadata read that fails once is retried, so it does not fail a write or a checkpoint.
#[test]
fn a_read_of_metadata_that_fails_once_is_tried_again() {
    let (base, id) = pool_with_a_volume();
    for after in 0..6 {
        let sim = SimDisk::from_image(base.clone(), 1, SimOptions::default());
        sim.run(async {
            let pool = open(&sim).await.unwrap();
            write(&pool, id, 3).await.unwrap();
            let effect = Effect::Error { errno: libc::EIO, landed: false };
            sim.inject(Fault { op: FaultOp::Read, after, sticky: false, effect });
            write(&pool, id, 50).await.unwrap();
            pool.checkpoint().await.unwrap();
            for _ in 0..6 {
                pass_time(&sim.disk()).await;
            }
            assert_eq!(pool.status().poisoned, None);
        })
        .unwrap();
        assert_eq!(sim.faults_struck(), 1);
    }
}

/// A flushed record is never taken for lost: damage to its data is damage to a block, not the end
/// of the log.
#[test]
fn damaged_data_of_a_flushed_record_is_no_end_of_the_log() {
    let (base, id) = pool_with_a_volume();
    let sim = SimDisk::from_image(base, 1, SimOptions::default());
    let block = sim.run(async {
        let pool = open(&sim).await.unwrap();
        for lba in 100..104 {
            write(&pool, id, lba).await.unwrap();
            pool.flush().await.unwrap();
        }
        let (extents, _) = pool.extents(id, Lba::new(100), Lba::new(101)).await.unwrap();
        extents[0].block
    });
    let mut image = sim.image_after_cut(CutPlan::KeepNone);
    image.blocks_mut().flip_bit(block.unwrap(), 1000);
    let sim = SimDisk::from_image(image, 1, SimOptions::default());
    sim.run(async {
        let pool = open(&sim).await.unwrap();
        let device = pool.device(id).unwrap();
        let error = device.read(100 * BLOCK_BYTES, 4096).await.err().expect("it is damaged");
        assert_eq!(error.kind(), ErrorKind::Checksum);
        for lba in 101..104 {
            assert_eq!(device.read(lba * BLOCK_BYTES, 4096).await.unwrap().bytes(), [7; 4096]);
        }
    })
    .unwrap();
}

/// The last record of the log may be torn and still look whole, in rare cases. Recovery reads the
/// blocks that it names only if they can hold data.
#[test]
fn a_record_that_names_no_block_ends_the_log() {
    let (base, id) = pool_with_a_volume();
    let sim = SimDisk::from_image(base, 1, SimOptions::default());
    let superblock = sim.run(async {
        let pool = open(&sim).await.unwrap();
        write(&pool, id, 100).await.unwrap();
        pool.flush().await.unwrap();
        crate::pool::testing::durable_of(&sim.disk()).await.superblock.clone()
    });
    let superblock = superblock.unwrap();
    let place = superblock.geometry.journal_start().plus(superblock.journal_offset / BLOCK_BYTES);
    for forged in [BLOCKS + 5, 0] {
        let mut image = sim.image_after_cut(CutPlan::KeepNone);
        let mut bytes = *image.blocks().block(place);
        // The block of the first run, after the header, tag, number of runs, volume and LBA.
        bytes[60..68].copy_from_slice(&forged.to_le_bytes());
        let end = 32 + 52_usize.next_multiple_of(8);
        let crc = crc32(&bytes[4..end]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        image.blocks_mut().write(place, 0, &bytes);
        let sim = SimDisk::from_image(image, 1, SimOptions::default());
        sim.run(async {
            let pool = open(&sim).await.unwrap();
            let read = pool.device(id).unwrap().read(100 * BLOCK_BYTES, 4096).await.unwrap();
            assert!(read.bytes().iter().all(|byte| *byte == 0));
        })
        .unwrap();
    }
}
