//! The machine whose power goes: it changes a pool on a virtual disk and says on its second serial
//! port what is durable. And what fails below a pool: dm-log-writes, dm-flakey.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use pando_tests::power::model::{Model, Stream};
use pando_tests::power::perform::Performer;
use pando_tests::power::{rounds, verify};
use pando_tests::{System, tools};

use crate::kills::told;
use crate::suite::Case;

/// Below the pool lies something that records what is written, or fails.
pub(crate) const CASES: &[Case] = &[
    ("log of writes", |_| log_of_writes()),
    ("writes fail", |_| writes_fail()),
    ("writes are dropped", |_| writes_are_dropped()),
];

/// Where what is said is heard outside, even if the machine ends in the next moment.
const OUTSIDE: &str = "/dev/ttyS1";
const POOL: &str = "/dev/vda";
const LOG: &str = "/dev/vdb";
const FLAKY_POOL: &str = "/dev/vdc";
/// Batches that are recorded.
const LOGGED: u32 = 100;
/// Batches before a device fails, and those that are tried then.
const BEFORE: u32 = 60;
const AFTER: u32 = 40;

/// Where the batches of a case come from: the host says it.
fn seed() -> u64 {
    told(2).expect("power-devices SEED")
}

fn disks() {
    tools::run("modprobe", &["virtio_blk"]);
    while !Path::new(POOL).exists() {
        thread::sleep(Duration::from_millis(5));
    }
}

/// The daemon on the pool of the machine's disk.
fn daemon(pool: &str) -> System {
    let mut system = System::empty();
    system.move_pool(PathBuf::from(pool));
    system
}

/// Changes the pool until the power goes; `power SEED NUMBER SHAPE`, or `power-open` and only waits.
pub(crate) fn until_the_power_goes(words: &[&str]) -> ! {
    disks();
    let mut outside = File::options().write(true).open(OUTSIDE).expect("a serial port");
    let mut say = |word: String| writeln!(outside, "{word}").expect("it is heard outside");
    let mut system = daemon(POOL);
    say("opening".to_owned());
    system.spawn();
    say("open".to_owned());
    if let [_, seed, number, shape @ ..] = words {
        let model = Model::of_shape(shape.first().map_or("", |shape| shape));
        let (seed, number) = (seed.parse().expect("a seed"), number.parse().expect("a number"));
        let mut stream = Stream::new(seed, model, number);
        let done =
            Performer::new(&system).run(&mut stream, |_| true, |batch| say(batch.to_string()));
        panic!("the batches end with {done:?}");
    }
    loop {
        thread::park();
    }
}

/// A device that a table of the device mapper describes.
struct Mapped {
    name: &'static str,
}

impl Mapped {
    fn new(name: &'static str, module: &str, table: &str) -> Self {
        for module in ["dm_mod", module] {
            tools::run("modprobe", &[module]);
        }
        tools::run("dmsetup", &["create", name, "--table", table]);
        Self { name }
    }

    fn path(&self) -> String {
        format!("/dev/mapper/{}", self.name)
    }

    /// Puts another table in place of its own. What is under way is not waited for, and nothing is
    /// flushed.
    fn replace(&self, table: &str) {
        tools::run("dmsetup", &["load", self.name, "--table", table]);
        tools::run("dmsetup", &["suspend", "--noflush", "--nolockfs", self.name]);
        tools::run("dmsetup", &["resume", self.name]);
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // A case that has failed may leave somebody who has it open.
        tools::output("dmsetup", &["remove", "--force", self.name]);
    }
}

/// Sectors of a disk.
fn sectors(disk: &str) -> u64 {
    let name = disk.strip_prefix("/dev/").expect("a device");
    let shown = fs::read_to_string(format!("/sys/block/{name}/size")).expect("a size");
    shown.trim().parse().expect("a number")
}

/// Everything that is written below the pool is recorded, with a mark for each batch that is known
/// to be durable. The host plays it back.
fn log_of_writes() {
    disks();
    let table = format!("0 {} log-writes {POOL} {LOG}", sectors(POOL));
    let logged = Mapped::new("logged", "dm_log_writes", &table);
    let mut system = daemon(&logged.path());
    system.spawn();
    let mut stream = Stream::new(seed(), Model::default(), 0);
    let mark = |batch: u32| {
        tools::run("dmsetup", &["message", logged.name, "0", "mark", &batch.to_string()]);
    };
    let done = Performer::new(&system).run(&mut stream, |number| number < LOGGED, mark);
    done.expect("nothing fails");
    system.stop();
}

fn linear() -> String {
    format!("0 {} linear {FLAKY_POOL} 0", sectors(FLAKY_POOL))
}

/// A device that is always in the mood that is asked for.
fn flaky(mood: &str) -> String {
    format!("0 {} flakey {FLAKY_POOL} 0 0 1000000 1 {mood}", sectors(FLAKY_POOL))
}

/// Makes the pool anew.
fn flaky_pool(seed: u64) -> (Mapped, System, Stream) {
    disks();
    let device = Mapped::new("flaky", "dm_flakey", &linear());
    let mut system = daemon(&device.path());
    system.create_pool(&["--force"]);
    system.spawn();
    (device, system, Stream::new(seed, Model::default(), 0))
}

/// From a moment on every write of the pool fails. Nothing is acknowledged from then on, not even
/// when the device is well again, until the pool is opened anew; then everything is there that was
/// durable.
fn writes_fail() {
    let (device, mut system, mut stream) = flaky_pool(seed() + 1);
    let mut durable = 0;
    let mut performer = Performer::new(&system);
    let done = performer.run(&mut stream, |number| number < BEFORE, |batch| durable = batch);
    done.expect("nothing fails yet");
    device.replace(&flaky("error_writes"));
    let goes_on = |number| number < BEFORE + AFTER;
    let failed = performer.run(&mut stream, goes_on, |batch| durable = batch);
    assert!(failed.is_err(), "a failed write was acknowledged");
    assert!(durable <= BEFORE, "batch {durable} is said to be durable, but writes fail");
    let poisoned = |when: &str| {
        let status = system.cli().json(&["pool", "status"]);
        assert!(status["poisoned"].is_string(), "{when}: {status}");
        let refused = system.cli().refused(&["volume", "create", "more", "--size", "1MiB"]);
        assert_eq!(refused["kind"], "poisoned", "{when}: {refused}");
        let mut others = stream.clone();
        let tried = Performer::new(&system).run(&mut others, |_| true, |_| ());
        assert!(tried.is_err() && others.number == stream.number + 1, "{when}: acknowledged");
    };
    poisoned("writes fail");
    device.replace(&linear());
    poisoned("the device is well again");
    system.kill();
    compare(&device.path(), seed() + 1, durable);
}

/// From a moment on writes and flushes are said to be done and are not: as if the power had gone at
/// this moment. What was durable before is there.
fn writes_are_dropped() {
    let (device, mut system, mut stream) = flaky_pool(seed() + 2);
    let mut durable = 0;
    let mut performer = Performer::new(&system);
    let done = performer.run(&mut stream, |number| number < BEFORE, |batch| durable = batch);
    done.expect("nothing fails yet");
    device.replace(&flaky("drop_writes"));
    // It reads what it has not written, so it may fail as well. What it says means nothing.
    let goes_on = |number| number < BEFORE + AFTER;
    drop(performer.run(&mut stream, goes_on, |_| ()));
    system.kill();
    device.replace(&linear());
    compare(&device.path(), seed() + 2, durable);
}

/// Opens the pool, without the memory of the daemon that has died, and compares.
fn compare(pool: &str, seed: u64, durable: u32) {
    assert!(durable > BEFORE / 2, "there were flushes: {durable}");
    let system = verify::open(Path::new(pool)).expect("a sound pool");
    let mut stream = Stream::new(seed, Model::default(), 0);
    verify::find(&system, &mut stream, durable).expect("a state that was");
    rounds::end(system).expect("a sound pool");
}
