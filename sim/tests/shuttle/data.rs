//! Reads, writes, discards, flushes and checkpoints against each other.

use std::sync::Arc;

use pando_sim::Config;

use crate::explore::{explore, explore_slow};
use crate::harness::{Race, Start, filled, shard, volumes};

fn config() -> Config {
    Config { pool_blocks: 300, journal_blocks: 8, ..Config::default() }
}

/// Two volumes of 16 blocks in a pool that has no more left than both of them take once more: each
/// write of a whole volume waits for the blocks of the one before it, and gets them at once.
fn nearly_full(config: Config) -> Arc<Start> {
    let made = vec![
        volumes(&[("a", 16), ("b", 16), ("rest", 256)]),
        filled("a", 0, 16),
        filled("b", 0, 16),
        filled("rest", 0, 182),
    ];
    Start::after(config, made)
}

/// Each writes and flushes; some lead, others follow; the power fails. A flush on one shard covers
/// what was acknowledged on the others before it.
#[test]
fn flushes_cover_all_shards() {
    let start = Start::after(config(), vec![volumes(&[("a", 8)])]);
    explore("data::flushes_cover_all_shards", move || {
        let writer = |block: u64| {
            shard(move |s| async move {
                s.write_block("a", block).await;
                s.flush().await;
                s.write_block("a", block).await;
                s.flush().await;
            })
        };
        Race::new(&start).cut_within(30).run(vec![writer(0), writer(1), writer(2)]);
    });
}

/// Checkpoints are made while others write.
#[test]
fn checkpoints_and_writes() {
    let start = Start::after(config(), vec![volumes(&[("a", 16)]), filled("a", 0, 8)]);
    explore("data::checkpoints_and_writes", move || {
        let writer = |half: u64| {
            shard(move |mut s| async move {
                for _ in 0..3 {
                    let block = half * 8 + s.rng.below(8);
                    s.write_block("a", block).await;
                }
                s.read("a", half * 8, 8).await;
            })
        };
        let checkpoints = shard(|s| async move {
            s.checkpoint().await;
            s.checkpoint().await;
        });
        Race::new(&start).cut_within(60).run(vec![writer(0), writer(1), checkpoints]);
    });
}

/// Parts of one block are written by three, and the whole of it by one of them: none is lost.
#[test]
fn parts_of_one_block() {
    let start = Start::after(config(), vec![volumes(&[("a", 2)]), filled("a", 0, 1)]);
    explore("data::parts_of_one_block", move || {
        let writer = |number: u64| {
            shard(move |s| async move {
                s.write("a", 2 * number, 1 + number).await;
                s.write("a", 2 * number, 2).await;
                s.read("a", 0, 2).await;
            })
        };
        let whole = shard(|s| async move {
            s.write("a", 6, 4).await;
            s.write_block("a", 0).await;
        });
        Race::new(&start).cut_within(20).run(vec![writer(0), writer(1), whole]);
    });
}

/// Blocks are read while their successors are written and checkpoints free them: nobody writes
/// them before the readers have finished.
#[test]
fn readers_and_reuse() {
    let start = nearly_full(config());
    explore_slow("data::readers_and_reuse", move || {
        let reader = |volume: &'static str| {
            shard(move |s| async move {
                for _ in 0..3 {
                    s.read(volume, 0, 4).await;
                }
            })
        };
        let writer = shard(|s| async move {
            for _ in 0..2 {
                s.write_or_not("a", 0, 128).await;
                s.write_or_not("b", 0, 128).await;
                s.checkpoint().await;
            }
        });
        Race::new(&start).cut_within(120).run(vec![reader("a"), reader("b"), writer]);
    });
}

/// Free blocks are discarded, and nobody writes them meanwhile.
#[test]
fn discards_and_reuse() {
    let made = vec![
        volumes(&[("a", 16), ("b", 16), ("rest", 256)]),
        filled("a", 0, 16),
        filled("b", 0, 16),
        filled("rest", 0, 120),
    ];
    let start = Start::after(Config { discard: true, ..config() }, made);
    explore_slow("data::discards_and_reuse", move || {
        let writer = |volume: &'static str| {
            shard(move |s| async move {
                for _ in 0..3 {
                    s.write_or_not(volume, 0, 128).await;
                }
                s.read(volume, 0, 16).await;
            })
        };
        let checkpoints = shard(|s| async move {
            s.checkpoint().await;
            s.discard("a", 3, 6).await;
            s.checkpoint().await;
            s.read("a", 0, 16).await;
        });
        Race::new(&start).cut_within(160).run(vec![writer("a"), writer("b"), checkpoints]);
    });
}

/// A group is loaded while checkpoints free blocks of it that are still being read.
#[test]
fn groups_and_checkpoints() {
    let config = Config { pool_blocks: 1160, ..config() };
    let made = vec![
        volumes(&[("a", 16), ("b", 16), ("rest", 1100)]),
        filled("rest", 0, 1000),
        filled("a", 0, 16),
        filled("b", 0, 16),
    ];
    let start = Start::after(config, made);
    explore_slow("data::groups_and_checkpoints", move || {
        let reader = shard(|s| async move {
            for _ in 0..2 {
                s.read("a", 0, 4).await;
            }
        });
        let writer = |volume: &'static str| {
            shard(move |s| async move {
                for _ in 0..3 {
                    s.write_or_not(volume, 0, 128).await;
                    s.checkpoint().await;
                }
            })
        };
        Race::new(&start).cut_within(120).run(vec![reader, writer("a"), writer("b")]);
    });
}

/// A map that the cache does not hold: nodes are evicted while others are about to use them.
#[test]
fn evictions_and_look_ups() {
    let config = Config { pool_blocks: 700, cache_bytes: 0, ..config() };
    let mut made = vec![volumes(&[("a", 450)])];
    made.extend((0..150).map(|n| filled("a", 3 * n, 1)));
    let start = Start::after(config, made);
    explore_slow("data::evictions_and_look_ups", move || {
        let user = |number: u64| {
            shard(move |mut s| async move {
                for _ in 0..3 {
                    let block = 3 * s.rng.below(150);
                    s.read("a", block, 2).await;
                    let block = 150 * number + s.rng.below(150);
                    if s.rng.chance(4) {
                        s.discard("a", block, 1).await;
                    } else {
                        s.write_block("a", block).await;
                    }
                }
            })
        };
        Race::new(&start).cut_within(60).run(vec![user(0), user(1), user(2)]);
    });
}

/// All that a shard can do to data, in any order.
#[test]
fn anything_and_anything() {
    let start = Start::after(config(), vec![volumes(&[("a", 12)]), filled("a", 0, 5)]);
    explore("data::anything_and_anything", move || {
        let user = || {
            shard(|mut s| async move {
                for _ in 0..4 {
                    let (block, blocks) = (s.rng.below(8), 1 + s.rng.below(3));
                    match s.rng.below(9) {
                        0 => s.flush().await,
                        1 => s.checkpoint().await,
                        2 => s.discard("a", block, blocks).await,
                        3 => s.try_zero("a", block, blocks, false).await.expect("zeros"),
                        4 => s.try_write("a", block * 8, 8, true).await.expect("a write"),
                        5 => s.read("a", block, blocks).await,
                        6 => s.write("a", block * 8 + 3, blocks * 8).await,
                        _ => s.write("a", block * 8, blocks * 8).await,
                    }
                }
            })
        };
        Race::new(&start).cut_within(50).run(vec![user(), user(), user()]);
    });
}
