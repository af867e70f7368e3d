//! What volumes were promised they get, however full the pool is.

use super::*;

#[test]
fn reservations_and_growth_limits_hold() {
    for reserved in [0, 1, 17, 60, 200] {
        let _told = Told(|| format!("{reserved} blocks promised"));
        let config = config(700);
        let sim = SimDisk::from_image(config.formatted(), reserved, SimOptions::default());
        sim.run(async {
            let pool = config.open(&sim).await.unwrap();
            let a = pool.create(promised("a", reserved, 0)).await.unwrap().id;
            let limited = pool.create(promised("limited", 0, 20)).await.unwrap().id;
            let greedy = pool.create(promised("greedy", 0, 0)).await.unwrap().id;
            assert_eq!(fill(&pool, limited, 100).await, 20, "the growth limit");
            let got = fill(&pool, greedy, 4096).await;
            assert!(got + reserved > 400 && got + reserved < 700, "{got} blocks");
            assert_eq!(fill(&pool, limited, 20).await, 20, "overwrites go on");
            assert!(fill(&pool, a, 4096).await >= reserved, "what was promised is there");
            let error = pool.create(promised("late", 50, 0)).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoSpace, "nothing is left to promise");
            drain(&pool).await.unwrap();
        })
        .unwrap();
    }
}

fn reservation(blocks: u64) -> ModifyVolume {
    ModifyVolume { reservation_bytes: Some(blocks * 4096), ..ModifyVolume::default() }
}

/// A full pool whose volumes `a`, with a reservation that it has used, and `greedy` take all.
/// Returns them, and how many blocks `greedy` got.
async fn filled_beside(pool: &Pool, reserved: u64) -> (VolumeId, VolumeId, u64) {
    let a = pool.create(promised("a", reserved, 0)).await.expect("there is room").id;
    assert_eq!(fill(pool, a, reserved).await, reserved, "there is room");
    let greedy = pool.create(promised("greedy", 0, 0)).await.expect("there is room").id;
    let got = fill(pool, greedy, 4096).await;
    (a, greedy, got)
}

/// A copy keeps what its source has written, and the source may write all of it once more.
#[test]
fn what_a_copy_keeps_is_promised_to_its_source_again() {
    let config = config(900);
    let sim = SimDisk::from_image(config.formatted(), 7, SimOptions::default());
    sim.run(async {
        let pool = config.open(&sim).await.unwrap();
        let (a, greedy, got) = filled_beside(&pool, 100).await;
        let group = vec![taken_of("one", greedy, true), taken_of("two", a, false)];
        for copies in [vec![taken_of("s", a, true)], vec![taken_of("c", a, false)], group] {
            let error = pool.create_group(copies).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
            // 100 blocks, and 34 nodes of a map of 4096.
            assert!(
                error.to_string().contains("volume a: its reservation needs 536 KiB"),
                "{error}"
            );
        }
        let clone = CreateVolume { reservation_bytes: 50 * 4096, ..taken_of("c", greedy, false) };
        let error = pool.create(clone).await.unwrap_err().to_string();
        assert!(error.contains("volume c: its reservation needs 336 KiB"), "84 blocks: {error}");
        assert_eq!(pool.status().volumes + pool.status().snapshots, 2, "all or none");
        pool.create(taken_of("s", greedy, true)).await.expect("nothing was promised to it");
        assert!(fill(&pool, greedy, got).await < 60, "its snapshot keeps them");
        assert_eq!(fill(&pool, a, 100).await, 100, "overwrites go on");

        // What is given up in the same moment makes room for it.
        let snapshot = pool.find("s").unwrap().id;
        pool.delete(snapshot).await.unwrap();
        let device = pool.device(greedy).unwrap();
        device.discard(0, 150 * 4096, false).await.unwrap();
        pool.create_group(vec![taken_of("s", a, true), taken_of("c", a, false)])
            .await
            .expect("one promise for two copies");
        assert!(fill(&pool, greedy, got).await < 100);
        assert_eq!(fill(&pool, a, 100).await, 100, "what was promised is there");

        let error = pool.create(taken_of("again", a, true)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        pool.modify(a, reservation(0)).await.unwrap();
        pool.create(taken_of("again", a, true)).await.expect("nothing is promised any more");
        drain(&pool).await.unwrap();
    })
    .unwrap();
}

#[test]
fn what_is_promised_is_counted_once_and_all_together() {
    let config = config(900);
    let sim = SimDisk::from_image(config.formatted(), 8, SimOptions::default());
    sim.run(async {
        let pool = config.open(&sim).await.unwrap();
        let both = vec![promised("one", 500, 0), promised("two", 500, 0)];
        let error = pool.create_group(both).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        let one = pool.create(promised("one", 500, 0)).await.expect("there is room for one").id;
        pool.delete(one).await.unwrap();

        let (_, greedy, got) = filled_beside(&pool, 100).await;
        pool.modify(greedy, reservation(got)).await.expect("it has them");
        let error = pool.modify(greedy, reservation(got + 60)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        drain(&pool).await.unwrap();
    })
    .unwrap();
}

/// Overwrites borrow what was promised to others until the next checkpoint, many times over.
#[test]
fn promises_are_kept_beside_many_overwrites() {
    let config = config(900);
    for seed in 0..20 {
        let sim = SimDisk::from_image(config.formatted(), seed, SimOptions::default());
        sim.run(async {
            let pool = config.open(&sim).await.unwrap();
            let a = pool.create(promised("a", 60, 0)).await.unwrap().id;
            let greedy = pool.create(promised("greedy", 0, 0)).await.unwrap().id;
            assert!(fill(&pool, greedy, 4096).await > 256, "it gets all else");
            let overwriter = |number: u64| {
                let pool = &pool;
                async move {
                    for round in 0..20 {
                        let from = (number * 8 + round * 24) % 248;
                        assert!(write_at(pool, greedy, from, 8).await, "seed {seed}, {round}");
                    }
                }
            };
            let promised = async {
                for block in (0..60).step_by(3) {
                    assert!(write_at(&pool, a, block, 3).await, "seed {seed}, block {block}");
                }
            };
            let overwriters = join_all((0..32).map(overwriter));
            futures_util::future::join(overwriters, promised).await;
        })
        .unwrap();
    }
}

/// To write into what it shares, a clone copies nodes of the map: these are promised to it, too.
#[test]
fn the_nodes_of_what_it_shares_are_promised_to_a_clone() {
    let config = config(3000);
    let sim = SimDisk::from_image(config.formatted(), 10, SimOptions::default());
    sim.run(async {
        let pool = config.open(&sim).await.unwrap();
        let source = pool.create(promised("source", 0, 0)).await.unwrap().id;
        // Single blocks that lie apart, so that the map has many nodes.
        for block in (0..4096).step_by(4) {
            assert!(write_at(&pool, source, block, 1).await, "there is room");
        }
        let mut clones = Vec::new();
        for number in 0..40 {
            let copy = taken_of(&format!("c{number}"), source, false);
            match pool.create(CreateVolume { reservation_bytes: 32 * 4096, ..copy }).await {
                Ok(clone) => clones.push(clone.id),
                Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}"),
            }
        }
        assert!(clones.len() > 10, "{} clones", clones.len());
        let greedy = pool.create(promised("greedy", 0, 0)).await.unwrap().id;
        fill(&pool, greedy, 4096).await;
        // Each write goes to another node.
        for at in 0..32 {
            for clone in &clones {
                assert!(write_at(&pool, *clone, at * 128, 1).await, "block {at} of {clone}");
            }
        }
        drain(&pool).await.unwrap();
    })
    .unwrap();
}

/// A full pool that is full of single blocks of `source`, which lie apart, so that its map has many
/// nodes; of a clone `kept` with a reservation; and of a clone `other` without.
async fn shared_and_full(pool: &Pool) -> [VolumeId; 3] {
    let source = pool.create(promised("source", 0, 0)).await.expect("there is room").id;
    for block in (0..4096).step_by(4) {
        assert!(write_at(pool, source, block, 1).await, "there is room");
    }
    let kept = taken_of("kept", source, false);
    let kept = CreateVolume { reservation_bytes: 40 * 4096, ..kept };
    let kept = pool.create(kept).await.expect("there is room").id;
    let other = pool.create(taken_of("other", source, false)).await.expect("there is room").id;
    let greedy = pool.create(promised("greedy", 0, 0)).await.expect("there is room").id;
    fill(pool, greedy, 4096).await;
    [source, kept, other]
}

/// Discards of what is shared copy nodes, and leave those that others were promised.
#[test]
fn discards_leave_the_nodes_that_others_were_promised() {
    let config = Config { fanout: Fanout { leaf_max: 8, inner_max: 8 }, ..config(6000) };
    let sim = SimDisk::from_image(config.formatted(), 11, SimOptions::default());
    sim.run(async {
        let pool = config.open(&sim).await.unwrap();
        let [source, kept, other] = shared_and_full(&pool).await;
        let mut refused = 0;
        for volume in [source, other] {
            let device = pool.device(volume).unwrap();
            for block in (4..4096).step_by(16) {
                if let Err(error) = device.discard(block * 4096, 4096, false).await {
                    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                    assert!(error.to_string().contains("promised"), "{error}");
                    refused += 1;
                }
            }
        }
        assert!(refused > 0, "this pool is too large for this test");
        // Its own discards take its own nodes.
        let device = pool.device(kept).unwrap();
        device.discard(8 * 4096, 4096, false).await.expect("they are its own");
        for at in 0..40 {
            assert!(write_at(&pool, kept, at * 100, 1).await, "block {at} of 40");
        }
        // Without the promise there is nothing to be left.
        pool.modify(kept, reservation(0)).await.unwrap();
        pool.device(other).unwrap().discard(20 * 4096, 4096, false).await.unwrap();
        drain(&pool).await.unwrap();
    })
    .unwrap();
}

/// That it becomes longer depends on no promise, though there can be more nodes then.
#[test]
fn a_volume_grows_in_a_full_pool_whatever_it_was_promised() {
    let config = config(3000);
    let sim = SimDisk::from_image(config.formatted(), 12, SimOptions::default());
    sim.run(async {
        let pool = config.open(&sim).await.unwrap();
        let [_, kept, _] = shared_and_full(&pool).await;
        let size_bytes = Some(1 << 30);
        let longer = ModifyVolume { size_bytes, ..ModifyVolume::default() };
        pool.modify(kept, longer.clone()).await.expect("only its size changes");
        let error = pool.modify(kept, reservation(41)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        let less = ModifyVolume { size_bytes: Some(2 << 30), ..reservation(39) };
        pool.modify(kept, less).await.expect("it is promised less");
        for at in 0..39 {
            assert!(write_at(&pool, kept, at * 100, 1).await, "block {at} of 39");
        }
        assert_eq!(pool.status().poisoned, None);
    })
    .unwrap();
}
