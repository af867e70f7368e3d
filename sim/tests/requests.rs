//! Requests to a volume: what is refused, and what becomes of blocks that are covered in part.

use std::rc::Rc;

use pando_engine::device::{BlockDevice, ZeroFlags};
use pando_engine::disk::sim::{SimDisk, SimOptions};
use pando_engine::error::ErrorKind;
use pando_engine::limits::REQUEST_BYTES_MAX;
use pando_engine::runtime::Buf;
use pando_sim::Config;
use pando_sim::Op;
use pando_sim::model::Birth;
use pando_sim::run::perform;

/// A volume of 20 blocks, the last of which has 3 sectors.
const SIZE: u64 = 19 * 4096 + 3 * 512;

fn on_a_volume(test: impl AsyncFnOnce(Rc<dyn BlockDevice>)) {
    let sim = SimDisk::from_image(Config::default().formatted(), 1, SimOptions::default());
    sim.run(async {
        let pool = Config::default().open(&sim).await.expect("it opens");
        let birth =
            Birth { name: "v".into(), size_bytes: Some(SIZE), source: None, snapshot: false };
        perform(&pool, &Op::Create(vec![birth]), 0).await.expect("there is room");
        let id = pool.find("v").expect("it was made").id;
        test(pool.device(id).expect("it exists")).await;
    })
    .expect("the power stays on");
}

fn blocks(bytes: u64) -> Buf {
    Buf::zeroed(usize::try_from(bytes.div_ceil(4096)).expect("small"))
}

async fn fill(device: &Rc<dyn BlockDevice>, byte: u8) {
    let mut buf = blocks(SIZE);
    buf.as_mut_bytes().fill(byte);
    let len = u32::try_from(SIZE).expect("small");
    device.write(0, len, buf, false).await.expect("a write");
}

/// The sectors that are full of this byte.
async fn sectors(device: &Rc<dyn BlockDevice>, byte: u8) -> Vec<u64> {
    let len = u32::try_from(SIZE).expect("small");
    let data = device.read(0, len).await.expect("a read");
    let sectors = (0..).zip(data.bytes().chunks(512));
    sectors.filter(|(_, bytes)| bytes.iter().all(|b| *b == byte)).map(|(n, _)| n).collect()
}

#[test]
fn what_is_out_of_range_or_malformed_is_refused() {
    on_a_volume(async |device| {
        fill(&device, 1).await;
        let beyond = [(SIZE, 512), (SIZE - 512, 1024), (u64::MAX - 511, 1024)];
        let misaligned = [(100, 512), (512, 100)];
        for (offset, len) in beyond.into_iter().chain(misaligned) {
            let refused = |result: pando_engine::error::Result<()>| {
                let error = result.expect_err("it is out of range");
                assert_eq!(error.kind(), ErrorKind::Invalid, "{len} bytes at {offset}");
            };
            let long = u64::from(len);
            refused(device.read(offset, len).await.map(drop));
            refused(device.write(offset, len, blocks(offset % 4096 + long), false).await);
            refused(device.discard(offset, long, false).await);
            refused(device.write_zeroes(offset, long, ZeroFlags::default()).await);
            refused(device.mapped_runs(offset, long, 9).await.map(drop));
        }
        assert!(device.read(0, REQUEST_BYTES_MAX + 512).await.is_err());
        for (len, has) in [(4096, 2), (8192, 1), (512, 2)] {
            let write = device.write(0, len, blocks(has * 4096), false).await;
            assert_eq!(write.expect_err("the buffer is another").kind(), ErrorKind::Invalid);
        }
        assert_eq!(sectors(&device, 1).await.len(), 19 * 8 + 3, "nothing has changed");
    });
    // Larger than a request may be, in a volume that is larger still.
    let config = Config { pool_blocks: 1500, ..Config::default() };
    let sim = SimDisk::from_image(config.formatted(), 1, SimOptions::default());
    sim.run(async {
        let pool = config.open(&sim).await.expect("it opens");
        let size_bytes = Some(64 << 20);
        let birth = Birth { name: "v".into(), size_bytes, source: None, snapshot: false };
        perform(&pool, &Op::Create(vec![birth]), 0).await.expect("there is room");
        let device = pool.device(pool.find("v").expect("it was made").id).expect("it exists");
        let read = device.read(0, REQUEST_BYTES_MAX + 512).await;
        assert_eq!(read.err().expect("it is too long").kind(), ErrorKind::Invalid);
        assert!(device.read(0, REQUEST_BYTES_MAX).await.is_ok());
    })
    .expect("the power stays on");
}

#[test]
fn edges_of_discards_and_zeroes_are_kept() {
    on_a_volume(async |device| {
        for (first, count, zeros) in [
            (0, 8, 0..8),
            (4, 8, 0..0),
            (4, 12, 8..16),
            (8, 12, 8..16),
            (149, 6, 152..155),
            (152, 3, 152..155),
            (144, 9, 144..152),
        ] {
            fill(&device, 1).await;
            device.discard(first * 512, count * 512, false).await.expect("a discard");
            assert_eq!(sectors(&device, 0).await, zeros.collect::<Vec<_>>(), "{first} {count}");
            fill(&device, 1).await;
            let flags = ZeroFlags { fua: false, no_hole: first % 2 == 0 };
            device.write_zeroes(first * 512, count * 512, flags).await.expect("zeroes");
            let all: Vec<u64> = (first..first + count).collect();
            assert_eq!(sectors(&device, 0).await, all, "{first} {count}");
        }
    });
}

#[test]
fn both_edges_of_a_write_are_merged() {
    on_a_volume(async |device| {
        for (first, count) in [(1, 1), (1, 7), (7, 2), (3, 20), (8, 9), (16, 8), (150, 5)] {
            fill(&device, 1).await;
            let bytes = count * 512;
            let mut buf = blocks(first * 512 % 4096 + bytes);
            buf.as_mut_bytes().fill(2);
            let len = u32::try_from(bytes).expect("small");
            device.write(first * 512, len, buf, false).await.expect("a write");
            let all: Vec<u64> = (first..first + count).collect();
            assert_eq!(sectors(&device, 2).await, all, "{first} {count}");
            assert_eq!(sectors(&device, 1).await.len(), 155 - all.len());
        }
    });
}
