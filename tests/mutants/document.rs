//! The tables of `docs/MUTANTS.md`, which are made of the list and of a run.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use super::list::{List, Mutant};

const DOCUMENT: &str = "docs/MUTANTS.md";
/// What comes behind it is made by `scripts/mutants --document`.
const MARK: &str = "<!-- from here on made by scripts/mutants --document -->\n";

fn read(root: &Path) -> String {
    std::fs::read_to_string(root.join(DOCUMENT)).expect("docs/MUTANTS.md")
}

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
    let bugs: BTreeSet<i64> = list.mutants.iter().flat_map(|m| m.bugs.iter().copied()).collect();
    for (bug, mutant) in bugs.iter().flat_map(|bug| mutants_of(*bug).map(move |m| (bug, m))) {
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

/// Writes the tables behind the mark.
pub(crate) fn write(root: &Path, list: &List, seconds: &BTreeMap<&str, Duration>) {
    let text = read(root);
    let (head, _) = text.split_once(MARK).expect("the mark in docs/MUTANTS.md");
    let text = format!("{head}{MARK}{}", tables(list, seconds));
    std::fs::write(root.join(DOCUMENT), text).expect("docs/MUTANTS.md");
}

/// The rows without their last cell, the seconds.
fn rows(text: &str) -> BTreeSet<&str> {
    let rows = text.lines().filter(|line| line.starts_with("| "));
    rows.filter_map(|row| Some(row.trim_end_matches('|').rsplit_once('|')?.0)).collect()
}

/// Whether the document has the tables of the list.
pub(crate) fn check(root: &Path, list: &List) {
    let text = read(root);
    let (_, made) = text.split_once(MARK).expect("the mark in docs/MUTANTS.md");
    let tables = tables(list, &BTreeMap::new());
    let (is, wanted) = (rows(made), rows(&tables));
    let differ: Vec<_> = is.symmetric_difference(&wanted).collect();
    assert!(differ.is_empty(), "run scripts/mutants --document: {differ:#?}");
}
