//! Limits, promises and "own" once the copies of a volume are gone again.

use pando_engine::state::TEMPORARY_LABEL;

use super::*;

/// The snapshot that an export reads from.
fn temporary(name: &str, source: VolumeId) -> CreateVolume {
    let labels = [(TEMPORARY_LABEL.to_owned(), "export".to_owned())].into();
    CreateVolume { labels, ..taken_of(name, source, true) }
}

async fn own_and_mapped(pool: &Pool, id: VolumeId) -> (u64, u64) {
    let info = pool.get(id).expect("it exists");
    (info.own_bytes / 4096, info.mapped_bytes / 4096)
}

async fn delete_and_settle(pool: &Pool, id: VolumeId) {
    pool.delete(id).await.expect("it exists");
    settle(pool).await.expect("the pool is sound");
}

#[test]
fn a_volume_at_its_growth_limit_takes_overwrites_once_its_copies_are_gone() {
    let config = config(700);
    for (seed, snapshot) in [(1, true), (2, false)] {
        let sim = SimDisk::from_image(config.formatted(), seed, SimOptions::default());
        sim.run(async {
            let mut pool = config.open(&sim).await.unwrap();
            let a = pool.create(promised("a", 0, 20)).await.unwrap().id;
            assert_eq!(fill(&pool, a, 100).await, 20, "the growth limit");
            let copy = pool.create(taken_of("copy", a, snapshot)).await.unwrap().id;
            assert_eq!(fill(&pool, a, 20).await, 0, "the copy keeps every block");
            delete_and_settle(&pool, copy).await;
            assert_eq!(own_and_mapped(&pool, a).await, (20, 20));
            // From the disk alone: its map is not in memory.
            pool.close().await.unwrap();
            pool = config.open(&sim).await.unwrap();
            assert_eq!(own_and_mapped(&pool, a).await, (20, 20));
            for _ in 0..3 {
                assert_eq!(fill(&pool, a, 20).await, 20, "overwrites add nothing");
            }
            assert!(!write_at(&pool, a, 20, 1).await, "the limit holds");
            drain(&pool).await.unwrap();
        })
        .unwrap();
    }
}

#[test]
fn a_reservation_that_is_used_is_not_set_aside_again_once_its_copies_are_gone() {
    let config = config(900);
    let sim = SimDisk::from_image(config.formatted(), 3, SimOptions::default());
    sim.run(async {
        let pool = config.open(&sim).await.unwrap();
        let a = pool.create(promised("a", 300, 0)).await.unwrap().id;
        assert_eq!(fill(&pool, a, 300).await, 300);
        assert_eq!(pool.status().reserved_bytes, 0, "all of it is used");
        let copy = pool.create(taken_of("copy", a, true)).await.unwrap().id;
        assert!(pool.status().reserved_bytes >= 300 * 4096, "it can be written once more");
        assert_eq!(fill(&pool, a, 10).await, 10);
        delete_and_settle(&pool, copy).await;
        assert_eq!(pool.status().reserved_bytes, 0, "all of it is used");
        let greedy = pool.create(promised("greedy", 0, 0)).await.unwrap().id;
        assert!(fill(&pool, greedy, 4096).await > 400, "the space is free for others");
        assert_eq!(fill(&pool, a, 300).await, 300, "overwrites go on in a full pool");
        drain(&pool).await.unwrap();
    })
    .unwrap();
}

#[test]
fn a_backup_needs_no_space_for_a_second_copy() {
    let config = config(900);
    let sim = SimDisk::from_image(config.formatted(), 4, SimOptions::default());
    sim.run(async {
        let pool = config.open(&sim).await.unwrap();
        let a = pool.create(promised("a", 500, 520)).await.unwrap().id;
        assert_eq!(fill(&pool, a, 500).await, 500);
        let error = pool.create(taken_of("lasting", a, true)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        let copy = pool.create(temporary("export", a)).await.expect("it goes by itself").id;
        assert_eq!(own_and_mapped(&pool, a).await, (0, 500), "the export holds it all");
        assert_eq!(pool.status().reserved_bytes, 0, "nothing is promised twice");
        let other = pool.create(promised("other", 0, 0)).await.unwrap().id;
        assert_eq!(fill(&pool, other, 100).await, 100, "others grow");
        assert_eq!(fill(&pool, a, 40).await, 40, "beyond its limit, if the copy counted");
        delete_and_settle(&pool, copy).await;
        assert_eq!(own_and_mapped(&pool, a).await, (500, 500));
        drain(&pool).await.unwrap();
    })
    .unwrap();
}

/// A backup holds what is overwritten: the reserve is not for that.
#[test]
fn overwrites_of_what_an_export_reads_do_not_use_the_reserve() {
    let config = config(900);
    let sim = SimDisk::from_image(config.formatted(), 5, SimOptions::default());
    sim.run(async {
        let pool = config.open(&sim).await.unwrap();
        let a = pool.create(promised("a", 0, 0)).await.unwrap().id;
        let got = fill(&pool, a, 4096).await;
        let copy = pool.create(temporary("export", a)).await.unwrap().id;
        let overwritten = fill(&pool, a, got).await;
        assert!(overwritten < 10, "each takes a block, and the pool is full: {overwritten}");
        delete_and_settle(&pool, copy).await;
        assert_eq!(fill(&pool, a, got).await, got, "and gives it back now");
        drain(&pool).await.unwrap();
    })
    .unwrap();
}

#[test]
fn a_volume_shares_until_the_last_of_its_family_is_gone() {
    let config = config(900);
    let sim = SimDisk::from_image(config.formatted(), 6, SimOptions::default());
    sim.run(async {
        let mut pool = config.open(&sim).await.unwrap();
        let a = pool.create(promised("a", 0, 0)).await.unwrap().id;
        let apart = pool.create(promised("apart", 0, 0)).await.unwrap().id;
        assert_eq!(fill(&pool, a, 50).await + fill(&pool, apart, 50).await, 100);
        let middle = pool.create(taken_of("middle", a, true)).await.unwrap().id;
        let last = pool.create(taken_of("last", middle, false)).await.unwrap().id;
        delete_and_settle(&pool, middle).await;
        for reopen in [false, true] {
            if reopen {
                pool.close().await.unwrap();
                pool = config.open(&sim).await.unwrap();
            }
            assert_eq!(own_and_mapped(&pool, a).await, (0, 50), "the clone of its snapshot");
            assert_eq!(own_and_mapped(&pool, last).await, (0, 50));
        }
        // The snapshot between them is gone, so that after a restart `a` is known by age alone.
        delete_and_settle(&pool, a).await;
        assert_eq!(own_and_mapped(&pool, apart).await, (50, 50));
        delete_and_settle(&pool, last).await;
        assert_eq!(own_and_mapped(&pool, apart).await, (50, 50));
        assert_eq!(pool.status().volumes, 1);
        drain(&pool).await.unwrap();
    })
    .unwrap();
}
