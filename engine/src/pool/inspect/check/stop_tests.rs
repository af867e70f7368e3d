//! Contradictions between counts and maps of a damaged pool stop the checkpoint that meets them,
//! with the block in the error, before a block is reused that something else may need.

use super::tests::{Sound, sound};
use crate::disk::sim::{SimDisk, SimOptions};
use crate::error::{ErrorKind, Result};
use crate::format::group::{BlockType, COUNT_MASK};
use crate::format::node::{LeafEntry, Node};
use crate::map::Extent;
use crate::pool::testing::open;
use crate::pool::{CreateVolume, IoLimits, Pool, Source};
use crate::units::{BLOCK_BYTES, BlockNo};
use zerocopy::FromBytes;

/// The extents of the leaf of a sound image.
fn extents(sound: &mut Sound) -> Vec<Extent> {
    let bytes = *sound.image.blocks().block(sound.leaf.block);
    let node = Node::ref_from_bytes(&bytes).unwrap();
    node.leaf().iter().map(LeafEntry::extent).collect()
}

/// Opens the pool, applies `change` to every volume, and makes a checkpoint; returns the error.
fn stops(sound: &Sound, change: &impl AsyncFn(&Pool, &str) -> Result<()>) -> String {
    let sim = SimDisk::from_image(sound.image.clone(), 1, SimOptions::default());
    let error = sim.run(async {
        let pool = open(&sim).await.unwrap();
        for info in pool.list(None, 100).0 {
            if change(&pool, &info.name).await.is_err() {
                break; // A checkpoint has failed already.
            }
        }
        let error = pool.checkpoint().await.expect_err("the counts contradict the maps");
        let before = pool.status().poisoned;
        assert!(before.is_some(), "nothing goes on from here");
        if error.kind() == ErrorKind::Poisoned { before.unwrap() } else { error.to_string() }
    });
    error.unwrap()
}

async fn delete(pool: &Pool, name: &str) -> Result<()> {
    pool.delete(pool.find(name)?.id).await
}

/// Creates a clone of the volume and discards a block of it.
async fn discard_in_clone(pool: &Pool, name: &str, lba: u64) -> Result<()> {
    let clone = CreateVolume {
        name: format!("{name}-clone"),
        size_bytes: None,
        source: Source::Volume(pool.find(name)?.id),
        snapshot: false,
        read_only: false,
        reservation_bytes: 0,
        growth_limit_bytes: 0,
        io_limits: IoLimits::default(),
        labels: std::collections::BTreeMap::new(),
        created_at: 0,
    };
    let id = pool.create(clone).await?.id;
    pool.device(id)?.discard(lba * BLOCK_BYTES, BLOCK_BYTES, false).await
}

#[test]
fn a_block_counted_as_something_else() {
    let mut sound = sound(1);
    let block = extents(&mut sound)[1].block;
    sound.set_count(block, BlockType::Node.entry(1));
    let error = stops(&sound, &delete);
    assert!(error.contains(&format!("{block} is counted as Node and used as Data")), "{error}");
}

#[test]
fn a_block_with_more_references_than_are_counted() {
    let mut sound = sound(1);
    let block = extents(&mut sound)[1].block;
    sound.edit_leaf(|entries| {
        entries[0] = LeafEntry::new(&Extent { block, ..entries[0].extent() });
    });
    let error = stops(&sound, &delete);
    assert!(error.contains(&format!("{block}: its reference count would become -")), "{error}");
}

#[test]
fn a_count_that_cannot_grow() {
    let mut sound = sound(1);
    let extents = extents(&mut sound);
    sound.set_count(extents[1].block, BlockType::Data.entry(COUNT_MASK));
    let lba = extents[0].lba.get();
    let error = stops(&sound, &async |pool, name| discard_in_clone(pool, name, lba).await);
    let says = format!("{}: its reference count would become 10737418", extents[1].block);
    assert!(error.contains(&says), "{error}");
}

#[test]
fn a_map_that_names_a_free_block() {
    let mut sound = sound(1);
    let extent = extents(&mut sound)[1];
    // In the last group, from which nothing else allocates.
    let geometry = sound.geometry();
    let free = geometry.block_at(geometry.groups() - 1, 5);
    assert!(sound.used.iter().all(|(block, _)| *block != free));
    sound.edit_leaf(|entries| {
        entries[1] = LeafEntry::new(&Extent { block: free, ..extent });
    });
    let lba = extent.lba.get();
    let error = stops(&sound, &async |pool, name| {
        let group = u32::try_from(geometry.groups() - 1).unwrap();
        pool.load_group(group).await?;
        discard_in_clone(pool, name, lba).await
    });
    assert!(error.contains(&format!("{free} is free and in use as Data")), "{error}");
}

#[test]
fn a_group_with_more_in_use_than_it_counts() {
    let mut sound = sound(1);
    sound.edit_catalogue(|catalogue| catalogue.groups.iter_mut().for_each(|group| group.free = 20));
    let error = stops(&sound, &async |pool, name| {
        let id = pool.find(name)?.id;
        if pool.get(id)?.snapshot {
            return Ok(());
        }
        let buf = crate::runtime::Buf::zeroed(60);
        pool.device(id)?.write(0, 60 * 4096, buf, false).await
    });
    assert!(error.contains(" free blocks"), "{error}");
}

/// Blocks that are out of bounds have no counts.
#[test]
fn a_map_that_names_what_is_no_block() {
    let mut sound = sound(1);
    sound.edit_leaf(|entries| {
        let block = BlockNo::new(1);
        entries[1] = LeafEntry::new(&Extent { block, ..entries[1].extent() });
    });
    let error = stops(&sound, &delete);
    assert!(error.contains("block 1 has no reference count"), "{error}");
}
