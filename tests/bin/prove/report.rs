//! The report: everything as JSON, and of it a page for people.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use crate::run::{Outcome, Setting};

/// Files whose coverage is told by name: recovery, and what is done about errors.
const COVERED: [&str; 5] = [
    "pool/recovery/recover.rs",
    "journal/replay.rs",
    "pool/checkpoint/load.rs",
    "pool/inspect/durable.rs",
    "pool/inspect/check/",
];

/// Everything.
pub(crate) fn json(
    hours: f64,
    setting: &Setting,
    old_commit: Option<&str>,
    machine: &Value,
    outcomes: &[Outcome],
) -> Value {
    let parts: Vec<Value> = outcomes
        .iter()
        .map(|outcome| {
            let result = match outcome.name {
                "coverage" => coverage(&outcome.result),
                _ => outcome.result.clone(),
            };
            json!({
                "name": outcome.name,
                "commands": outcome.commands,
                "seconds": (outcome.seconds * 10.0).round() / 10.0,
                "result": result,
                "errors": outcome.errors,
            })
        })
        .collect();
    json!({
        "hours": hours,
        "seed": setting.seed,
        "old_commit": old_commit,
        "machine": machine,
        "parts": parts,
    })
}

/// Lines of the files that matter, of what `cargo llvm-cov --json` says.
fn coverage(said: &Value) -> Value {
    let files = said.pointer("/data/0/files").and_then(Value::as_array);
    let mut lines = Map::new();
    for file in files.into_iter().flatten() {
        let path = file["filename"].as_str().unwrap_or_default();
        let Some((_, name)) = path.split_once("engine/src/") else { continue };
        let matters = COVERED.iter().any(|part| name.starts_with(part));
        if matters && !name.contains("tests") {
            let sum = &file["summary"]["lines"];
            lines
                .insert(name.to_owned(), json!({"lines": sum["count"], "covered": sum["covered"]}));
        }
    }
    Value::Object(lines)
}

/// A figure of the parts whose names begin with `part`, added up; a list counts by its sum.
fn figure(whole: &Value, part: &str, pointer: &str) -> Option<u64> {
    let parts = whole["parts"].as_array()?;
    let named = parts.iter().filter(|one| one["name"].as_str().unwrap_or("").starts_with(part));
    let values = named.filter_map(|one| one["result"].pointer(pointer));
    let numbers = values.map(|value| match value {
        Value::Array(all) => all.iter().filter_map(Value::as_u64).sum::<u64>(),
        other => other.as_u64().unwrap_or(0),
    });
    numbers.reduce(|sum: u64, more| sum + more)
}

/// The page for people.
pub(crate) fn markdown(whole: &Value) -> String {
    let mut page = String::from("# What the campaign has shown\n\n");
    let machine = &whole["machine"];
    let text = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let dirty = if machine["dirty"] == true { ", with changes that are not committed" } else { "" };
    line(
        &mut page,
        &format!(
            "Commit `{}`{dirty}; begun {}.",
            text(&machine["commit"]),
            text(&machine["begun"])
        ),
    );
    line(
        &mut page,
        &format!(
            "{} hours of timed parts on {} cores ({}), {} of memory, Linux {}, {}. First \
             seed {}.\n",
            whole["hours"],
            machine["cores"],
            text(&machine["processor"]),
            text(&machine["memory"]),
            text(&machine["kernel"]),
            text(&machine["rustc"]),
            whole["seed"],
        ),
    );
    headlines(&mut page, whole);
    faults(&mut page, whole);
    rare(&mut page, whole);
    fuzz(&mut page, whole);
    covered(&mut page, whole);
    parts(&mut page, whole);
    page
}

fn line(page: &mut String, text: &str) {
    page.push_str(text);
    page.push('\n');
}

fn headlines(page: &mut String, whole: &Value) {
    let rows = [
        ("crash states checked", "simulation", "/crash_states"),
        ("of them distinct within their process", "simulation", "/distinct"),
        ("of them after a cut in a recovery", "simulation", "/by_depth/1"),
        ("of them after a cut in the recovery from that", "simulation", "/by_depth/2"),
        ("of them after a kill", "simulation", "/after_kill"),
        ("recovered pools used further and emptied", "simulation", "/went_on"),
        ("simulated seeds", "simulation", "/seeds"),
        ("simulated sequences of operations", "simulation", "/sequences"),
        ("of these lengths, not reached for lack of time", "simulation", "/sequences_left"),
        ("schedules of racing shards", "schedules", "/schedules"),
        ("schedules of small races, all there are", "schedules", "/exhaustive"),
        ("damaged images opened", "damage", "/images"),
        ("SIGKILLs of the daemon", "kills", "/kills"),
        ("requests acknowledged to our own clients before a kill", "kills", "/acknowledged"),
        ("requests under way when it came", "kills", "/under_way"),
        ("blocks acknowledged to fio, nbdcopy, qemu-io", "kills", "/foreign_acknowledged_blocks"),
        ("snapshots and clones compared with one cut", "kills", "/frozen"),
        ("files synced before a kill and found whole", "kills", "/synced_files"),
        ("rounds opened by an older build", "kills", "/old_rounds"),
        ("guest power-offs", "power-offs", "/power_offs"),
        ("unflushed sectors that the disk lost in them", "power-offs", "/lost_sectors"),
        ("logs of writes below the pool played back", "power-offs", "/logs"),
        ("positions in them opened and compared", "power-offs", "/log_positions"),
        ("power-offs and positions with a loss", "power-offs", "/lost"),
        ("mutants", "mutants", "/mutants"),
        ("mutants killed", "mutants", "/killed"),
    ];
    line(page, "| what | figure |\n|---|---|");
    for (what, part, pointer) in rows {
        let found = figure(whole, part, pointer);
        let shown = found.map_or_else(|| "missing".to_owned(), grouped);
        line(page, &format!("| {what} | {shown} |"));
    }
    let errors: Vec<String> = whole["parts"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|part| part["errors"].as_array().into_iter().flatten().map(move |e| (part, e)))
        .map(|(part, error)| format!("* {}: {}", part["name"], error))
        .collect();
    line(page, &format!("\n{} errors.\n", errors.len()));
    for error in errors {
        line(page, &error);
    }
    if let Some(old) = whole["old_commit"].as_str() {
        line(page, &format!("\nThe older build is of commit `{old}`."));
    }
    line(
        page,
        "\nNo failure in N random cases bounds the rate of failures by 3/N (95 %), for cases as \
         these generators make them, and for nothing else.",
    );
}

/// A number with its thousands apart.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let first = digits.len() % 3;
    let groups = digits.as_bytes()[first..].chunks(3).map(|group| String::from_utf8_lossy(group));
    let begin = (first > 0).then(|| digits[..first].into());
    begin.into_iter().chain(groups).collect::<Vec<_>>().join(",")
}

fn part<'a>(whole: &'a Value, name: &str) -> Option<&'a Value> {
    whole["parts"].as_array()?.iter().find(|part| part["name"] == name).map(|part| &part["result"])
}

/// The counts of a table in the results of all simulations, added up by name.
fn sums(whole: &Value, table: &str) -> Map<String, Value> {
    let parts = whole["parts"].as_array().into_iter().flatten();
    let tables = parts.filter_map(|part| part["result"][table].as_object());
    let mut sums = Map::new();
    for (name, count) in tables.flatten() {
        let sum = sums.get(name).and_then(Value::as_u64).unwrap_or(0);
        sums.insert(name.clone(), json!(sum + count.as_u64().unwrap_or(0)));
    }
    sums
}

fn faults(page: &mut String, whole: &Value) {
    line(page, "\n## Faults\n\n| fault | times |\n|---|---|");
    for (kind, count) in &sums(whole, "faults") {
        line(page, &format!("| {kind} | {} |", grouped(count.as_u64().unwrap_or(0))));
    }
    let strikes = part(whole, "kills").and_then(|result| result["strikes"].as_object());
    for (kind, count) in strikes.into_iter().flatten() {
        line(page, &format!("| SIGKILL, {kind} | {count} |"));
    }
}

fn rare(page: &mut String, whole: &Value) {
    line(page, "\n## Rare states that the simulation has reached\n\n| state | times |\n|---|---|");
    for (state, count) in &sums(whole, "rare") {
        line(page, &format!("| {state} | {} |", grouped(count.as_u64().unwrap_or(0))));
    }
}

fn fuzz(page: &mut String, whole: &Value) {
    line(page, "\n## Fuzz targets\n\n| target | what it says |\n|---|---|");
    for (target, said) in part(whole, "fuzz").and_then(Value::as_object).into_iter().flatten() {
        line(page, &format!("| {target} | {} |", facts(said)));
    }
}

/// The figures of an object, one behind the other.
fn facts(said: &Value) -> String {
    let all = said.as_object().into_iter().flatten().filter(|(key, _)| *key != "target");
    all.map(|(key, value)| format!("{key} {value}")).collect::<Vec<_>>().join(", ")
}

fn covered(page: &mut String, whole: &Value) {
    line(page, "\n## Coverage of recovery and checking by the simulation's tests\n");
    line(page, "| file of engine/src | lines | covered | |\n|---|---|---|---|");
    let files = part(whole, "coverage").and_then(Value::as_object);
    for (name, file) in files.into_iter().flatten() {
        let lines = file["lines"].as_u64().unwrap_or(0);
        let covered = file["covered"].as_u64().unwrap_or(0);
        let percent = covered * 1000 / lines.max(1);
        let percent = format!("{}.{} %", percent / 10, percent % 10);
        line(page, &format!("| {name} | {lines} | {covered} | {percent} |"));
    }
}

fn parts(page: &mut String, whole: &Value) {
    line(page, "\n## Parts\n");
    for one in whole["parts"].as_array().into_iter().flatten() {
        line(
            page,
            &format!("### {}\n\n{} s\n", one["name"].as_str().unwrap_or(""), one["seconds"]),
        );
        for command in one["commands"].as_array().into_iter().flatten() {
            line(page, &format!("    {}", command.as_str().unwrap_or("")));
        }
        if !["coverage", "fuzz"].map(Value::from).contains(&one["name"]) {
            let mut told = String::new();
            for (key, value) in one["result"].as_object().into_iter().flatten() {
                writeln!(told, "| {key} | {value} |").expect("text grows");
            }
            line(page, &format!("\n| | |\n|---|---|\n{told}"));
        }
    }
}
