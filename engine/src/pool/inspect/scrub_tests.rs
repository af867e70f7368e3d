//! The scrub reads every block in use, and reports every flipped bit and nothing else. The dump
//! shows all structures, whatever is damaged.

use std::collections::BTreeSet;

use crate::disk::sim::{Effect, Fault, FaultOp, Rng, SimDisk, SimOptions};
use crate::format::geometry::{PageId, Table};
use crate::format::group::BlockType;
use crate::pool::testing::{World, durable_of, image, open};
use crate::pool::{DumpForm, dump_offline};
use crate::units::{BlockNo, to_u32, to_usize};

/// Scrubs the whole pool in steps of `max` blocks. Returns the number of blocks read, and the
/// damaged ones.
async fn scrub(pool: &crate::pool::Pool, max: u64) -> (u64, BTreeSet<u64>) {
    let (mut blocks, mut damaged, mut next) = (0, BTreeSet::new(), Some(0));
    while let Some(from) = next {
        let step = pool.scrub(from, max).await.unwrap();
        assert!(step.blocks <= max && step.next_block.is_none_or(|next| next > from));
        blocks += step.blocks;
        damaged.extend(step.errors.into_iter().map(|error| error.block));
        next = step.next_block;
    }
    (blocks, damaged)
}

/// Blocks in use in an image, with their types, while no pool is open.
async fn in_use(sim: &SimDisk) -> Vec<(BlockNo, BlockType)> {
    let durable = durable_of(&sim.disk()).await;
    let geometry = durable.superblock.geometry;
    let mut blocks = Vec::new();
    for group in 0..geometry.groups() {
        for index in 0..geometry.group_len(group) {
            let block = geometry.block_at(group, index);
            let entry = durable.entries(Table::Refs, block, 1).await.unwrap()[0];
            blocks.push((block, BlockType::of(entry)));
        }
    }
    blocks.retain(|(_, kind)| *kind != BlockType::Free);
    blocks
}

#[test]
fn every_flipped_bit_is_found() {
    for seed in 0..6 {
        let (mut image, _) = image(seed, 4096, 250);
        let sim = SimDisk::from_image(image.clone(), seed, SimOptions::default());
        let used = sim.run(in_use(&sim)).unwrap();
        // Only data: opening reads the catalogue and writes a new one, and a damaged node would
        // stop the walk of its map.
        let data: Vec<_> =
            used.iter().filter(|(_, kind)| *kind == BlockType::Data).map(|(b, _)| *b).collect();
        let mut random = Rng::new(seed);
        let mut flipped = BTreeSet::new();
        for _ in 0..5 {
            let block = data[to_usize(random.below(u64::try_from(data.len()).unwrap()))];
            if flipped.insert(block.get()) {
                image.blocks_mut().flip_bit(block, to_usize(random.below(32768)));
            }
        }
        let sim = SimDisk::from_image(image, seed, SimOptions::default());
        sim.run(async {
            let pool = open(&sim).await.unwrap();
            for max in [7, 100_000] {
                let (blocks, damaged) = scrub(&pool, max).await;
                assert_eq!(damaged, flipped, "seed {seed}");
                assert_eq!(blocks, u64::try_from(used.len()).unwrap(), "seed {seed}");
            }
            assert_eq!(pool.counters().checksum_errors, 2 * u64::try_from(flipped.len()).unwrap());
        })
        .unwrap();
    }
}

#[test]
fn damaged_nodes_and_tables_and_unreadable_blocks_are_named() {
    let (mut image, _) = image(3, 4096, 250);
    let sim = SimDisk::from_image(image.clone(), 1, SimOptions::default());
    let used = sim.run(in_use(&sim)).unwrap();
    let of = |kind| used.iter().filter(move |(_, k)| *k == kind).map(|(block, _)| *block);
    let node = of(BlockType::Node).next().unwrap();
    let lost = of(BlockType::Data).next_back().unwrap();
    image.blocks_mut().flip_bit(node, 999);
    let sim = SimDisk::from_image(image, 1, SimOptions::default());
    sim.run(async {
        let pool = open(&sim).await.unwrap();
        let (_, damaged) = scrub(&pool, 64).await;
        assert_eq!(damaged, BTreeSet::from([node.get()]));
        for after in 0..4 {
            let effect = Effect::Error { errno: libc::EIO, landed: false };
            sim.inject(Fault { op: FaultOp::Read, after, sticky: false, effect });
        }
        let step = pool.scrub(lost.get(), 1).await.unwrap();
        assert_eq!((step.errors.len(), step.errors[0].block), (1, lost.get()));
        assert_eq!(sim.faults_struck(), 4, "together, then alone, three times");
    })
    .unwrap();
}

#[test]
fn what_is_written_meanwhile_is_no_damage() {
    for seed in 0..4 {
        let sim = SimDisk::new(seed, 4096, SimOptions::default());
        sim.run(async {
            let mut world = World::new(&sim, seed).await;
            world.steps(200).await;
            let scrubber = world.pool.clone();
            let done = std::rc::Rc::new(std::cell::Cell::new(0u32));
            let seen = std::rc::Rc::clone(&done);
            crate::runtime::executor::spawn_local(async move {
                for _ in 0..10 {
                    assert_eq!(scrub(&scrubber, 40).await.1, BTreeSet::new());
                    seen.set(seen.get() + 1);
                }
            });
            while done.get() < 10 {
                world.step().await;
            }
        })
        .unwrap();
    }
}

#[test]
fn the_dump_goes_on_after_damage() {
    let (image, _) = image(5, 4096, 250);
    let dump = |image| {
        let sim = SimDisk::from_image(image, 1, SimOptions::default());
        let mut out = Vec::new();
        sim.run(async { dump_offline(&sim.disk(), DumpForm::Text, &mut out).await.unwrap() })
            .unwrap();
        String::from_utf8(out).unwrap()
    };
    let sim = SimDisk::from_image(image.clone(), 1, SimOptions::default());
    let (used, places) = sim
        .run(async {
            let durable = durable_of(&sim.disk()).await;
            let geometry = durable.superblock.geometry;
            let group = to_u32(0);
            let id = PageId { group, table: Table::Refs, page: 0 };
            let (slot, _) = durable.header(group).await.unwrap().version(id);
            (in_use(&sim).await, [geometry.page_place(id, slot), geometry.super_places(0)[0]])
        })
        .unwrap();
    let whole = dump(image.clone());
    for (block, kind) in &used {
        let told = whole.lines().filter(|line| line.contains(&format!("node at {block} ")));
        let first = told.filter(|line| !line.ends_with("written above")).count();
        assert_eq!(first, usize::from(*kind == BlockType::Node), "{block}");
    }
    assert!(!whole.contains("does not"), "{whole}");
    let damaged = used.iter().map(|(block, _)| *block).chain(places);
    for block in damaged {
        let mut bad = image.clone();
        bad.blocks_mut().flip_bit(block, 4000);
        let text = dump(bad);
        assert!(text.contains("journal behind"), "it comes to the end");
        let is_data = used.contains(&(block, BlockType::Data)) || places[0] == block;
        assert!(is_data || text.contains("checksum does not match"), "{block}");
    }
}
