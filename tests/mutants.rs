//! Tests of the tests: an engine with a deliberate bug does not pass them. The list of bugs is
//! `tests/mutants/*.toml`; `docs/MUTANTS.md` explains it; `scripts/mutants` runs a part of it.

#[path = "mutants/anchors.rs"]
mod anchors;
#[path = "mutants/code.rs"]
mod code;
#[path = "mutants/copy.rs"]
mod copy;
#[path = "mutants/document.rs"]
mod document;
#[path = "mutants/list.rs"]
mod list;
#[path = "mutants/runs.rs"]
mod runs;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use list::{Killer, List, Mutant};
use runs::{End, Programs};

/// Runs at the same time.
const WORKERS: usize = 2;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

fn listed() -> List {
    List::read(&root().join("tests/mutants"))
}

/// Does `work` with every item, [`WORKERS`] at a time; the answers in the order of the items.
fn side_by_side<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return done };
            done.push((index, work(item)));
        }
    };
    let mut all: Vec<(usize, R)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker")).collect()
    });
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, answer)| answer).collect()
}

/// The mutants that `PANDO_MUTANTS` names, separated by spaces; all if it names none.
fn chosen(list: &List) -> Vec<&Mutant> {
    let wanted = std::env::var("PANDO_MUTANTS").unwrap_or_default();
    let wanted: BTreeSet<&str> = wanted.split_whitespace().collect();
    let is_wanted = |m: &&Mutant| wanted.is_empty() || wanted.contains(m.name.as_str());
    let mutants: Vec<_> = list.mutants.iter().filter(is_wanted).collect();
    assert!(wanted.is_empty() || wanted.len() == mutants.len(), "no such mutant: {wanted:?}");
    mutants
}

#[test]
fn every_mutant_is_killed() {
    let begin = Instant::now();
    let list = listed();
    let mut mutants = chosen(&list);
    let killers: BTreeSet<&Killer> = mutants.iter().map(|m| &m.killer).collect();
    let killers: Vec<&Killer> = killers.into_iter().collect();
    let tests: BTreeSet<&str> = killers.iter().map(|k| k.binary.as_str()).collect();
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutants");
    let tree = copy::make(&root(), &scratch, &list);
    let tests: Vec<&str> = tests.into_iter().collect();
    let programs = Programs::of(copy::build(&tree, &scratch, &tests));
    println!("built after {} s", begin.elapsed().as_secs());
    let times = side_by_side(&killers, |killer| programs.prove(killer));
    for (killer, took) in killers.iter().zip(&times) {
        println!("{:5.1} s {} {} without a mutant", took.as_secs_f64(), killer.binary, killer.test);
    }
    let usual: BTreeMap<&Killer, Duration> = killers.iter().copied().zip(times).collect();
    // The longest first, so that both workers end at the same time.
    mutants.sort_by_key(|mutant| std::cmp::Reverse(usual[&mutant.killer]));
    let outcomes = side_by_side(&mutants, |mutant| {
        let outcome = programs.attack(mutant, usual[&mutant.killer]);
        let (end, seconds) = (outcome.end, outcome.took.as_secs_f64());
        println!("{seconds:5.1} s {end:?} {}: {}", mutant.name, outcome.why);
        outcome
    });
    let pairs = || mutants.iter().map(|m| m.name.as_str()).zip(&outcomes);
    let survived: Vec<&str> =
        pairs().filter(|(_, o)| o.end == End::Survived).map(|(name, _)| name).collect();
    let (all, killed) = (mutants.len(), mutants.len() - survived.len());
    let seconds = begin.elapsed().as_secs();
    println!("{killed} of {all} mutants killed in {seconds} s, build included");
    if std::env::var_os("PANDO_MUTANTS_JSON").is_some() {
        let sums = serde_json::json!({
            "mutants": all, "killed": killed, "survived": survived, "seconds": seconds,
        });
        println!("{sums}");
    }
    if std::env::var_os("PANDO_MUTANTS_DOCUMENT").is_some() {
        let place = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("mutants.md");
        document::write(&place, &list, &pairs().map(|(name, o)| (name, o.took)).collect());
        println!("{} says what killed each", place.display());
    }
    assert!(survived.is_empty(), "no test has noticed: {survived:#?}");
}

#[test]
fn every_mutant_fits_the_code() {
    let (sources, list) = (copy::sources(&root()), listed());
    let edited = anchors::edited(&sources, &list);
    assert!(edited.is_ok(), "tests/mutants/*.toml is to follow the code:\n{}", edited.unwrap_err());
    let unknown: BTreeSet<_> = anchors::unknown(&sources, &list).into_iter().collect();
    assert!(unknown.is_empty(), "no test, or more than one, is named so: {unknown:#?}");
}

#[test]
fn every_known_bug_that_can_be_made_has_a_mutant() {
    document::check(&root(), &listed());
}
