//! The tables of `docs/MUTANTS.md`, which are made of the list and of a run.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use super::list::List;

const DOCUMENT: &str = "docs/MUTANTS.md";
/// What comes behind it is made by `scripts/mutants --document`.
const MARK: &str = "<!-- from here on made by scripts/mutants --document -->\n";

fn read(root: &Path) -> String {
    std::fs::read_to_string(root.join(DOCUMENT)).expect("docs/MUTANTS.md")
}

/// The tables; a mutant that was not run has no seconds.
fn tables(list: &List, seconds: &BTreeMap<&str, Duration>) -> String {
    let mut out = String::new();
    let classes: BTreeSet<&str> = list.mutants.iter().map(|m| m.class.as_str()).collect();
    for class in classes {
        let of_class = || list.mutants.iter().filter(|m| m.class == class);
        write!(out, "\n## {class}: {}\n\n", of_class().count()).expect("a string");
        out.push_str("| mutant | what it breaks | bug | killed by | s |\n|---|---|---|---|---|\n");
        for mutant in of_class() {
            let bug = mutant.bug.map(|bug| bug.to_string()).unwrap_or_default();
            let (name, breaks, killer) = (&mutant.name, &mutant.breaks, &mutant.killer);
            let took = seconds.get(name.as_str()).map(|took| format!("{:.1}", took.as_secs_f64()));
            let took = took.unwrap_or_default();
            let killed_by = format!("`{}` {}", killer.binary, killer.test);
            writeln!(out, "| {name} | {breaks} | {bug} | {killed_by} | {took} |")
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
