//! The pool on a simulated disk, in one thread.

use std::rc::Rc;

use super::*;
use crate::disk::Disk;
use crate::disk::sim::{SimDisk, SimOptions};
use crate::error::{ErrorKind, Result};
use crate::runtime::Buf;
use crate::runtime::executor::spawn_local;
use crate::units::{BLOCK_SIZE, VolumeId};

const BLOCK: u64 = 4096;

fn format_options(disk: &Rc<dyn Disk>) -> FormatOptions {
    FormatOptions {
        size_bytes: disk.len_bytes(),
        journal_bytes: Some(32 * BLOCK),
        force: false,
        uuid: [9; 16],
    }
}

async fn open(sim: &SimDisk) -> Result<Pool> {
    let options = OpenOptions {
        cache_bytes: 4 << 20,
        fanout: crate::map::Fanout { leaf_max: 8, inner_max: 6 },
        ..OpenOptions::default()
    };
    let pool = Pool::open(sim.disk(), |len| sim.map_ring(len), options).await?;
    let background = pool.clone();
    spawn_local(async move { background.run_background().await });
    Ok(pool)
}

fn volume(name: &str, source: Source) -> CreateVolume {
    CreateVolume {
        name: name.into(),
        size_bytes: (source == Source::Empty).then_some(4 << 20),
        source,
        snapshot: false,
        read_only: false,
        reservation_bytes: 0,
        growth_limit_bytes: 0,
        io_limits: IoLimits::default(),
        labels: std::collections::BTreeMap::new(),
        created_at: 1,
    }
}

fn filled(blocks: usize, byte: u8) -> Buf {
    let mut buf = Buf::new(blocks);
    buf.as_mut_bytes().fill(byte);
    buf
}

async fn write(pool: &Pool, id: VolumeId, offset: u64, len: u32, byte: u8) -> Result<()> {
    let blocks = (offset % BLOCK + u64::from(len)).div_ceil(BLOCK);
    let buf = filled(usize::try_from(blocks).unwrap(), byte);
    pool.device(id)?.write(offset, len, buf, false).await
}

async fn read(pool: &Pool, id: VolumeId, offset: u64, len: u32) -> Vec<u8> {
    pool.device(id).unwrap().read(offset, len).await.unwrap().bytes().to_vec()
}

/// An error is one line of bounded length, whatever name the request contains.
#[test]
fn what_is_no_name_is_not_repeated() {
    let sim = SimDisk::new(1, 4096, SimOptions::default());
    sim.run(async {
        let disk = sim.disk();
        Pool::format(&disk, &format_options(&disk)).await.unwrap();
        let pool = open(&sim).await.unwrap();
        for name in ["a\nb", "\u{1b}[2J", &"n".repeat(1 << 20)] {
            let unknown = pool.find(name).unwrap_err();
            assert_eq!(unknown.kind(), ErrorKind::NotFound);
            let source = Source::Volume(VolumeId::new(7));
            let impossible = pool.create(volume(name, source)).await.unwrap_err();
            assert_eq!(impossible.kind(), ErrorKind::Invalid);
            for message in [unknown.to_string(), impossible.to_string()] {
                assert!(message.len() < 500 && !message.contains(char::is_control), "{message}");
            }
        }
    })
    .unwrap();
}

#[test]
fn write_clone_overwrite_reopen() {
    let sim = SimDisk::new(1, 4096, SimOptions::default());
    let ids = sim.run(async {
        let disk = sim.disk();
        Pool::format(&disk, &format_options(&disk)).await.unwrap();
        let again = Pool::format(&disk, &format_options(&disk)).await.unwrap_err();
        assert_eq!(again.kind(), ErrorKind::Exists);
        let pool = open(&sim).await.unwrap();
        let a = pool.create(volume("a", Source::Empty)).await.unwrap().id;
        write(&pool, a, 0, 64 * 4096, 1).await.unwrap();
        write(&pool, a, 100 * 512, 512, 2).await.unwrap();
        let b = pool.create(volume("b", Source::Volume(a))).await.unwrap();
        assert_eq!(b.mapped_bytes, 64 * BLOCK);
        let b = b.id;
        write(&pool, b, 4096, 4096, 3).await.unwrap();
        write(&pool, a, 8192, 4096, 4).await.unwrap();
        pool.checkpoint().await.unwrap();
        write(&pool, a, 12288, 4096, 5).await.unwrap();
        pool.flush().await.unwrap();
        (a, b)
    });
    let (a, b) = ids.unwrap();
    // A power failure; everything was flushed.
    let image = sim.image_after_cut(crate::disk::sim::CutPlan::KeepNone);
    let sim = SimDisk::from_image(image, 2, SimOptions::default());
    sim.run(async {
        let pool = open(&sim).await.unwrap();
        assert_eq!(read(&pool, a, 4096, 4096).await, vec![1; BLOCK_SIZE]);
        assert_eq!(read(&pool, b, 4096, 4096).await, vec![3; BLOCK_SIZE]);
        assert_eq!(read(&pool, a, 8192, 4096).await, vec![4; BLOCK_SIZE]);
        assert_eq!(read(&pool, b, 8192, 4096).await, vec![1; BLOCK_SIZE]);
        assert_eq!(read(&pool, a, 12288, 4096).await, vec![5; BLOCK_SIZE]);
        assert_eq!(read(&pool, a, 100 * 512, 512).await, vec![2; 512]);
        assert_eq!(read(&pool, b, 100 * 512 - 512, 512).await, vec![1; 512]);
        assert_eq!(read(&pool, a, 3 << 20, 4096).await, vec![0; BLOCK_SIZE]);
        pool.device(a).unwrap().discard(0, 32 * BLOCK, false).await.unwrap();
        assert_eq!(read(&pool, a, 0, 4096).await, vec![0; BLOCK_SIZE]);
        assert_eq!(read(&pool, b, 0, 4096).await, vec![1; BLOCK_SIZE]);
        pool.delete(a).await.unwrap();
        pool.delete(b).await.unwrap();
        while pool.status().pending_bytes > 0 || pool.status().deletions_pending > 0 {
            pool.checkpoint().await.unwrap();
        }
        pool.checkpoint().await.unwrap();
        pool.close().await.unwrap();
        let pool = open(&sim).await.unwrap();
        let status = pool.status();
        let nodes = 256.min(status.free_bytes / BLOCK / 16) * BLOCK;
        assert!(status.free_bytes + 3 * BLOCK + nodes >= status.usable_bytes, "{status:?}");
    })
    .unwrap();
}

#[test]
fn random_overwrites_lap_the_journal() {
    for seed in 0..4 {
        let sim = SimDisk::new(seed, 4096, SimOptions::default());
        sim.run(async {
            let disk = sim.disk();
            Pool::format(&disk, &format_options(&disk)).await.unwrap();
            let pool = open(&sim).await.unwrap();
            let a = pool.create(volume("a", Source::Empty)).await.unwrap().id;
            let mut model = vec![0u8; 1024];
            let mut random = crate::disk::sim::Rng::new(seed);
            for round in 0..1500u32 {
                let lba = random.below(1024);
                let byte = u8::try_from(round % 251).unwrap() + 1;
                write(&pool, a, lba * BLOCK, 4096, byte).await.unwrap();
                model[usize::try_from(lba).unwrap()] = byte;
                if round % 7 == 0 {
                    pool.flush().await.unwrap();
                }
            }
            for (lba, byte) in (0u64..).zip(&model) {
                let got = read(&pool, a, lba * BLOCK, 4096).await;
                assert!(got.iter().all(|b| b == byte), "lba {lba}");
            }
            assert!(pool.counters().checkpoints > 2);
        })
        .unwrap();
    }
}

#[test]
fn io_limits_are_kept() {
    let sim = SimDisk::new(3, 4096, SimOptions::default());
    sim.run(async {
        let disk = sim.disk();
        Pool::format(&disk, &format_options(&disk)).await.unwrap();
        let pool = open(&sim).await.unwrap();
        let limits = IoLimits { iops: 500, bandwidth_bytes: 1 << 20 };
        let a = CreateVolume { io_limits: limits, ..volume("a", Source::Empty) };
        let a = pool.create(a).await.unwrap();
        assert_eq!(a.io_limits, limits);
        let b = pool.create(volume("b", Source::Volume(a.id))).await.unwrap();
        assert_eq!(b.io_limits, IoLimits::default(), "a clone has limits of its own");
        // Creation comes back from the catalogue, the modification from the journal.
        pool.close().await.unwrap();
        let pool = open(&sim).await.unwrap();
        assert_eq!(pool.get(a.id).unwrap().io_limits, limits);
        let change = ModifyVolume { iops_limit: Some(0), ..ModifyVolume::default() };
        pool.modify(a.id, change).await.unwrap();
        drop(pool);
        let pool = open(&sim).await.unwrap();
        let left = IoLimits { iops: 0, ..limits };
        assert_eq!(pool.get(a.id).unwrap().io_limits, left);
    })
    .unwrap();
}

#[test]
fn a_change_removes_the_labels_that_it_names() {
    let labels = |labels: &[(&str, &str)]| {
        labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    };
    let sim = SimDisk::new(4, 4096, SimOptions::default());
    sim.run(async {
        let disk = sim.disk();
        Pool::format(&disk, &format_options(&disk)).await.unwrap();
        let pool = open(&sim).await.unwrap();
        let made = labels(&[("app", ""), ("tier", "db"), ("zone", "a")]);
        let a = CreateVolume { labels: made, ..volume("a", Source::Empty) };
        let a = pool.create(a).await.unwrap().id;
        let longer = ModifyVolume { size_bytes: Some(8 << 20), ..ModifyVolume::default() };
        let info = pool.modify(a, longer).await.unwrap();
        assert_eq!(info.labels, labels(&[("app", ""), ("tier", "db"), ("zone", "a")]));
        let change = labels(&[("none", ""), ("tier", ""), ("zone", "b")]);
        let change = ModifyVolume { labels: change, ..ModifyVolume::default() };
        let info = pool.modify(a, change).await.unwrap();
        assert_eq!(info.labels, labels(&[("app", ""), ("zone", "b")]));
    })
    .unwrap();
}

#[test]
fn a_writer_who_never_flushes_is_synced_now_and_then() {
    let sim = SimDisk::new(1, 64 << 10, SimOptions::default());
    sim.run(async {
        let disk = sim.disk();
        let options = FormatOptions { journal_bytes: None, ..format_options(&disk) };
        Pool::format(&disk, &options).await.unwrap();
        let options = OpenOptions { cache_bytes: 4 << 20, ..OpenOptions::default() };
        let pool = Pool::open(disk, |len| sim.map_ring(len), options).await.unwrap();
        let a = pool.create(volume("a", Source::Empty)).await.unwrap().id;
        let before = pool.counters();
        let mebibyte = 1 << 20;
        for round in 0..127u64 {
            write(&pool, a, round % 4 * mebibyte, 1 << 20, 7).await.unwrap();
        }
        assert_eq!(pool.counters().syncs, before.syncs, "less than 128 MiB");
        for round in 0..2 {
            write(&pool, a, round * mebibyte, 1 << 20, 7).await.unwrap();
        }
        pool.flush().await.unwrap();
        let after = pool.counters();
        assert_eq!(after.checkpoints, before.checkpoints, "nobody makes any here");
        assert_eq!(after.syncs, before.syncs + 2, "one that was overdue, one asked for");
    })
    .unwrap();
}

#[test]
fn nodes_that_are_not_written_do_not_fill_the_cache() {
    let sim = SimDisk::new(5, 8192, SimOptions::default());
    sim.run(async {
        let disk = sim.disk();
        let options = FormatOptions { journal_bytes: None, ..format_options(&disk) };
        Pool::format(&disk, &options).await.unwrap();
        let fanout = crate::map::Fanout { leaf_max: 4, inner_max: 4 };
        let options = OpenOptions { cache_bytes: 0, fanout, ..OpenOptions::default() };
        let pool = Pool::open(disk, |len| sim.map_ring(len), options).await.unwrap();
        let background = pool.clone();
        spawn_local(async move { background.run_background().await });
        let a = CreateVolume { size_bytes: Some(64 << 20), ..volume("a", Source::Empty) };
        let a = pool.create(a).await.unwrap().id;
        let capacity = pool.core.lock().state.cache.capacity();
        let writer = |number: u64| {
            let pool = &pool;
            async move {
                write(pool, a, number * 8 * BLOCK, 4096, 1).await.unwrap();
                pool.core.lock().state.cache.dirty_len()
            }
        };
        let most = futures_util::future::join_all((0..1600).map(writer)).await.into_iter().max();
        // One record may add 32 runs with a leaf each, and some nodes above them.
        assert!(most <= Some(capacity + 100), "{most:?} of {capacity}");
    })
    .unwrap();
}

#[test]
fn deletions_that_wait_have_a_bound() {
    let sim = SimDisk::new(6, 16_000, SimOptions::default());
    sim.run(async {
        let disk = sim.disk();
        let options = FormatOptions { journal_bytes: None, ..format_options(&disk) };
        Pool::format(&disk, &options).await.unwrap();
        let options = OpenOptions { cache_bytes: 64 << 20, ..OpenOptions::default() };
        let pool = Pool::open(disk, |len| sim.map_ring(len), options).await.unwrap();
        // No background task: the test makes the checkpoints.
        let mut ids = Vec::new();
        for group in 0..32 {
            let of = (0..64).map(|n| volume(&format!("v{group}-{n}"), Source::Empty)).collect();
            ids.extend(pool.create_group(of).await.unwrap().into_iter().map(|made| made.id));
            pool.checkpoint().await.unwrap();
        }
        let pool = &pool;
        for some in ids.chunks(200) {
            let writes = some.iter().map(|id| async move { write(pool, *id, 0, 4096, 1).await });
            for written in futures_util::future::join_all(writes).await {
                written.unwrap();
            }
            pool.checkpoint().await.unwrap();
        }
        let deletions = ids.iter().map(|id| async move { pool.delete(*id).await });
        for deleted in futures_util::future::join_all(deletions).await {
            deleted.unwrap();
        }
        pool.checkpoint().await.unwrap();
        let waiting = usize::try_from(pool.status().deletions_pending).unwrap();
        assert!(waiting > 0 && waiting <= crate::limits::DROPS_WAITING_MAX, "{waiting}");
    })
    .unwrap();
}

#[test]
fn a_pool_that_has_just_grown_is_sound() {
    let sim = SimDisk::new(3, 600, SimOptions::default());
    sim.run(async {
        Pool::format(&sim.disk(), &format_options(&sim.disk())).await.unwrap();
        let pool = open(&sim).await.unwrap();
        pool.checkpoint().await.unwrap();
        pool.grow(900 * BLOCK).await.unwrap();
        let report = pool.check(&|_, _| ()).await.unwrap();
        assert_eq!(report.findings, [], "both slots at the new end hold a superblock");
    })
    .unwrap();
}
