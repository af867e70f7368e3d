//! A slice of the campaigns of `pando-sim`: all sequences of at most one operation and samples of
//! longer ones, random lives, and every kind of fault. It must reach every rare state, or it has
//! proved nothing about them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use pando_engine::units::to_u64;
use pando_sim::campaign::exhaustive::{count, sequence};
use pando_sim::campaign::faults::names;
use pando_sim::campaign::{Exhaustive, Failure, Faults, Random, Tally, quiet, shrink};
use pando_sim::{CrashCounts, Rare, Rares};

/// Threads: a machine of two cores is enough.
const WORKERS: usize = 2;
/// Sequences of two and of three operations.
const SEQUENCES: [u64; 2] = [90, 120];
const RANDOM_SEEDS: u64 = 450;
/// Random seeds that have failed once: after a kill, of all that was pending nothing had landed.
const FAILED_ONCE: [u64; 1] = [20_262_258];
/// The same with faults: on a poisoned pool, a write to part of a block met bits that had rotted.
const FAULTS_FAILED_ONCE: [u64; 1] = [4_294_999_007];
/// Seeds of every kind of fault.
const FAULT_SEEDS: u64 = 12;

/// A part of the work that fails or not by itself.
enum Unit {
    Sequence(Vec<usize>),
    Random(u64),
    Faults(u64),
}

/// The longest ones first, so that the workers end together.
fn units() -> Vec<Unit> {
    let samples = |length: usize, most: u64| {
        (0..count(length).min(most)).map(move |number| Unit::Sequence(sequence(length, number, 3)))
    };
    let sequences = samples(0, 1).chain(samples(1, u64::MAX));
    let longer = samples(2, SEQUENCES[0]).chain(samples(3, SEQUENCES[1]));
    let faults = (0..FAULT_SEEDS * to_u64(names().count())).chain(FAULTS_FAILED_ONCE);
    sequences
        .chain(longer)
        .chain((0..RANDOM_SEEDS).chain(FAILED_ONCE).map(Unit::Random))
        .chain(faults.map(Unit::Faults))
        .collect()
}

/// One thread's campaigns.
#[derive(Default)]
struct Worker {
    exhaustive: Exhaustive,
    random: Random,
    faults: Faults,
}

impl Worker {
    /// Explores a unit; what is wrong, with a small case of it.
    fn explore(&mut self, unit: &Unit) -> Option<String> {
        let explored = match unit {
            Unit::Sequence(symbols) => self.exhaustive.explore(symbols),
            Unit::Random(seed) => self.random.explore(*seed),
            Unit::Faults(seed) => self.faults.explore(*seed),
        };
        let Err(Failure { repeat, why, case }) = explored else { return None };
        let (case, why) = shrink(&case).unwrap_or((*case, why));
        Some(format!("{repeat}\n{why}\n{case}"))
    }

    fn tally(self) -> Tally {
        let mut tally = Tally {
            seeds: self.random.seeds + self.faults.seeds,
            sequences: self.exhaustive.sequences,
            impossible: self.exhaustive.impossible,
            faults: self.faults.struck,
            ..Tally::default()
        };
        let explorers = [self.exhaustive.explorer, self.random.explorer, self.faults.explorer];
        for explorer in explorers {
            tally.add(&explorer.counts, &explorer.rares);
        }
        tally
    }
}

/// What the tallies of both workers come to.
fn sum(tallies: Vec<Tally>) -> (CrashCounts, BTreeMap<Rare, u64>, BTreeMap<&'static str, u64>) {
    let mut sum = Tally::default();
    for tally in tallies {
        sum.add(&tally.counts, &Rares::default());
        for (rare, count) in tally.rare {
            *sum.rare.entry(rare).or_default() += count;
        }
        for (kind, count) in tally.faults {
            *sum.faults.entry(kind).or_default() += count;
        }
    }
    (sum.counts, sum.rare, sum.faults)
}

#[test]
fn a_slice_of_every_campaign_finds_nothing_and_reaches_everything() {
    let units = units();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut worker = Worker::default();
        while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Some(found) = worker.explore(unit) {
                return Err(found);
            }
        }
        Ok(worker.tally())
    };
    quiet();
    let done: Vec<Result<Tally, String>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().expect("panics are caught")).collect()
    });
    drop(std::panic::take_hook());
    let tallies = done.into_iter().map(|done| done.unwrap_or_else(|found| panic!("{found}")));
    let (counts, rare, faults) = sum(tallies.collect());
    println!("{} crash states, {counts:?}", counts.total());
    println!("rare states: {rare:?}\nfaults: {faults:?}");
    assert!(counts.total() >= 200_000, "{} crash states", counts.total());
    for state in Rare::ALL {
        assert!(rare.get(&state).is_some_and(|count| *count > 0), "never: {}", state.name());
    }
    for kind in names() {
        assert!(faults.get(kind).is_some_and(|count| *count > 0), "never struck: {kind}");
    }
}
