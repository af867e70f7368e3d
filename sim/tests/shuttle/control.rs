//! Volumes that are copied, deleted, grown, and pools that are closed, fail or fill up, while
//! others use them.

use std::sync::Arc;
use std::time::Duration;

use pando_engine::disk::sim::{Effect, Fault, FaultOp};
use pando_engine::error::ErrorKind;
use pando_engine::pool::{ModifyVolume, Pool};
use pando_engine::units::BLOCK_BYTES;
use pando_sim::model::Birth;
use pando_sim::run::perform;
use pando_sim::{Config, Op};

use crate::explore::{explore, explore_slow};
use crate::harness::{End, Race, Start, filled, shard, volumes};
use crate::shard::tolerate;
use crate::uses::Uses;

fn config() -> Config {
    Config { pool_blocks: 300, journal_blocks: 8, ..Config::default() }
}

/// Clones, snapshots and snapshots of two volumes at once are taken while both are written: each
/// is one instant. A clone is written at once, and so is its source.
#[test]
fn copies_and_writes() {
    let made = vec![volumes(&[("a", 8), ("b", 4)]), filled("a", 0, 2), filled("b", 0, 1)];
    let start = Start::after(config(), made);
    explore("control::copies_and_writes", move || {
        let one = shard(|s| async move {
            s.write("a", 0, 16).await;
            s.write("b", 3, 2).await;
            s.write("a", 4, 8).await;
        });
        let other = shard(|s| async move {
            s.write("b", 0, 8).await;
            s.write("a", 12, 2).await;
            s.discard("a", 1, 1).await;
            s.flush().await;
        });
        let copies = shard(|s| async move {
            s.copy(&[("s1", "a"), ("s2", "b")], true).await;
            s.copy(&[("c", "a")], false).await;
            s.write_block("c", 6).await;
            s.copy(&[("d", "b")], true).await;
            s.read("c", 6, 1).await;
        });
        Race::new(&start).cut_within(60).run(vec![one, other, copies]);
    });
}

/// A volume is deleted while it is opened, read, written, discarded and copied: its users get the
/// data or are told that it is gone, and all of its space comes back.
#[test]
fn deletes_and_users() {
    let made = vec![volumes(&[("a", 4), ("b", 8)]), filled("a", 0, 4), filled("b", 0, 8)];
    let start = Start::after(config(), made);
    explore("control::deletes_and_users", move || {
        let gone = [ErrorKind::NotFound];
        let user = shard(move |s| async move {
            tolerate(s.try_write("b", 3, 24, false).await, &gone);
            tolerate(s.try_read("b", 0, 8).await, &gone);
            tolerate(s.try_write("b", 8, 8, true).await, &gone);
            tolerate(s.try_zero("b", 2, 3, true).await, &gone);
        });
        let copies = shard(move |s| async move {
            tolerate(s.try_copy(&[("c", "b")], false).await, &gone);
            s.write("a", 0, 16).await;
            s.read("a", 0, 4).await;
        });
        let deletes = shard(|s| async move {
            s.delete("b").await;
            // Its blocks go to somebody else.
            perform(&s.pool, &volumes(&[("n", 8)]), 0).await.expect("a new volume");
            s.checkpoint().await;
            s.read("n", 0, 8).await;
            let id = s.pool.find("n").expect("it was made").id;
            s.pool.delete(id).await.expect("it exists");
        });
        Race::new(&start).run(vec![user, copies, deletes]);
    });
}

/// As the daemon does it: who deletes takes the volume for itself, which nobody gets while somebody
/// is connected. So no volume is deleted under a connection's hands.
#[test]
fn deletes_and_connections() {
    let made = vec![volumes(&[("a", 4), ("b", 8)]), filled("b", 0, 8)];
    let start = Start::after(config(), made);
    explore("control::deletes_and_connections", move || {
        let uses = Arc::new(Uses::default());
        let connection = |block: u64| {
            let uses = Arc::clone(&uses);
            shard(move |s| async move {
                for _ in 0..2 {
                    let Ok(info) = s.pool.find("b") else { return };
                    let Ok(connected) = uses.connect(&info) else { continue };
                    // Deleted between the first look and the connection.
                    let Ok(_device) = s.pool.device(info.id) else { return };
                    s.write_block("b", block).await;
                    s.read("b", block, 1).await;
                    drop(connected);
                }
            })
        };
        let (one, other) = (connection(0), connection(4));
        let deletes = shard(move |s| async move {
            for _ in 0..2 {
                s.write_block("a", 0).await;
                let info = s.pool.find("b").expect("nobody else deletes it");
                let Ok(_claim) = uses.claim(info.id, "b") else { continue };
                s.delete("b").await;
                return;
            }
        });
        Race::new(&start).run(vec![one, other, deletes]);
    });
}

/// The power fails meanwhile: a deleted volume is there whole, or gone.
#[test]
fn deletes_and_copies() {
    let made = vec![volumes(&[("a", 4), ("b", 4)]), filled("a", 0, 4), filled("b", 0, 4)];
    let start = Start::after(config(), made);
    explore("control::deletes_and_copies", move || {
        let gone = [ErrorKind::NotFound];
        let copies = shard(move |s| async move {
            tolerate(s.try_copy(&[("c", "b"), ("d", "a")], true).await, &gone);
            s.write("a", 0, 16).await;
        });
        let deletes = shard(|s| async move {
            s.delete("b").await;
            s.checkpoint().await;
        });
        let writes = shard(move |s| async move {
            tolerate(s.try_write("b", 8, 8, false).await, &gone);
            s.write("a", 20, 8).await;
            s.checkpoint().await;
        });
        Race::new(&start).cut_within(60).run(vec![copies, deletes, writes]);
    });
}

/// Pool and volume become longer while others write.
#[test]
fn growth_and_writes() {
    let start = Start::after(config(), vec![volumes(&[("a", 4)]), filled("a", 0, 4)]);
    explore("control::growth_and_writes", move || {
        let growth = shard(|s| async move {
            let id = s.pool.find("a").expect("it stays").id;
            let size_bytes = Some(8 * BLOCK_BYTES);
            let change = ModifyVolume { size_bytes, ..ModifyVolume::default() };
            s.pool.modify(id, change).await.expect("it grows");
            s.write("a", 5 * 8, 24).await;
            s.pool.grow(400 * BLOCK_BYTES).await.expect("it grows");
            s.write("a", 4 * 8, 32).await;
        });
        let writer = |block: u64| {
            shard(move |s| async move {
                s.write("a", block * 8, 16).await;
                s.flush().await;
                s.write("a", block * 8, 16).await;
                s.read("a", 0, 4).await;
            })
        };
        Race::new(&start).cut_within(60).run(vec![growth, writer(0), writer(2)]);
    });
}

/// A pool is closed under its users' hands: what they were told is true.
#[test]
fn closing_and_everything() {
    let start = Start::after(config(), vec![volumes(&[("a", 4), ("b", 4)]), filled("a", 0, 2)]);
    explore("control::closing_and_everything", move || {
        let over = [ErrorKind::Shutdown, ErrorKind::NotFound];
        let writer = move |volume: &'static str| {
            shard(move |s| async move {
                tolerate(s.try_write(volume, 2, 9, false).await, &over);
                tolerate(s.try_flush().await, &over);
                tolerate(s.try_write(volume, 0, 8, true).await, &over);
                tolerate(s.try_zero(volume, 1, 1, true).await, &over);
            })
        };
        let copies = shard(move |s| async move {
            tolerate(s.try_copy(&[("s", "a")], true).await, &over);
            tolerate(s.try_delete("b").await, &over);
            tolerate(s.try_checkpoint().await, &over);
        });
        let closes = shard(|s| async move {
            s.flush().await;
            s.pool.close().await.expect("nothing is wrong");
        });
        let race = Race::new(&start).leaves_it(End::Closed).cut_within(60);
        race.run(vec![writer("a"), writer("b"), copies, closes]);
    });
}

/// A write or a sync fails while flushes wait for it: nobody is told that it went well, nobody
/// waits for ever, and nothing is acknowledged from then on.
#[test]
fn poison_and_flushes() {
    let start = Start::after(config(), vec![volumes(&[("a", 8)]), filled("a", 0, 4)]);
    explore("control::poison_and_flushes", move || {
        let mut race = Race::new(&start).leaves_it(End::Poisoned).without_background();
        let dead = [ErrorKind::Poisoned, ErrorKind::Io];
        let writer = move |block: u64| {
            shard(move |s| async move {
                for _ in 0..2 {
                    tolerate(s.try_write("a", block * 8 + 1, 8, false).await, &dead);
                    tolerate(s.try_flush().await, &dead);
                }
            })
        };
        let checkpoints = shard(move |s| async move {
            tolerate(s.try_checkpoint().await, &dead);
            tolerate(s.try_write("a", 56, 8, true).await, &dead);
        });
        let (op, among) =
            if race.rng.chance(8) { (FaultOp::Sync, 5) } else { (FaultOp::Write, 12) };
        let effect = Effect::Error { errno: 5, landed: race.rng.chance(8) };
        let (after, sticky) = (race.rng.below(among), race.rng.chance(4));
        race.with_fault(Fault { op, after, sticky, effect }).run(vec![
            writer(0),
            writer(2),
            checkpoints,
        ]);
    });
}

/// A checkpoint fails on which writers wait for space: they are told.
#[test]
fn poison_and_writers() {
    let made = vec![
        volumes(&[("a", 12), ("b", 12), ("rest", 256)]),
        filled("a", 0, 12),
        filled("b", 0, 12),
        filled("rest", 0, 190),
    ];
    let start = Start::after(config(), made);
    explore_slow("control::poison_and_writers", move || {
        let mut race = Race::new(&start).leaves_it(End::Poisoned);
        let dead = [ErrorKind::Poisoned, ErrorKind::Io, ErrorKind::NoSpace];
        let writer = move |volume: &'static str| {
            shard(move |s| async move {
                for _ in 0..3 {
                    tolerate(s.try_write(volume, 0, 96, false).await, &dead);
                }
            })
        };
        let effect = Effect::Error { errno: 5, landed: false };
        let fault = Fault { op: FaultOp::Sync, after: race.rng.below(4), sticky: false, effect };
        race.with_fault(fault).run(vec![writer("a"), writer("b")]);
    });
}

/// Limits of a volume hold over all shards.
#[test]
fn limits_over_all_shards() {
    let start = Start::after(config(), vec![volumes(&[("a", 4)])]);
    explore("control::limits_over_all_shards", move || {
        let race = Race::new(&start).limited("a", 10);
        let clock = race.sim.clone();
        let user = |block: u64| {
            shard(move |s| async move {
                s.write_block("a", block).await;
                s.write_block("a", block).await;
            })
        };
        let begin = clock.disk().now();
        race.run_then(vec![user(0), user(1)], async move |_: &Pool| {
            // Two go on at once, as one pays for 100 ms in advance; then one each 100 ms.
            let took = clock.disk().now() - begin;
            assert!(took >= Duration::from_millis(200), "four requests in {took:?}");
        });
    });
}

/// Limits change from two sides, and end with their volume: what was said last holds, and nobody
/// waits for ever.
#[test]
fn limits_that_change() {
    let start = Start::after(config(), vec![volumes(&[("a", 4), ("b", 4)])]);
    explore("control::limits_that_change", move || {
        let gone = [ErrorKind::NotFound];
        let race = Race::new(&start).limited("a", 20);
        let clock = race.sim.clone();
        let user = shard(move |s| async move {
            s.write_block("a", 0).await;
            tolerate(s.try_write("b", 8, 8, false).await, &gone);
            tolerate(s.try_read("b", 0, 1).await, &gone);
        });
        let limits = |iops: [u64; 2]| {
            shard(move |s| async move {
                for iops in iops {
                    s.limit("a", iops).await;
                }
            })
        };
        let ends = shard(|s| async move {
            s.limit("b", 1).await;
            s.delete("b").await;
        });
        let bodies = vec![user, limits([5, 10]), limits([20, 2]), ends];
        race.run_then(bodies, async move |pool: &Pool| {
            let info = pool.find("a").expect("it stays");
            let device = pool.device(info.id).expect("it stays");
            // What it was in debt before is paid off by the first.
            device.read(0, 4096).await.expect("it can be read");
            let begin = clock.disk().now();
            for _ in 0..12 {
                device.read(0, 4096).await.expect("it can be read");
            }
            let took = (clock.disk().now() - begin).as_secs_f64();
            let rate = 12.0 / took;
            let limit = f64::from(u32::try_from(info.io_limits.iops).expect("small"));
            assert!(rate < limit * 2.5, "{rate} requests a second, the limit is {limit}");
            assert!(rate > limit / 2.5, "{rate} requests a second, the limit is {limit}");
        });
    });
}

/// What is said of a map is true of one moment during the question.
#[test]
fn maps_and_writes() {
    let mut made = vec![volumes(&[("a", 8)]), filled("a", 0, 4)];
    let snapshot =
        Birth { name: "old".into(), size_bytes: None, source: Some("a".into()), snapshot: true };
    made.extend([filled("a", 6, 1), Op::Create(vec![snapshot])]);
    let start = Start::after(config(), made);
    explore("control::maps_and_writes", move || {
        let writer = |first: u64| {
            shard(move |s| async move {
                s.write_block("a", first).await;
                s.discard("a", first + 1, 2).await;
                s.write_block("a", first + 3).await;
            })
        };
        let asks = shard(|s| async move {
            s.copy(&[("s", "a")], true).await;
            s.checkpoint().await;
            for _ in 0..2 {
                s.mapped("a", 8).await;
                s.changed("a", "old", 8).await;
            }
        });
        Race::new(&start).run(vec![writer(0), writer(4), asks]);
    });
}

/// A pool that is full refuses growth; overwrites, discards and deletions go on.
#[test]
fn a_full_pool_and_everything() {
    let made = vec![
        volumes(&[("a", 6), ("b", 6), ("g", 64), ("rest", 256)]),
        filled("a", 0, 6),
        filled("b", 0, 6),
        filled("rest", 0, 176),
    ];
    let start = Start::after(config(), made);
    explore_slow("control::a_full_pool_and_everything", move || {
        let grows = shard(|s| async move {
            for n in 0..3 {
                tolerate(s.try_write("g", 160 * n, 160, false).await, &[ErrorKind::NoSpace]);
            }
        });
        let overwrites = shard(|s| async move {
            for _ in 0..3 {
                s.write("a", 0, 48).await;
            }
            s.flush().await;
        });
        let discards = shard(|s| async move {
            s.write("b", 4, 20).await;
            s.discard("b", 1, 4).await;
            s.delete("b").await;
        });
        Race::new(&start).cut_within(80).run(vec![grows, overwrites, discards]);
    });
}

/// The checker and the scrubber find nothing while others write, copy and delete.
#[test]
fn checks_and_writes() {
    let made = vec![volumes(&[("a", 6), ("b", 6)]), filled("a", 0, 6), filled("b", 0, 3)];
    let start = Start::after(config(), made);
    explore("control::checks_and_writes", move || {
        let checks = shard(|s| async move {
            let report = s.pool.check(&|_, _| ()).await.expect("it is not closed");
            assert!(report.findings.is_empty(), "{:?}", report.findings);
            let step = s.pool.scrub(0, 1000).await.expect("it is not closed");
            assert!(step.errors.is_empty(), "{:?}", step.errors);
        });
        let writes = shard(|s| async move {
            s.write("a", 4, 24).await;
            s.checkpoint().await;
            s.write("a", 4, 24).await;
            s.discard("a", 1, 2).await;
            s.checkpoint().await;
        });
        let copies = shard(|s| async move {
            s.copy(&[("s", "b")], true).await;
            s.write("b", 0, 16).await;
            s.delete("b").await;
        });
        Race::new(&start).run(vec![checks, writes, copies]);
    });
}
