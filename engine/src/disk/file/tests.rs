use std::time::Duration;

use super::*;
use crate::runtime::executor::Executor;
use crate::runtime::park::ThreadDriver;
use crate::runtime::reactor;
use crate::runtime::reactor::ReactorDriver;
use crate::units::BLOCK_SIZE;

fn executor() -> Executor<ReactorDriver> {
    Executor::with_spin(ReactorDriver::new().unwrap(), Duration::from_micros(50))
}

fn new_pool(blocks: u64, allocate: Allocate) -> (tempfile::TempDir, Arc<PoolFile>) {
    let directory = tempfile::tempdir().unwrap();
    let file = PoolFile::create(&directory.path().join("pool"), blocks * BLOCK_BYTES, allocate);
    (directory, Arc::new(file.unwrap()))
}

fn filled(byte: u8, blocks: usize) -> Buf {
    let mut buf = Buf::new(blocks);
    buf.as_mut_bytes().fill(byte);
    buf
}

#[test]
fn reads_what_was_written() {
    executor().block_on(reads_and_writes());
}

#[test]
fn works_without_a_ring() {
    assert!(!reactor::is_here());
    Executor::new(ThreadDriver::new()).block_on(reads_and_writes());
}

async fn reads_and_writes() {
    let (_directory, file) = new_pool(3000, Allocate::Sparse);
    {
        let disk = file.disk();
        assert_eq!(disk.len_bytes(), 3000 * BLOCK_BYTES);
        disk.write(BlockNo::new(2), vec![filled(1, 1), filled(2, 2)]).await.unwrap();
        disk.sync().await.unwrap();
        let (buf, result) = disk.read(BlockNo::new(1), Buf::new(5)).await;
        result.unwrap();
        let firsts: Vec<u8> = buf.iter_blocks().map(|block| block[0]).collect();
        assert_eq!(firsts, [0, 1, 2, 2, 0]);
        disk.discard(BlockNo::new(3), 1).await.unwrap();
        let (buf, result) = disk.read(BlockNo::new(3), Buf::new(2)).await;
        result.unwrap();
        assert_eq!([buf.as_bytes()[0], buf.as_bytes()[BLOCK_SIZE]], [0, 2]);
        // More buffers than one call accepts.
        let many = (0..1100_usize).map(|n| filled(n.to_le_bytes()[0], 1 + n % 2)).collect();
        disk.write(BlockNo::new(16), many).await.unwrap();
        let (buf, result) = disk.read(BlockNo::new(16), Buf::new(1650)).await;
        result.unwrap();
        let expected = (0..1100_usize).flat_map(|n| vec![n.to_le_bytes()[0]; 1 + n % 2]);
        assert!(buf.iter_blocks().map(|block| block[4095]).eq(expected));
        let (_, result) = disk.read(BlockNo::new(2999), Buf::new(2)).await;
        assert!(result.is_err());
    }
}

#[test]
fn refuses_what_is_outside() {
    let (_directory, file) = new_pool(4, Allocate::Sparse);
    executor().block_on(async {
        let disk = file.disk();
        let (_, result) = disk.read(BlockNo::new(3), Buf::new(2)).await;
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Invalid);
        let far = BlockNo::new(u64::MAX);
        let error = disk.write(far, vec![filled(1, 1)]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(disk.discard(BlockNo::new(1), u64::MAX).await.is_err());
        disk.extend(8 * BLOCK_BYTES).await.unwrap();
        disk.extend(BLOCK_BYTES).await.unwrap();
        assert_eq!(disk.len_bytes(), 8 * BLOCK_BYTES, "never made shorter");
        disk.write(BlockNo::new(7), vec![filled(1, 1)]).await.unwrap();
    });
}

#[test]
fn locked_against_a_second_open_for_as_long_as_any_handle_lives() {
    let (directory, file) = new_pool(4, Allocate::Sparse);
    let path = file.path().to_owned();
    assert_eq!(PoolFile::open(&path).unwrap_err().kind(), ErrorKind::Busy);
    let ring = file.map_ring(directory.path(), BLOCK_SIZE).unwrap();
    drop(file);
    assert_eq!(PoolFile::open(&path).unwrap_err().kind(), ErrorKind::Busy);
    drop(ring);
    assert_eq!(PoolFile::open(&path).unwrap().len_bytes(), 4 * BLOCK_BYTES);
}

#[test]
fn never_overwrites_and_leaves_nothing_half_made() {
    let (directory, file) = new_pool(4, Allocate::Write);
    let error = PoolFile::create(file.path(), BLOCK_BYTES, Allocate::Sparse).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    assert_eq!(file.len_bytes(), 4 * BLOCK_BYTES);
    let other = directory.path().join("other");
    assert!(PoolFile::create(&other, 1000, Allocate::Sparse).is_err());
    // More than the host has: refused, and the file is removed again.
    assert!(PoolFile::create(&other, POOL_BYTES_MAX, Allocate::Reserve).is_err());
    assert_eq!(PoolFile::open(&other).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(PoolFile::open(directory.path()).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn space_set_aside_is_set_aside_for_growth_too() {
    let (_directory, file) = new_pool(600, Allocate::Write);
    let allocated = || rustix::fs::fstat(file.fd()).unwrap().st_blocks * 512;
    assert!(allocated() >= 600 * 4096);
    file.extend(1200 * BLOCK_BYTES).unwrap();
    assert!(allocated() >= 1200 * 4096);
    let (_directory, sparse) = new_pool(600, Allocate::Sparse);
    sparse.extend(1200 * BLOCK_BYTES).unwrap();
    assert!(rustix::fs::fstat(sparse.fd()).unwrap().st_blocks < 100);
}

#[test]
fn a_file_with_its_space_set_aside_is_told_from_a_sparse_one() {
    for (allocate, reserved) in
        [(Allocate::Sparse, false), (Allocate::Reserve, true), (Allocate::Write, true)]
    {
        let (_directory, file) = new_pool(600, allocate);
        assert_eq!(file.is_reserved().unwrap(), reserved, "{allocate:?}");
        let path = file.path().to_owned();
        drop(file);
        let file = Arc::new(PoolFile::open(&path).unwrap());
        assert_eq!(file.is_reserved().unwrap(), reserved, "{allocate:?}, opened again");
        Executor::new(ThreadDriver::new()).block_on(async {
            file.disk().discard(BlockNo::new(256), 256).await.unwrap();
        });
        assert!(!file.is_reserved().unwrap(), "{allocate:?}, with a hole");
    }
}
