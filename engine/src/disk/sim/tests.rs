use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use super::*;
use crate::disk::RingMark;
use crate::runtime::Buf;
use crate::runtime::executor::{end_of_turn, spawn_local};
use crate::units::{BLOCK_BYTES, BLOCK_SIZE, BlockNo};

fn filled(byte: u8, blocks: usize) -> Buf {
    let mut buf = Buf::new(blocks);
    buf.as_mut_bytes().fill(byte);
    buf
}

fn first_byte(image: &SimImage, block: u64) -> u8 {
    image.blocks().block(BlockNo::new(block))[0]
}

fn new_disk(seed: u64) -> SimDisk {
    SimDisk::new(seed, 64, SimOptions::default())
}

async fn write(disk: &Rc<dyn Disk>, block: u64, byte: u8) {
    disk.write(BlockNo::new(block), vec![filled(byte, 1)]).await.unwrap();
}

#[test]
fn synced_writes_stay_and_others_may_go() {
    let sim = new_disk(1);
    let disk = sim.disk();
    sim.run(async {
        write(&disk, 1, 11).await;
        disk.sync().await.unwrap();
        write(&disk, 1, 12).await;
        write(&disk, 2, 22).await;
        let (buf, result) = disk.read(BlockNo::new(0), Buf::new(3)).await;
        result.unwrap();
        assert_eq!(buf.iter_blocks().map(|block| block[0]).collect::<Vec<_>>(), [0, 11 + 1, 22]);
    })
    .unwrap();
    let after = |plan| {
        let image = sim.image_after_cut(plan);
        (first_byte(&image, 1), first_byte(&image, 2))
    };
    assert_eq!(sim.pending(Grain::Block), 2);
    assert_eq!(sim.pending(Grain::Sector), 16);
    assert_eq!(after(CutPlan::KeepNone), (11, 0));
    assert_eq!(after(CutPlan::KeepAll), (12, 22));
    assert_eq!(after(CutPlan::Prefix(Grain::Block, 1)), (12, 0));
    assert_eq!(after(CutPlan::OnlyOne(Grain::Block, 1)), (11, 22));
    assert_eq!(after(CutPlan::AllBut(Grain::Sector, 0)), (11, 22));
    assert_eq!(after(CutPlan::Mask(Grain::Block, 0b10)), (11, 22));
    let seen: BTreeSet<_> = (0..200).map(|seed| after(CutPlan::Subset(seed))).collect();
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [(11, 0), (11, 22), (12, 0), (12, 22)]);
}

#[test]
fn a_sync_covers_only_what_was_delivered_before_it_was_asked_for() {
    let kept = (0..50).map(|seed| {
        let sim = new_disk(seed);
        let disk = sim.disk();
        sim.run(async {
            let together = sim.disk();
            spawn_local(async move { write(&together, 1, 1).await });
            end_of_turn().await;
            disk.sync().await.unwrap();
        })
        .unwrap();
        first_byte(&sim.image_after_cut(CutPlan::KeepNone), 1)
    });
    assert!(kept.into_iter().all(|byte| byte == 0), "asked for while the write was under way");
}

#[test]
fn a_write_of_many_blocks_tears_anywhere() {
    let sim = new_disk(3);
    let disk = sim.disk();
    sim.run(async {
        disk.write(BlockNo::new(0), vec![filled(1, 2), filled(1, 2)]).await.unwrap();
    })
    .unwrap();
    let mut whole = BTreeSet::new();
    let mut torn = 0;
    let mut garbage = 0;
    for seed in 0..500 {
        let image = sim.image_after_cut(CutPlan::Subset(seed));
        let blocks: Vec<_> =
            (0..4).map(|block| image.blocks().block(BlockNo::new(block))).collect();
        assert!(blocks.iter().all(|block| block.iter().all(|&byte| byte <= 1)));
        if blocks.iter().all(|block| block.iter().all(|&byte| byte == block[0])) {
            whole.insert(blocks.iter().map(|block| block[0]).collect::<Vec<_>>());
        } else {
            torn += 1;
            let sectors = blocks.iter().flat_map(|block| block.chunks(512));
            assert!(sectors.into_iter().all(|sector| sector.iter().all(|&b| b == sector[0])));
        }
        let image = sim.image_after_cut(CutPlan::Torn(seed));
        let torn = (0..4).any(|at| image.blocks().block(BlockNo::new(at)).iter().any(|&b| b > 1));
        garbage += usize::from(torn);
    }
    assert_eq!(whole.len(), 16, "every subset of whole blocks");
    assert!(torn > 50 && garbage > 100, "{torn} torn, {garbage} with garbage");
}

#[test]
fn the_memory_of_the_journal_survives_a_kill_and_no_power_failure() {
    let sim = new_disk(4);
    let mut ring = sim.map_ring(2 * BLOCK_SIZE).unwrap();
    let mark = RingMark { head: 7, ..RingMark::default() };
    ring.store(700, &[2; 40]);
    ring.set_mark(&mark);
    let seen = |image: SimImage| {
        let ring = SimDisk::from_image(image, 5, SimOptions::default()).map_ring(9 * BLOCK_SIZE);
        let mut out = [9; 2];
        let ring = ring.unwrap();
        ring.load(739, &mut out);
        (ring.len_bytes(), out, ring.mark())
    };
    assert_eq!(seen(sim.image_after_kill(9)), (2 * BLOCK_SIZE, [2, 0], mark));
    let after_cut = seen(sim.image_after_cut(CutPlan::KeepAll));
    assert_eq!(after_cut, (9 * BLOCK_SIZE, [0, 0], RingMark::default()));
    // A store of a process after its end does not count.
    sim.set_cut_at(0);
    let disk = sim.disk();
    assert!(sim.run(async { disk.sync().await }).is_none());
    ring.store(739, &[4]);
    assert_eq!(seen(sim.image_after_kill(9)).1, [2, 0]);
}

/// Eight tasks that write and sync; returns the order in which they ended.
fn workload(sim: &SimDisk) -> (Option<()>, Vec<u64>) {
    let order = Rc::new(RefCell::new(Vec::new()));
    let run = Rc::clone(&order);
    let disk = sim.disk();
    let result = sim.run(async move {
        let (done, mut all_done) = tokio::sync::mpsc::channel::<()>(1);
        for task in 0..8 {
            let (disk, order, done) = (Rc::clone(&disk), Rc::clone(&run), done.clone());
            spawn_local(async move {
                for round in 1..4 {
                    write(&disk, task * 4, round).await;
                    disk.sync().await.unwrap();
                }
                order.borrow_mut().push(task);
                drop(done);
            });
        }
        drop(done);
        all_done.recv().await;
    });
    let order = order.borrow().clone();
    (result, order)
}

#[test]
fn the_same_seed_is_the_same_run() {
    let traces: Vec<_> = [7, 7, 8]
        .map(|seed| {
            let sim = new_disk(seed);
            let (result, order) = workload(&sim);
            assert!(result.is_some());
            assert_eq!(
                sim.io_count(),
                8 * 3 * 4,
                "each write and each sync, asked for and completed"
            );
            (sim.trace(), order)
        })
        .into();
    assert_eq!(traces[0], traces[1]);
    assert_ne!(traces[0], traces[2]);
}

#[test]
fn the_power_fails_at_any_event() {
    for cut in 0..8 * 3 * 4 {
        let sim = new_disk(7);
        sim.set_cut_at(cut);
        let (result, _) = workload(&sim);
        assert!(result.is_none() && sim.is_cut());
        assert_eq!(sim.io_count(), cut);
        let image = sim.image_after_cut(CutPlan::Subset(cut));
        let recovered = SimDisk::from_image(image, cut, SimOptions::default());
        let disk = recovered.disk();
        let byte = recovered.run(async {
            let (buf, result) = disk.read(BlockNo::new(0), Buf::new(1)).await;
            result.unwrap();
            buf.as_bytes()[0]
        });
        assert!(byte.unwrap() < 4);
    }
    let sim = new_disk(7);
    sim.set_cut_at(8 * 3 * 4);
    assert!(workload(&sim).0.is_some());
}

#[test]
fn faults_strike_where_they_are_put() {
    let sim = new_disk(1);
    let disk = sim.disk();
    let fault = |op, after, sticky, effect| sim.inject(Fault { op, after, sticky, effect });
    let eio = |landed| Effect::Error { errno: libc::EIO, landed };
    let read = |block| {
        let disk = &disk;
        async move {
            let (buf, result) = disk.read(BlockNo::new(block), Buf::new(1)).await;
            result.map(|()| buf.as_bytes()[0])
        }
    };
    sim.run(async {
        fault(FaultOp::Write, 1, false, eio(false));
        write(&disk, 1, 1).await;
        let error = disk.write(BlockNo::new(2), vec![filled(2, 1)]).await.unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
        write(&disk, 3, 3).await;
        fault(FaultOp::Write, 0, false, eio(true));
        assert!(disk.write(BlockNo::new(4), vec![filled(4, 1)]).await.is_err());
        fault(FaultOp::Write, 0, false, Effect::Lost);
        write(&disk, 5, 5).await;
        fault(FaultOp::Write, 0, false, Effect::Misdirected { to: BlockNo::new(16) });
        write(&disk, 6, 6).await;
        for (block, byte) in [(1, 1), (2, 0), (3, 3), (4, 4), (5, 0), (6, 0), (16, 6)] {
            assert_eq!(read(block).await.unwrap(), byte, "block {block}");
        }
        fault(FaultOp::Read, 0, true, eio(false));
        assert!(read(1).await.is_err());
        assert!(read(1).await.is_err());
        // The next sync never makes up for a failed one.
        fault(FaultOp::Sync, 0, false, eio(false));
        assert!(disk.sync().await.is_err());
        disk.sync().await.unwrap();
    })
    .unwrap();
    assert_eq!(first_byte(&sim.image_after_cut(CutPlan::KeepNone), 1), 0);
    assert_eq!(first_byte(&sim.image_after_cut(CutPlan::KeepAll), 1), 1);
    assert_eq!(sim.faults_struck(), 7);
}

#[test]
fn growth_is_durable_with_the_next_sync() {
    let sim = new_disk(1);
    let disk = sim.disk();
    sim.run(async {
        assert!(disk.write(BlockNo::new(64), vec![filled(1, 1)]).await.is_err());
        disk.extend(80 * BLOCK_BYTES).await.unwrap();
        write(&disk, 70, 7).await;
    })
    .unwrap();
    assert_eq!(sim.image_after_cut(CutPlan::KeepNone).blocks().len_blocks(), 64);
    assert_eq!(sim.image_after_cut(CutPlan::KeepAll).blocks().len_blocks(), 80);
    sim.run(async { disk.sync().await.unwrap() }).unwrap();
    let image = sim.image_after_cut(CutPlan::KeepNone);
    assert_eq!((image.blocks().len_blocks(), first_byte(&image, 70)), (80, 7));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_deadlock_is_told() {
    new_disk(1).run(std::future::pending::<()>());
}

#[test]
fn time_passes_when_nothing_else_is_to_be_done() {
    let sim = new_disk(1);
    let disk = sim.disk();
    let order = Rc::new(RefCell::new(Vec::new()));
    sim.run(async {
        for (name, millis) in [("b", 2), ("c", 5000), ("a", 1)] {
            let (disk, order) = (Rc::clone(&disk), Rc::clone(&order));
            spawn_local(async move {
                disk.sleep(Duration::from_millis(millis)).await;
                order.borrow_mut().push(name);
            });
        }
        write(&disk, 1, 11).await;
        assert!(disk.now() < Duration::from_millis(1), "an I/O is short");
        // A dropped sleep advances no time.
        drop(disk.sleep(Duration::from_secs(1)));
        disk.sleep(Duration::from_secs(4)).await;
        assert_eq!(*order.borrow(), ["a", "b"]);
        // Continuous I/O does not stop the time.
        while order.borrow().len() < 3 {
            write(&disk, 1, 12).await;
        }
        assert_eq!(disk.now().as_secs(), 5);
    })
    .unwrap();
}

fn fault(op: FaultOp, effect: Effect) -> Fault {
    Fault { op, after: 0, sticky: false, effect }
}

#[test]
fn what_a_failed_sync_has_lost_never_replaces_what_came_later() {
    let sim = new_disk(8);
    let disk = sim.disk();
    sim.run(async {
        write(&disk, 1, 11).await;
        sim.inject(fault(FaultOp::Sync, Effect::Error { errno: 5, landed: false }));
        disk.sync().await.unwrap_err();
        write(&disk, 1, 12).await;
        assert_eq!(first_byte(&sim.image_after_cut(CutPlan::OnlyOne(Grain::Block, 0)), 1), 11);
        assert_eq!(first_byte(&sim.image_after_cut(CutPlan::KeepAll), 1), 12);
        disk.sync().await.unwrap();
        write(&disk, 2, 22).await;
    })
    .unwrap();
    assert_eq!(sim.pending(Grain::Block), 1);
    assert_eq!(first_byte(&sim.image_after_cut(CutPlan::KeepAll), 1), 12);
}

#[test]
fn slow_operations_take_their_time_and_nobody_elses() {
    let sim = new_disk(9);
    let disk = sim.disk();
    let time = Duration::from_secs(3);
    let order = Rc::new(RefCell::new(Vec::new()));
    sim.inject(fault(FaultOp::Write, Effect::Slow(time)));
    sim.run(async {
        let (slow, done) = (sim.disk(), Rc::clone(&order));
        spawn_local(async move {
            write(&slow, 1, 1).await;
            done.borrow_mut().push("slow");
        });
        end_of_turn().await;
        for block in 2..6 {
            write(&disk, block, 2).await;
        }
        order.borrow_mut().push("others");
        assert!(disk.now() < time);
        disk.sleep(2 * time).await;
    })
    .unwrap();
    assert_eq!(*order.borrow(), ["others", "slow"]);
}

#[test]
fn who_waits_for_what_never_ends_is_stuck() {
    let sim = new_disk(10);
    let disk = sim.disk();
    sim.inject(fault(FaultOp::Write, Effect::Hung));
    assert!(sim.run(write(&disk, 1, 1)).is_none());
    assert!(sim.is_stuck());
    let landed = |plan| first_byte(&sim.image_after_cut(plan), 1);
    assert_eq!((landed(CutPlan::KeepNone), landed(CutPlan::KeepAll)), (0, 1));
}

#[test]
fn writes_and_reads_go_astray() {
    let sim = new_disk(11);
    let disk = sim.disk();
    sim.run(async {
        sim.inject(fault(FaultOp::Write, Effect::Shifted(3)));
        write(&disk, 5, 7).await;
        sim.inject(fault(FaultOp::Read, Effect::Shifted(100)));
        let (buf, result) = disk.read(BlockNo::new(5), Buf::new(1)).await;
        result.unwrap();
        assert_eq!(buf.as_bytes()[0], 0, "the last block of the disk");
        sim.inject(fault(FaultOp::Read, Effect::Shifted(3)));
        let (buf, _) = disk.read(BlockNo::new(5), Buf::new(1)).await;
        assert_eq!(buf.as_bytes()[0], 7);
    })
    .unwrap();
    let places: Vec<_> = sim.strikes().iter().map(|s| (s.at.get(), s.to.get())).collect();
    assert_eq!(places, [(5, 8), (5, 63), (5, 8)]);
    assert_eq!(first_byte(&sim.image_after_cut(CutPlan::KeepAll), 5), 0);
}
