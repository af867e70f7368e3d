//! The power fails at every event of a workload, and at every event of the recovery from that; the
//! process is killed. What must be there then is there, and the whole pool is one state of the
//! past.

use std::cell::RefCell;
use std::rc::Rc;

use pando_engine::disk::sim::{CutPlan, Grain, Rng, SimDisk, SimImage, SimOptions};
use pando_engine::map::Fanout;
use pando_engine::units::{BlockNo, to_u64, to_usize};
use pando_sim::crash::plans;
use pando_sim::gen_ops::Bounds;
use pando_sim::model::Birth;
use pando_sim::run::{Life, SharedLog, drain};
use pando_sim::{Config, Explorer, Generator, Log, Model, Op, Reach, Told};

fn tiny() -> Config {
    Config {
        pool_blocks: 400,
        journal_blocks: 8,
        fanout: Fanout { leaf_max: 4, inner_max: 4 },
        cache_bytes: 1 << 20,
        discard: true,
        cascade_nodes: 2,
    }
}

fn write(volume: &str, first: u64, count: u64) -> Op {
    Op::Write { volume: volume.into(), first, count, fua: false }
}

fn birth(name: &str, source: Option<&str>, snapshot: bool) -> Birth {
    let size_bytes = source.is_none().then_some(40 * 4096);
    Birth { name: name.into(), size_bytes, source: source.map(Into::into), snapshot }
}

/// Every kind of operation, in an order in which they meet what others have left.
fn short_workload() -> Vec<Op> {
    let discard = |volume: &str, first, count| Op::Discard { volume: volume.into(), first, count };
    vec![
        Op::Create(vec![birth("a", None, false)]),
        write("a", 0, 8),
        write("a", 4, 8),
        Op::Write { volume: "a".into(), first: 80, count: 96, fua: true },
        write("a", 8, 16),
        Op::Create(vec![birth("s", Some("a"), true)]),
        write("a", 8, 8),
        Op::Flush,
        Op::Create(vec![birth("b", Some("s"), false), birth("c", Some("a"), false)]),
        write("b", 84, 40),
        discard("a", 0, 320),
        write("c", 1, 1),
        Op::Delete("s".into()),
        Op::Zero { volume: "b".into(), first: 3, count: 30, no_hole: false },
        Op::Checkpoint,
        write("c", 200, 8),
        Op::Grow("c".into(), 48 * 4096),
        write("c", 370, 14),
        Op::Delete("a".into()),
        write("b", 0, 16),
        Op::Reopen,
        write("b", 0, 8),
        Op::Flush,
        discard("c", 0, 100),
        write("c", 0, 8),
    ]
}

#[test]
fn the_power_fails_at_every_event() {
    let reach =
        Reach { plans: [30, 6, 4], nested_one_in: [30, 10], nested_cuts: 14, go_on_one_in: 6 };
    let mut explorer = Explorer::new(tiny(), reach, 1);
    let events = explorer.cut_everywhere(&short_workload(), 1, 0, 1);
    let counts = explorer.counts;
    println!("{} crash states of {events} events: {counts:?}", counts.total());
    assert!(counts.cuts > events / 2 && counts.states[2] > 100);
}

#[test]
fn the_power_fails_at_every_event_of_every_recovery() {
    let reach =
        Reach { plans: [4, 4, 2], nested_one_in: [1, 100], nested_cuts: 100, go_on_one_in: 30 };
    let ops = &short_workload()[..9];
    let mut explorer = Explorer::new(tiny(), reach, 2);
    let events = explorer.cut_everywhere(ops, 2, 20, 5);
    let counts = explorer.counts;
    println!("{} crash states of {events} events: {counts:?}", counts.total());
}

/// A superblock was torn, and what is written over it is torn so that it has all its sectors again:
/// that must not be when its blocks have been used for something else.
#[test]
fn a_torn_superblock_does_not_come_back_for_blocks_used_again() {
    let config = tiny();
    let log: SharedLog = Rc::new(RefCell::new(Log::new(Model::default())));
    let live = |image: &SimImage, ops: &[Op], cut: Option<u64>| {
        let sim = SimDisk::from_image(image.clone(), 5, SimOptions::default());
        if let Some(cut) = cut {
            sim.set_cut_at(cut);
        }
        let ended = sim.run(async {
            let here = Life { sim: &sim, config: &config, log: &log };
            let mut ops = ops.iter().cloned();
            here.drive(|_| ops.next()).await.map_or_else(|error| panic!("{error}"), drop);
        });
        (sim, ended.is_some())
    };
    let ops = [Op::Create(vec![birth("a", None, false)]), write("a", 0, 8), Op::Checkpoint];
    let (sim, _) = live(&config.formatted(), &ops, None);
    let (before, end) = (sim.image_after_cut(CutPlan::KeepNone), sim.io_count());
    // The newest superblock is in one place of its slot only, and there a sector of it is garbage.
    let (place, sector) = (BlockNo::new(0), 5);
    let newest = (0..2).map(|slot| {
        let mut torn = before.clone();
        let place = place.plus(slot);
        let bytes = *torn.blocks().block(place);
        let twin = BlockNo::new(config.pool_blocks - 2).plus(slot);
        torn.blocks_mut().write(twin, 0, &[0; 4096]);
        torn.blocks_mut().write(place, sector * 512, &[9; 512]);
        (torn, place, bytes)
    });
    let mut came_back = 0;
    for (torn, place, bytes) in newest {
        for cut in 0..end {
            let (sim, ended) = live(&torn, &[], Some(cut));
            if ended {
                break;
            }
            for pending in 0..sim.pending(Grain::Sector) {
                let image = sim.image_after_cut(CutPlan::OnlyOne(Grain::Sector, pending));
                came_back += u64::from(*image.blocks().block(place) == bytes);
                live(&image, &[], None);
            }
        }
    }
    assert!(came_back > 0, "it never was whole again");
}

/// Random operations, all of which the model accepts.
fn random_workload(seed: u64) -> Vec<Op> {
    let bounds = Bounds { volumes: 4, volume_blocks: 24, write_blocks: 12 };
    let mut generator = Generator::new(seed, bounds);
    let mut model = Model::default();
    let mut next = |number| {
        let op = generator.next_op(&model);
        op.steps(&model, number).iter().for_each(|step| model.apply(step));
        op
    };
    (1..30).map(&mut next).collect()
}

#[test]
fn the_power_fails_under_random_workloads() {
    let reach =
        Reach { plans: [6, 3, 2], nested_one_in: [40, 12], nested_cuts: 6, go_on_one_in: 8 };
    let mut total = 0;
    for seed in 0..24 {
        let config = Config { pool_blocks: 700, ..Config::random(seed) };
        let mut explorer = Explorer::new(config, reach, seed);
        explorer.cut_everywhere(&random_workload(seed), seed, seed % 3, 3);
        total += explorer.counts.total();
    }
    println!("{total} crash states of random workloads");
}

/// One pool that loses its power, or its process, again and again under random operations.
fn many_lives(seed: u64) -> u64 {
    let mut rng = Rng::new(seed);
    let config = Config::random(seed);
    let mut generator = Generator::new(seed, Bounds::default());
    let mut image = config.formatted();
    let log: SharedLog = Rc::new(RefCell::new(Log::new(Model::default())));
    for life in 0..12 {
        let _told = Told(|| format!("seed {seed}, life {life}: {config:?}"));
        let sim = SimDisk::from_image(image, rng.bits(), SimOptions::default());
        sim.set_cut_at(if rng.chance(5) { rng.below(60) } else { rng.below(900) });
        let ended = sim.run(async {
            let here = Life { sim: &sim, config: &config, log: &log };
            let pool = here.drive(|model| Some(generator.next_op(model)));
            pool.await.map_or_else(|error| panic!("{error}"), drop);
        });
        assert!(ended.is_none());
        image = after(&sim, &mut log.borrow_mut(), &mut rng);
    }
    let sim = SimDisk::from_image(image, seed, SimOptions::default());
    sim.run(async {
        let here = Life { sim: &sim, config: &config, log: &log };
        let pool = here.begin().await.expect("the pool opens");
        drain(&pool).await.expect("all is deleted");
    })
    .expect("no power failure was asked for");
    13
}

/// What the next life finds: the process was killed, or the power has failed.
fn after(sim: &SimDisk, log: &mut Log, rng: &mut Rng) -> SimImage {
    if rng.chance(5) {
        return sim.image_after_kill(rng.bits());
    }
    log.power_failed();
    let plans: Vec<CutPlan> = plans(sim, rng, 5);
    let plan = plans[to_usize(rng.below(to_u64(plans.len())))];
    sim.image_after_cut(plan)
}

#[test]
fn the_power_fails_again_and_again() {
    let states: u64 = (0..150).map(many_lives).sum();
    println!("{states} crash states in chains of 13");
}

/// Every acknowledged write is there after a kill, flushed or not, at whatever event it came; and
/// the power may fail during the recovery from that.
#[test]
fn the_process_is_killed_at_every_event() {
    let config = tiny();
    let base = config.formatted();
    let ops = short_workload();
    let run = |cut: u64| {
        let sim = SimDisk::from_image(base.clone(), 3, SimOptions::default());
        sim.set_cut_at(cut);
        let log: SharedLog = Rc::new(RefCell::new(Log::new(Model::default())));
        let ended = sim.run(async {
            let here = Life { sim: &sim, config: &config, log: &log };
            let mut ops = ops.iter().cloned();
            here.drive(|_| ops.next()).await.map(drop).expect("the workload runs");
        });
        (sim, log, ended.is_some())
    };
    let mut states = 0;
    for cut in 0.. {
        let _told = Told(|| format!("killed at event {cut}"));
        let (sim, log, ended) = run(cut);
        if ended {
            break;
        }
        for seed in 0..3 {
            states += 1 + killed(&config, &sim.image_after_kill(seed), &log.borrow(), seed);
        }
    }
    println!("{states} states after a kill");
    assert!(states > 1000);
}

/// Opens a pool after a kill, and again when the power has failed in the middle of that.
fn killed(config: &Config, image: &SimImage, before: &Log, seed: u64) -> u64 {
    let open = |image: &SimImage, log: &Log, cut: Option<u64>| {
        let sim = SimDisk::from_image(image.clone(), seed, SimOptions::default());
        if let Some(cut) = cut {
            sim.set_cut_at(cut);
        }
        let log: SharedLog = Rc::new(RefCell::new(log.clone()));
        let ended = sim.run(async {
            let here = Life { sim: &sim, config, log: &log };
            here.begin().await.map_or_else(|error| panic!("{error}"), drop);
        });
        assert_eq!(ended.is_none(), cut.is_some());
        sim
    };
    let events = open(image, before, None).io_count();
    let mut rng = Rng::new(seed);
    let cut = rng.below(events);
    let _told = Told(|| format!("seed {seed}, recovery cut at event {cut} of {events}"));
    let sim = open(image, before, Some(cut));
    let plans = plans(&sim, &mut rng, 6);
    let mut powerless = before.clone();
    powerless.power_failed();
    for plan in &plans {
        let _told = Told(|| format!("{plan:?}"));
        open(&sim.image_after_cut(*plan), &powerless, None);
    }
    to_u64(plans.len())
}
