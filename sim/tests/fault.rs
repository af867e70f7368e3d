//! The device fails: every read, write and sync of a workload in turn, once or from then on, and
//! what it was to write has landed or not. After a failed write or sync nothing is acknowledged
//! until the pool is opened again, and then the oracle of a crash holds. A failed read is
//! reported to the reader, and the pool stays up.

use std::cell::RefCell;
use std::rc::Rc;

use pando_engine::disk::sim::{Effect, Fault, FaultOp, Rng, SimDisk, SimImage, SimOptions};
use pando_engine::error::ErrorKind;
use pando_sim::crash::plans;
use pando_sim::model::Birth;
use pando_sim::run::{Life, SharedLog, observe, resolve, step};
use pando_sim::trouble::refuses_everything;
use pando_sim::{Config, Log, Model, Op, Told};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn write(volume: &str, first: u64, count: u64) -> Op {
    Op::Write { volume: volume.into(), first, count, fua: false }
}

fn birth(name: &str, source: Option<&str>) -> Birth {
    let size_bytes = source.is_none().then_some(60 * 4096);
    Birth { name: name.into(), size_bytes, source: source.map(Into::into), snapshot: false }
}

fn workload() -> Vec<Op> {
    let mut ops = vec![
        Op::Create(vec![birth("a", None)]),
        write("a", 0, 16),
        write("a", 3, 2),
        Op::Flush,
        Op::Create(vec![birth("b", Some("a"))]),
    ];
    ops.extend((0..14).map(|i| write("a", 24 * i, 8)));
    ops.extend([
        Op::Checkpoint,
        Op::Write { volume: "b".into(), first: 100, count: 80, fua: true },
        write("b", 3, 20),
        Op::Discard { volume: "a".into(), first: 0, count: 200 },
        Op::Delete("a".into()),
        write("b", 200, 8),
        Op::Zero { volume: "b".into(), first: 101, count: 30, no_hole: false },
        Op::Checkpoint,
        write("b", 201, 4),
        Op::Flush,
    ]);
    ops
}

fn config() -> Config {
    Config { pool_blocks: 500, journal_blocks: 8, cache_bytes: 0, ..Config::default() }
}

/// How a run on a failing device went.
struct Run {
    sim: SimDisk,
    log: Log,
    struck: bool,
}

/// Runs the workload on a device that fails after `after` operations of the sort.
fn run(base: &SimImage, fault: Fault) -> Run {
    let sim = SimDisk::from_image(base.clone(), 7, SimOptions::default());
    sim.inject(fault);
    let log: SharedLog = Rc::new(RefCell::new(Log::new(Model::default())));
    sim.run(work(&sim, &log, fault.op == FaultOp::Read)).expect("the power stays on");
    let log = log.borrow().clone();
    Run { struck: sim.faults_struck() > 0, sim, log }
}

async fn work(sim: &SimDisk, log: &SharedLog, reads_fail: bool) {
    let Ok(pool) = config().open(sim).await else {
        assert!(sim.faults_struck() > 0, "the pool does not open");
        return;
    };
    for (number, op) in workload().into_iter().enumerate() {
        if reads_fail && number % 4 == 3 {
            match observe(&pool).await {
                Ok(seen) => assert!(seen == *log.borrow().last()),
                Err(error) => assert!(sim.faults_struck() > 0, "{error}"),
            }
        }
        let before = log.borrow().states.len() - 1;
        let was_poisoned = pool.status().poisoned.is_some();
        let result = step(&pool, log, &op).await;
        let poisoned = pool.status().poisoned.is_some();
        assert!(!was_poisoned || result.is_err(), "{op:?} succeeds on a poisoned pool");
        if result.is_ok() {
            continue;
        }
        assert!(sim.faults_struck() > 0, "{result:?}");
        if reads_fail && !poisoned {
            // The next reads may work; if they do not, this is the end of the run.
            if observe(&pool).await.is_err() {
                return;
            }
            resolve(&pool, log, before).await;
            continue;
        }
        assert!(poisoned, "after {result:?}");
        let of_reads: &[_] = if reads_fail { &[ErrorKind::Io] } else { &[] };
        return refuses_everything(&pool, of_reads).await;
    }
    assert!(reads_fail || sim.faults_struck() == 0 || pool.status().poisoned.is_some());
}

/// Opens what a failed run has left, after the process has ended and after the power has.
fn reopen(run: &Run, rng: &mut Rng) -> u64 {
    let open = |image, log: &Log| {
        let sim = SimDisk::from_image(image, 1, SimOptions::default());
        let log: SharedLog = Rc::new(RefCell::new(log.clone()));
        sim.run(async {
            let config = config();
            let here = Life { sim: &sim, config: &config, log: &log };
            here.begin().await.map_or_else(|error| panic!("{error}"), drop);
        });
    };
    let mut log = run.log.clone();
    log.power_failed();
    // What a failed flush was to cover may be lost though the power stays on.
    let killed = if run.sim.moment().flush_failed() { &log } else { &run.log };
    open(run.sim.image_after_kill(rng.bits()), killed);
    let plans = plans(&run.sim, rng, 6);
    for plan in &plans {
        let _told = Told(|| format!("{plan:?}"));
        open(run.sim.image_after_cut(*plan), &log);
    }
    1 + u64::try_from(plans.len()).expect("few plans")
}

/// Lets each operation of a sort fail in turn; returns how many there are, and states opened.
fn fail_each(op: FaultOp, sticky: bool, effect: Effect) -> (u64, u64) {
    let base = config().formatted();
    let mut rng = Rng::new(11);
    let mut states = 0;
    for after in 0.. {
        let fault = Fault { op, after, sticky, effect };
        let _told = Told(|| format!("{fault:?}"));
        let run = run(&base, fault);
        if !run.struck {
            return (after, states);
        }
        states += reopen(&run, &mut rng);
    }
    unreachable!("some run ends before its fault strikes")
}

#[test]
fn every_write_and_every_sync_fails() {
    let mut sum = 0;
    for op in [FaultOp::Write, FaultOp::Sync] {
        for (errno, landed) in [(EIO, false), (EIO, true), (ENOSPC, false)] {
            for sticky in [false, true] {
                let (count, states) = fail_each(op, sticky, Effect::Error { errno, landed });
                assert!(count > 12, "{count} operations of the sort {op:?}");
                sum += states;
            }
        }
    }
    println!("{sum} states after a failed write or sync");
}

#[test]
fn every_read_fails() {
    for sticky in [false, true] {
        let effect = Effect::Error { errno: EIO, landed: false };
        let (count, states) = fail_each(FaultOp::Read, sticky, effect);
        println!("{states} states after {count} reads failed in turn, sticky: {sticky}");
        assert!(count > 20);
    }
}

/// A read error is the reader's: others go on, and so does he.
#[test]
fn a_failed_read_is_told_to_the_reader_alone() {
    let config = config();
    let sim = SimDisk::from_image(config.formatted(), 1, SimOptions::default());
    let log: SharedLog = Rc::new(RefCell::new(Log::new(Model::default())));
    sim.run(async {
        let pool = config.open(&sim).await.unwrap();
        step(&pool, &log, &Op::Create(vec![birth("a", None)])).await.unwrap();
        step(&pool, &log, &write("a", 0, 80)).await.unwrap();
        let device = pool.device(pool.find("a").unwrap().id).unwrap();
        let effect = Effect::Error { errno: EIO, landed: false };
        sim.inject(Fault { op: FaultOp::Read, after: 0, sticky: false, effect });
        let error = device.read(0, 4096).await.err().expect("the device has failed");
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, EIO));
        assert!(device.read(0, 4096).await.is_ok());
        // A part of a block cannot be merged with what cannot be read, and says so.
        sim.inject(Fault { op: FaultOp::Read, after: 0, sticky: false, effect });
        let before = log.borrow().states.len() - 1;
        let error = step(&pool, &log, &write("a", 3, 2)).await.unwrap_err();
        assert_eq!(error.errno(), EIO);
        resolve(&pool, &log, before).await;
        step(&pool, &log, &write("a", 3, 2)).await.unwrap();
        step(&pool, &log, &Op::Flush).await.unwrap();
        assert!(observe(&pool).await.unwrap() == *log.borrow().last());
        assert_eq!(pool.status().poisoned, None);
    })
    .unwrap();
}
