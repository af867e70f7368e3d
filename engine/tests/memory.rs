//! The memory of the journal belongs to one life of one pool. The memory of another, which a
//! restored copy of a pool or of a directory may bring, changes nothing: what was flushed is there.

use std::sync::Arc;

use pando_engine::disk::HeapRing;
use pando_engine::disk::sim::{CutPlan, SimDisk, SimImage, SimOptions};
use pando_engine::pool::{CreateVolume, FormatOptions, IoLimits, OpenOptions, Pool, Source};
use pando_engine::runtime::Buf;
use parking_lot::Mutex;

type Ring = Arc<Mutex<HeapRing>>;

const POOL_BLOCKS: u64 = 700;
const JOURNAL_BLOCKS: u64 = 16;
/// Blocks that are written; the records of so many take several blocks of the journal.
const WRITTEN: u64 = 60;

fn ring() -> Ring {
    Arc::new(Mutex::new(HeapRing::new(12 * 4096)))
}

fn copy(ring: &Ring) -> Ring {
    Arc::new(Mutex::new(ring.lock().clone()))
}

fn disk(image: &SimImage) -> SimDisk {
    SimDisk::from_image(image.clone(), 1, SimOptions::default())
}

/// What the disk holds when the power fails: what was flushed.
fn flushed(sim: &SimDisk) -> SimImage {
    sim.image_after_cut(CutPlan::KeepNone)
}

/// A pool with an empty volume.
fn formatted(uuid: u8) -> SimImage {
    let sim = SimDisk::new(0, POOL_BLOCKS, SimOptions::default());
    sim.run(async {
        let options = FormatOptions {
            size_bytes: POOL_BLOCKS * 4096,
            journal_bytes: Some(JOURNAL_BLOCKS * 4096),
            force: false,
            uuid: [uuid; 16],
        };
        Pool::format(&sim.disk(), &options).await.expect("nothing fails here");
        let pool = open(&sim, &ring()).await;
        let request = CreateVolume {
            name: "v".into(),
            size_bytes: Some(WRITTEN * 4096),
            source: Source::Empty,
            snapshot: false,
            read_only: false,
            reservation_bytes: 0,
            growth_limit_bytes: 0,
            io_limits: IoLimits::default(),
            labels: std::collections::BTreeMap::new(),
            created_at: 0,
        };
        pool.create(request).await.expect("nothing fails here");
        pool.close().await.expect("nothing fails here");
    })
    .expect("nothing fails here");
    flushed(&sim)
}

async fn open(sim: &SimDisk, ring: &Ring) -> Pool {
    let memory = Arc::clone(ring);
    let opened = Pool::open(sim.disk(), |_| Ok(Box::new(memory)), OpenOptions::default()).await;
    opened.unwrap_or_else(|error| panic!("{error}"))
}

/// Writes the volume block by block: a record for each.
async fn write(pool: &Pool, byte: u8) {
    let device =
        pool.device(pool.find("v").expect("nothing fails here").id).expect("nothing fails here");
    for block in 0..WRITTEN {
        let mut buf = Buf::new(1);
        buf.as_mut_bytes().fill(byte);
        device.write(block * 4096, 4096, buf, false).await.expect("nothing fails here");
    }
}

/// Opens `image` beside `ring`: the volume must hold `byte` all over.
fn expect(image: &SimImage, ring: &Ring, byte: u8) {
    let sim = disk(image);
    sim.run(async {
        let pool = open(&sim, ring).await;
        let device = pool
            .device(pool.find("v").expect("nothing fails here").id)
            .expect("nothing fails here");
        let data = device.read(0, 60 * 4096).await.expect("nothing fails here");
        assert!(data.bytes().iter().all(|found| *found == byte), "not all of it is {byte}");
    })
    .expect("nothing fails here");
}

#[test]
fn the_memory_of_another_pool_is_left_alone() {
    let (one, two) = (disk(&formatted(1)), disk(&formatted(2)));
    let foreign = ring();
    one.run(async { write(&open(&one, &foreign).await, 1).await }).unwrap();
    two.run(async {
        let pool = open(&two, &ring()).await;
        write(&pool, 2).await;
        pool.flush().await.unwrap();
    })
    .unwrap();
    expect(&flushed(&two), &foreign, 2);
}

#[test]
fn the_memory_of_another_life_is_left_alone() {
    let (first, ring) = (disk(&formatted(1)), ring());
    first.run(async { write(&open(&first, &ring).await, 1).await }).unwrap();
    let old = copy(&ring);
    let second = disk(&first.image_after_kill(1));
    second
        .run(async {
            let pool = open(&second, &ring).await;
            write(&pool, 2).await;
            pool.flush().await.unwrap();
        })
        .unwrap();
    expect(&flushed(&second), &old, 2);
}

#[test]
fn the_memory_of_a_later_checkpoint_is_left_alone() {
    let (sim, ring) = (disk(&formatted(1)), ring());
    let early = sim
        .run(async {
            let pool = open(&sim, &ring).await;
            write(&pool, 1).await;
            pool.flush().await.unwrap();
            let early = flushed(&sim);
            pool.checkpoint().await.unwrap();
            write(&pool, 2).await;
            pool.flush().await.unwrap();
            write(&pool, 3).await;
            early
        })
        .unwrap();
    expect(&early, &ring, 1);
}
