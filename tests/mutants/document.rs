//! The list of mutants for people, with what has killed each: `target/mutants.md`. What they read
//! besides is in `docs/MUTANTS.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use super::list::{List, Mutant};

/// The last two cells of a row: the killer, and its seconds if the mutant was run.
fn killed_by(mutant: &Mutant, seconds: &BTreeMap<&str, Duration>) -> String {
    let took = seconds.get(mutant.name.as_str());
    let took = took.map(|took| format!("{:.1}", took.as_secs_f64())).unwrap_or_default();
    format!("`{}` {} | {took} |", mutant.killer.binary, mutant.killer.test)
}

/// The tables: of the known bugs, and of each class.
fn tables(list: &List, seconds: &BTreeMap<&str, Duration>) -> String {
    let mut out = String::from("| bug | mutant | killed by | s |\n|---|---|---|---|\n");
    let mutants_of = |bug| list.mutants.iter().filter(move |m| m.bugs.contains(&bug));
    for (bug, mutant) in bugs(list).iter().flat_map(|bug| mutants_of(*bug).map(move |m| (bug, m))) {
        writeln!(out, "| {bug} | {} | {}", mutant.name, killed_by(mutant, seconds))
            .expect("a string");
    }
    let classes: BTreeSet<&str> = list.mutants.iter().map(|m| m.class.as_str()).collect();
    for class in classes {
        let of_class = || list.mutants.iter().filter(|m| m.class == class);
        write!(out, "\n## {class}: {}\n\n", of_class().count()).expect("a string");
        out.push_str("| mutant | what it breaks | bug | killed by | s |\n|---|---|---|---|---|\n");
        for mutant in of_class() {
            let bugs: Vec<_> = mutant.bugs.iter().map(i64::to_string).collect();
            let (name, breaks, bugs) = (&mutant.name, &mutant.breaks, bugs.join(", "));
            writeln!(out, "| {name} | {breaks} | {bugs} | {}", killed_by(mutant, seconds))
                .expect("a string");
        }
    }
    out
}

/// Writes the tables to `place`.
pub(crate) fn write(place: &Path, list: &List, seconds: &BTreeMap<&str, Duration>) {
    let text = format!("# Mutants and what has killed them\n\n{}", tables(list, seconds));
    std::fs::write(place, text).unwrap_or_else(|error| panic!("{}: {error}", place.display()));
}

/// The known bugs that mutants of the list make.
fn bugs(list: &List) -> BTreeSet<i64> {
    list.mutants.iter().flat_map(|m| m.bugs.iter().copied()).collect()
}

/// Whether the known bugs that mutants make are those that `docs/MUTANTS.md` says can be made here.
pub(crate) fn check(root: &Path, list: &List) {
    let text = std::fs::read_to_string(root.join("docs/MUTANTS.md")).expect("docs/MUTANTS.md");
    let number = |row: &str| row.strip_prefix("| ")?.split_once(" | ")?.0.parse().ok();
    let rows = text.lines().filter(|row| row.contains("| applies"));
    let applies: BTreeSet<i64> = rows.filter_map(number).collect();
    assert_eq!(bugs(list), applies, "the bugs of tests/mutants/*.toml and of docs/MUTANTS.md");
}
