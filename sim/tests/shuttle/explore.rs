//! How schedules are chosen, counted and repeated.
//!
//! Half of the schedules of a test are random: at every point any thread may go on. The other half
//! have at most two preemptions at points chosen beforehand (PCT of depth 3): few bugs need more,
//! and rare orders are met more often. Settings come from the environment; `scripts/shuttle` sets
//! them.

use std::env;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pando_engine::units::to_usize;
use pando_sim::Told;
use shuttle::scheduler::{
    DfsScheduler, PctScheduler, RandomScheduler, ReplayScheduler, RoundRobinScheduler,
    UncontrolledNondeterminismCheckScheduler,
};
use shuttle::{Config, MaxSteps, Runner};

/// Schedules of each test where nothing else is said.
const SCHEDULES: usize = 60;
/// Schedules that are run twice, to see that nothing else than the scheduler decides.
const REPEATED: usize = 2;
/// Preemptions and one, as PCT counts.
const DEPTH: usize = 3;
/// Bytes of a thread's stack.
const STACK_BYTES: usize = 1 << 20;
/// Scheduling points of one schedule: more is a thread that never sleeps.
const STEPS_MAX: usize = 400_000;

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
}

/// Says how far a test has come, for `scripts/shuttle` to add up.
#[expect(clippy::print_stdout, reason = "a test has no other way to say something")]
fn say(line: &str) {
    println!("{line}");
}

/// How long each test may take, in a campaign.
fn seconds() -> Option<f64> {
    let text = env::var("PANDO_SHUTTLE_SECONDS").ok()?;
    Some(text.parse().unwrap_or_else(|e| panic!("PANDO_SHUTTLE_SECONDS={text}: {e}")))
}

/// Whether there is time for all schedules of a race that has millions.
pub(crate) fn is_long() -> bool {
    seconds().is_some_and(|seconds| seconds >= 120.0)
}

fn config(seconds: Option<f64>) -> Config {
    let mut config = Config::new();
    config.stack_size = STACK_BYTES;
    config.max_steps = MaxSteps::FailAfter(STEPS_MAX);
    config.max_time = seconds.map(Duration::from_secs_f64);
    config.silence_warnings = true;
    config
}

/// Runs `work` once, where locks can be used.
pub(crate) fn once(work: impl FnOnce() + Send + 'static) {
    let work = parking_lot::Mutex::new(Some(work));
    let scheduler = RoundRobinScheduler::new(1);
    Runner::new(scheduler, config(None)).run(move || work.lock().take().expect("once")());
}

/// Explores schedules of `race`, which is the body of the test `name`.
pub(crate) fn explore<F>(name: &'static str, race: F)
where
    F: Fn() + Send + Sync + Clone + 'static,
{
    explore_some(name, 1, race);
}

/// As [`explore`], of a race that takes some times as long as others: as many times fewer schedules.
pub(crate) fn explore_slow<F>(name: &'static str, race: F)
where
    F: Fn() + Send + Sync + Clone + 'static,
{
    explore_some(name, 4, race);
}

fn explore_some<F>(name: &'static str, fewer: usize, race: F)
where
    F: Fn() + Send + Sync + Clone + 'static,
{
    let begun = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&begun);
    let race = move || {
        counted.fetch_add(1, Ordering::Relaxed);
        race();
    };
    let _told = Told(move || {
        let number = begun.load(Ordering::Relaxed);
        format!(
            "schedule {number} of {name}. To repeat it: save what stands between the quotation \
             marks, and run scripts/shuttle --replay {name} FILE"
        )
    });
    if let Ok(place) = env::var("PANDO_SHUTTLE_REPLAY") {
        let scheduler = ReplayScheduler::new_from_file(&place);
        let scheduler = scheduler.unwrap_or_else(|e| panic!("{place}: {e}"));
        Runner::new(scheduler, config(None)).run(race);
        say(&format!("{name}: that schedule passes"));
        return;
    }
    let begin = Instant::now();
    // Each test has schedules of its own.
    let seed = name.bytes().fold(number("PANDO_SHUTTLE_SEED").unwrap_or(1), |seed, byte| {
        (seed ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    });
    let half = seconds().map(|seconds| seconds / 2.0);
    let schedules = number("PANDO_SHUTTLE_SCHEDULES").map_or(SCHEDULES, to_usize);
    let each = if half.is_some() { usize::MAX } else { schedules.div_ceil(2 * fewer) };
    let repeated = UncontrolledNondeterminismCheckScheduler::new(random(seed, REPEATED));
    Runner::new(repeated, config(None)).run(race.clone());
    let pct = PctScheduler::new_from_seed(seed, DEPTH, each);
    let done = Runner::new(random(seed, each), config(half)).run(race.clone())
        + Runner::new(pct, config(half)).run(race);
    say(&format!("{name}: {done} schedules in {:.1} s", begin.elapsed().as_secs_f64()));
}

fn random(seed: u64, schedules: usize) -> RandomScheduler {
    RandomScheduler::new_from_seed(seed, schedules)
}

/// Explores every schedule of `race`, which is small. Returns their number.
pub(crate) fn exhaust<F>(name: &'static str, race: F)
where
    F: Fn() + Send + Sync + 'static,
{
    let begin = Instant::now();
    let done = Runner::new(DfsScheduler::new(None, false), config(None)).run(race);
    let seconds = begin.elapsed().as_secs_f64();
    say(&format!("{name}: {done} schedules, all there are, in {seconds:.1} s"));
}
