//! Writes smaller than a block that race for the same block: none of them is lost, whatever they are a
//! part of, and what they have taken meanwhile is given back.

use std::rc::Rc;

use futures_util::future::{join, join_all};
use pando_engine::device::BlockDevice;
use pando_engine::disk::sim::{SimDisk, SimOptions};
use pando_engine::pool::{ModifyVolume, Pool};
use pando_engine::runtime::Buf;
use pando_sim::model::Birth;
use pando_sim::run::{check_sound, drain, perform};
use pando_sim::{Config, Op, Told};

const SECTOR: u64 = 512;

fn low(number: u64) -> u8 {
    number.to_le_bytes()[0]
}

fn full_of(byte: u8, offset: u64, len: u64) -> Buf {
    let blocks = (offset % 4096 + len).div_ceil(4096);
    let mut buf = Buf::new(usize::try_from(blocks).expect("small"));
    buf.as_mut_bytes().fill(byte);
    buf
}

async fn write(device: &Rc<dyn BlockDevice>, offset: u64, len: u64, byte: u8) {
    let (buf, len) = (full_of(byte, offset, len), u32::try_from(len).expect("small"));
    device.write(offset, len, buf, false).await.expect("a write");
}

/// Runs `test` with a volume of `blocks`, on many orders of I/O.
fn on_a_volume(blocks: u64, test: &impl AsyncFn(&Pool, Rc<dyn BlockDevice>)) {
    for seed in 0..30 {
        let _told = Told(|| format!("seed {seed}"));
        let config = Config { pool_blocks: 1500, ..Config::default() };
        let sim = SimDisk::from_image(config.formatted(), seed, SimOptions::default());
        // A write that takes itself for somebody else's would go on for ever.
        sim.set_cut_at(20_000);
        sim.run(async {
            let pool = config.open(&sim).await.expect("it opens");
            let size_bytes = Some(blocks * 4096);
            let birth = Birth { name: "v".into(), size_bytes, source: None, snapshot: false };
            perform(&pool, &Op::Create(vec![birth]), 0).await.expect("there is room");
            let id = pool.find("v").expect("it was made").id;
            test(&pool, pool.device(id).expect("it exists")).await;
            check_sound(&pool).await;
            drain(&pool).await.expect("all comes back");
        })
        .expect("it ends");
    }
}

/// What a block's sectors are full of.
async fn sectors(device: &Rc<dyn BlockDevice>, block: u64) -> Vec<u8> {
    let data = device.read(block * 4096, 4096).await.expect("a read");
    data.bytes().chunks(512).map(|sector| sector[0]).collect()
}

#[test]
fn small_writes_of_one_turn_to_one_block_are_all_there() {
    on_a_volume(4, &async |_, device| {
        // Of a block that nothing is mapped to, so that all of them come to be written at once; and
        // of one that has to be read.
        for block in [0, 0, 1] {
            let part = |n: u64| write(&device, block * 4096 + n * SECTOR, SECTOR, 1 + low(n));
            join_all((0..8).map(part)).await;
            assert_eq!(sectors(&device, block).await, [1, 2, 3, 4, 5, 6, 7, 8]);
        }
    });
}

/// A write of many records is not recorded at one instant: what it was merged with at its ends counts
/// for its first and last record alike.
#[test]
fn a_write_of_many_records_loses_none_that_race_with_its_ends() {
    on_a_volume(700, &async |_, device| {
        let last = 599 * 4096;
        join(
            join(write(&device, 0, SECTOR, 2), write(&device, last + SECTOR, SECTOR, 3)),
            write(&device, SECTOR, last, 1),
        )
        .await;
        assert_eq!(sectors(&device, 0).await, [2, 1, 1, 1, 1, 1, 1, 1]);
        assert_eq!(sectors(&device, 599).await, [1, 3, 0, 0, 0, 0, 0, 0]);
    });
}

/// Whoever was overtaken gives back what it had taken, so that a limit that is just met stays just
/// met.
#[test]
fn who_was_overtaken_takes_nothing_of_the_limit() {
    on_a_volume(64, &async |pool, device| {
        let id = pool.find("v").expect("it was made").id;
        let limit = ModifyVolume { growth_limit_bytes: Some(20 * 4096), ..ModifyVolume::default() };
        pool.modify(id, limit).await.expect("it may have a limit");
        for _ in 0..4 {
            join_all((0..4).map(|n| write(&device, n * SECTOR, SECTOR, 1))).await;
        }
        write(&device, 4096, 19 * 4096, 2).await;
        let refused = device.write(20 * 4096, 4096, full_of(3, 0, 4096), false).await;
        assert_eq!(refused.expect_err("20 are the limit").errno(), 28);
    });
}
