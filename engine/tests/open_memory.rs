//! How much memory it takes to open a pool whose journal is full: what the state needs, whatever
//! the size of the journal.

use std::collections::BTreeMap;

use pando_engine::disk::Disk;
use pando_engine::disk::mem::MemDisk;
use pando_engine::pool::{CreateVolume, FormatOptions, IoLimits, OpenOptions, Pool, Source};
use pando_engine::runtime::Buf;
use pando_engine::runtime::executor::Executor;
use pando_engine::runtime::park::ThreadDriver;
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const JOURNAL_BYTES: u64 = 32 << 20;
const VOLUME_BLOCKS: u64 = 1024;
/// The log of reference changes and the caches; ring and records would take as much again.
const PEAK_BYTES_MAX: usize = 56 << 20;

async fn open(disk: &MemDisk) -> Pool {
    let options = OpenOptions { cache_bytes: 4 << 20, ..OpenOptions::default() };
    let opened = Pool::open(disk.disk(), |len| disk.map_ring(len), options).await;
    opened.expect("the pool is sound")
}

#[test]
fn a_full_journal_is_not_read_into_memory() {
    let disk = MemDisk::new(4 << 30);
    Executor::new(ThreadDriver::new()).block_on(async {
        let options = FormatOptions {
            size_bytes: disk.len_bytes(),
            journal_bytes: Some(JOURNAL_BYTES),
            force: false,
            uuid: [9; 16],
        };
        Pool::format(&disk.disk(), &options).await.unwrap();
        // Nobody runs its background task, so the journal fills up.
        let pool = open(&disk).await;
        let request = CreateVolume {
            name: "db".into(),
            size_bytes: Some(VOLUME_BLOCKS * 4096),
            source: Source::Empty,
            snapshot: false,
            read_only: false,
            reservation_bytes: 0,
            growth_limit_bytes: 0,
            io_limits: IoLimits::default(),
            labels: BTreeMap::new(),
            created_at: 0,
        };
        let id = pool.create(request).await.unwrap().id;
        let device = pool.device(id).unwrap();
        let mut records = 0;
        while pool.status().journal_used_bytes < JOURNAL_BYTES * 3 / 4 {
            for _ in 0..1000 {
                let offset = records % VOLUME_BLOCKS * 4096;
                device.write(offset, 4096, Buf::zeroed(1), false).await.unwrap();
                records += 1;
            }
        }
        // The process dies.
        drop(device);
        drop(pool);
        let before = MEMORY.current_usage();
        MEMORY.reset_peak_usage();
        let pool = open(&disk).await;
        let peak = MEMORY.peak_usage() - before;
        println!("{records} records, {peak} bytes at most");
        assert!(records > 200_000, "{records} records");
        assert!(peak < PEAK_BYTES_MAX, "{peak} bytes for {records} records");
        assert_eq!(pool.find("db").unwrap().mapped_bytes, VOLUME_BLOCKS * 4096);
    });
}
