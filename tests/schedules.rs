//! Races between shards, under a scheduler that chooses who goes on: builds the engine for that and
//! runs a slice of `sim/tests/shuttle.rs`. `scripts/shuttle` runs more.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// Schedules of each race, of slow ones a quarter.
const SCHEDULES: u64 = 5000;

#[test]
fn shards_race_under_a_scheduler() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut slice = Command::new(root.join("scripts/shuttle"));
    slice.args([&SCHEDULES.to_string(), "--json"]).stderr(Stdio::inherit());
    let output = slice.output().expect("a script");
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(output.status.success(), "a race was lost: see above for its schedule");
    let sums = said.lines().last().and_then(|line| serde_json::from_str::<Value>(line).ok());
    let schedules = sums.and_then(|sums| sums["schedules"].as_u64());
    assert!(schedules.is_some_and(|all| all > 10 * SCHEDULES), "few schedules: {schedules:?}");
}
