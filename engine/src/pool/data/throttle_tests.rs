//! I/O limits against the simulated clock.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use crate::disk::sim::{SimDisk, SimOptions};
use crate::error::ErrorKind;
use crate::pool::testing::{format, open};
use crate::pool::{CreateVolume, IoLimits, ModifyVolume, Pool, Source};
use crate::runtime::Buf;
use crate::runtime::executor::spawn_local;
use crate::units::{VolumeId, to_usize};

const BLOCK: u64 = 4096;
const SECOND: Duration = Duration::from_secs(1);

/// Runs `test` on a pool with one volume of 8 MiB that has these limits.
fn with_volume<Fut: Future<Output = ()>>(
    limits: IoLimits,
    test: impl FnOnce(SimDisk, Pool, VolumeId) -> Fut,
) {
    let sim = SimDisk::new(7, 8192, SimOptions::default());
    let done = sim.run(async {
        format(&sim).await;
        let pool = open(&sim).await.unwrap();
        let request = CreateVolume {
            name: "db".into(),
            size_bytes: Some(8 << 20),
            source: Source::Empty,
            snapshot: false,
            read_only: false,
            reservation_bytes: 0,
            growth_limit_bytes: 0,
            io_limits: limits,
            labels: std::collections::BTreeMap::new(),
            created_at: 0,
        };
        let id = pool.create(request).await.unwrap().id;
        test(sim.clone(), pool, id).await;
    });
    done.expect("the power stays on");
}

const fn iops(iops: u64) -> IoLimits {
    IoLimits { iops, bandwidth_bytes: 0 }
}

async fn set(pool: &Pool, id: VolumeId, iops: u64) {
    let change = ModifyVolume { iops_limit: Some(iops), ..ModifyVolume::default() };
    pool.modify(id, change).await.unwrap();
}

async fn write(pool: &Pool, id: VolumeId, lba: u64, blocks: u64) -> crate::error::Result<()> {
    let buf = Buf::zeroed(to_usize(blocks));
    let len = u32::try_from(blocks * BLOCK).unwrap();
    pool.device(id)?.write(lba % 1024 * BLOCK, len, buf, false).await
}

/// Starts `count` requests at once, alternately reads and writes. Returns the numbers of completed
/// requests, in the order of completion.
fn start(pool: &Pool, id: VolumeId, count: u64) -> Rc<RefCell<Vec<u64>>> {
    let done = Rc::new(RefCell::new(Vec::new()));
    for number in 0..count {
        let (pool, done) = (pool.clone(), Rc::clone(&done));
        spawn_local(async move {
            if number % 2 == 0 {
                write(&pool, id, number, 1).await.unwrap();
            } else {
                pool.device(id).unwrap().read(number * BLOCK, 4096).await.unwrap();
            }
            done.borrow_mut().push(number);
        });
    }
    done
}

/// Runs eight tasks on each of `pools` until `end`; returns how many requests of `blocks` they
/// completed.
async fn saturate(pools: &[Pool], id: VolumeId, blocks: u64, end: Duration) -> u64 {
    let done = Rc::new(Cell::new(0));
    for task in 0..8 * pools.len() {
        let (pool, done) = (pools[task % pools.len()].clone(), Rc::clone(&done));
        spawn_local(async move {
            let mut lba = 0;
            while pool.disk().now() < end {
                if task % 4 == 0 {
                    let device = pool.device(id).unwrap();
                    device.read(0, u32::try_from(blocks * BLOCK).unwrap()).await.unwrap();
                } else {
                    write(&pool, id, lba, blocks).await.unwrap();
                }
                lba += blocks;
                done.set(done.get() + u64::from(pool.disk().now() <= end));
            }
        });
    }
    pools[0].disk().sleep(end.saturating_sub(pools[0].disk().now())).await;
    done.get()
}

#[test]
fn the_rate_holds() {
    with_volume(iops(200), |_, pool, id| async move {
        let end = pool.disk().now() + 10 * SECOND;
        let done = saturate(&[pool], id, 1, end).await;
        assert!((1800..=2200).contains(&done), "{done} requests in 10 s at 200/s");
    });
    let limits = IoLimits { iops: 0, bandwidth_bytes: 1 << 20 };
    with_volume(limits, |_, pool, id| async move {
        let end = pool.disk().now() + 10 * SECOND;
        let done = saturate(&[pool], id, 4, end).await;
        assert!((576..=704).contains(&done), "{done} requests of 16 KiB in 10 s at 1 MiB/s");
    });
}

#[test]
fn two_handles_share_one_limit() {
    with_volume(iops(200), |sim, pool, id| async move {
        let other = Pool::attach(pool.core(), sim.disk());
        let end = pool.disk().now() + 10 * SECOND;
        let done = saturate(&[pool, other], id, 1, end).await;
        assert!((1800..=2200).contains(&done), "{done} requests in 10 s at 200/s");
    });
}

#[test]
fn a_burst_is_bounded_and_order_is_kept() {
    with_volume(iops(100), |_, pool, id| async move {
        // However long the volume was idle, it saves up no more than the burst.
        pool.disk().sleep(60 * SECOND).await;
        let done = start(&pool, id, 60);
        pool.disk().sleep(Duration::from_millis(5)).await;
        let burst = done.borrow().len();
        assert!((10..=12).contains(&burst), "{burst} requests at once");
        pool.disk().sleep(SECOND).await;
        let done = done.borrow();
        assert_eq!(done.len(), 60);
        // Within the burst reads may overtake writes; waiting requests pass one by one.
        assert!(done[12..].is_sorted(), "{done:?}");
    });
}

#[test]
fn the_largest_request_passes_the_smallest_limit_once() {
    let limits = IoLimits { iops: 0, bandwidth_bytes: 64 << 10 };
    with_volume(limits, |_, pool, id| async move {
        let begin = pool.disk().now();
        write(&pool, id, 0, 256).await.unwrap();
        assert!(pool.disk().now() - begin < SECOND, "it does not wait for itself");
        write(&pool, id, 0, 1).await.unwrap();
        let took = pool.disk().now() - begin;
        assert!((15 * SECOND..17 * SECOND).contains(&took), "1 MiB is paid off in {took:?}");
    });
}

#[test]
fn changes_reach_those_who_wait() {
    with_volume(iops(1), |_, pool, id| async move {
        let begin = pool.disk().now();
        let done = start(&pool, id, 100);
        pool.disk().sleep(3 * SECOND).await;
        assert!((3..=5).contains(&done.borrow().len()), "{done:?}");
        // A flush has no limit.
        pool.device(id).unwrap().flush().await.unwrap();
        assert!(pool.disk().now() - begin < 4 * SECOND);
        set(&pool, id, 50).await;
        pool.disk().sleep(SECOND).await;
        let after = done.borrow().len();
        assert!((45..=62).contains(&after), "{after} requests after a second at 50/s");
        set(&pool, id, 0).await;
        pool.disk().sleep(Duration::from_millis(20)).await;
        assert_eq!(done.borrow().len(), 100, "no limit any more");
        set(&pool, id, 10).await;
        let done = start(&pool, id, 100);
        pool.disk().sleep(2 * SECOND).await;
        assert!((18..=24).contains(&done.borrow().len()), "{done:?}");
    });
}

#[test]
fn nobody_waits_for_a_volume_that_is_gone() {
    with_volume(iops(1), |_, pool, id| async move {
        write(&pool, id, 0, 1).await.unwrap();
        let refused = Rc::new(Cell::new(0));
        for _ in 0..20 {
            let (pool, refused) = (pool.clone(), Rc::clone(&refused));
            spawn_local(async move {
                let error = write(&pool, id, 1, 1).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NotFound);
                refused.set(refused.get() + 1);
            });
        }
        pool.disk().sleep(Duration::from_millis(500)).await;
        assert_eq!(refused.get(), 0);
        pool.delete(id).await.unwrap();
        pool.disk().sleep(Duration::from_millis(1)).await;
        assert_eq!(refused.get(), 20);
        assert!(pool.core.lock().live.is_empty());
    });
}
