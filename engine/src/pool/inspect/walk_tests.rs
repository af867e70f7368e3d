//! Walks of maps agree with the model.

use std::collections::BTreeMap;

use crate::disk::sim::{SimDisk, SimOptions};
use crate::error::ErrorKind;
use crate::pool::testing::{LBAS, World};
use crate::units::{BLOCK_BYTES, VolumeId};

/// The changed bytes per LBA of a volume, collected in calls of at most `max` runs.
async fn changed(
    world: &World,
    old: Option<VolumeId>,
    new: VolumeId,
    max: usize,
) -> BTreeMap<u64, bool> {
    let mut found = BTreeMap::new();
    let mut from = Some(0);
    let mut last = 0;
    while let Some(offset) = from {
        let (runs, next) = world.pool.changed(old, new, offset, max).await.unwrap();
        assert!(runs.len() <= max && (next.is_none() || !runs.is_empty()));
        for run in runs {
            assert!(run.offset >= last && run.len > 0 && run.offset.is_multiple_of(BLOCK_BYTES));
            last = run.offset + run.len;
            for lba in run.offset / BLOCK_BYTES..last.div_ceil(BLOCK_BYTES) {
                found.insert(lba, run.mapped);
            }
        }
        assert!(last < LBAS * BLOCK_BYTES, "cut to the size, which is 512 bytes less");
        from = next;
    }
    found
}

#[test]
fn changes_equal_the_model() {
    for seed in 0..6 {
        let sim = SimDisk::new(seed, 8192, SimOptions::default());
        sim.run(async {
            let mut world = World::new(&sim, seed).await;
            for round in 0..40 {
                world.steps(20).await;
                let (Some(old), Some(new)) = (world.any(), world.any()) else { continue };
                let old = (round % 4 != 0).then_some(old);
                let max = [1, 3, 1000][round % 3];
                let found = changed(&world, old, new, max).await;
                let empty = BTreeMap::new();
                let before = old.map_or(&empty, |old| &world.volumes[&old]);
                let after = &world.volumes[&new];
                let differs = |lba: &u64| before.get(lba) != after.get(lba);
                let expected: BTreeMap<u64, bool> =
                    (0..LBAS).filter(differs).map(|lba| (lba, after.contains_key(&lba))).collect();
                assert_eq!(found, expected, "seed {seed} round {round}");
            }
            let missing = world.pool.changed(None, VolumeId::new(1 << 40), 0, 1).await;
            assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
        })
        .unwrap();
    }
}

#[test]
fn space_equals_the_model_and_what_a_deletion_frees() {
    for seed in 0..8 {
        let sim = SimDisk::new(seed, 8192, SimOptions::default());
        sim.run(async {
            let mut world = World::new(&sim, seed).await;
            for round in 0..12 {
                world.steps(40).await;
                world.settle().await;
                for (id, content) in &world.volumes {
                    let space = world.pool.space(*id).await.unwrap();
                    let mapped = u64::try_from(content.len()).unwrap() * BLOCK_BYTES;
                    let exclusive = world.exclusive(*id) * BLOCK_BYTES;
                    assert_eq!(space.mapped_bytes, mapped, "seed {seed} round {round} {id}");
                    assert_eq!(space.exclusive_bytes, exclusive, "seed {seed} round {round} {id}");
                    assert_eq!(space.shared_bytes, mapped - exclusive);
                }
                let Some(id) = world.any() else { continue };
                let space = world.pool.space(id).await.unwrap();
                let before = world.free().await;
                world.delete(id).await;
                world.settle().await;
                let freed = (world.free().await - before) * BLOCK_BYTES;
                assert_eq!(freed, space.freed_if_deleted_bytes, "seed {seed} round {round} {id}");
            }
        })
        .unwrap();
    }
}
