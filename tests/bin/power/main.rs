//! `pando-power`: cuts the power of virtual machines, again and again, and compares what is left.
//! Started by `scripts/vm-campaign`, which builds the programs; a slice of it is `tests/vm_power.rs`.
//!
//! It ends with the first failure, keeps the pool, and says where. With `--json` the last line on
//! stdout has the sums.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use pando_tests::power::replay;
use pando_tests::power::rounds::Rounds;
use pando_tests::vm::Root;
use serde_json::json;

/// Cuts the power of virtual machines.
#[derive(Debug, Parser)]
#[command(name = "pando-power", max_term_width = 100)]
struct Args {
    /// How often
    power_offs: u64,
    /// Where all choices come from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Close with a line of JSON
    #[arg(long)]
    json: bool,
}

/// Power-offs for each log of writes, at least one, that is played back and looked at at all its
/// barriers.
const FOR_EACH_LOG: u64 = 25;

/// Logs of writes that were played back.
#[derive(Clone, Copy, Debug, Default)]
struct Logs {
    logs: u64,
    /// What they held.
    entries: u64,
    /// Positions in them at which the pool was opened and compared.
    positions: u64,
}

impl Logs {
    fn another(&mut self, seed: u64) -> Result<(), String> {
        let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
        let root = Root::new(directory.path());
        let replayed = replay::devices(&root, directory.path(), seed + self.logs, 1)?;
        self.logs += 1;
        self.entries += replayed.entries;
        self.positions += replayed.compared + replayed.torn;
        Ok(())
    }
}

fn main() -> io::Result<ExitCode> {
    let args = Args::parse();
    let mut rounds = Rounds::new(args.seed);
    let mut failures = Vec::new();
    let mut stderr = io::stderr();
    while rounds.tally.power_offs < args.power_offs && failures.is_empty() {
        if let Err(what) = rounds.round() {
            failures.push(what);
        }
        writeln!(stderr, "{:?}", rounds.tally)?;
    }
    let tally = rounds.tally;
    if let [what, ..] = &mut failures[..] {
        what.push_str(&format!("; kept in {}", rounds.keep().display()));
    }
    let mut logs = Logs::default();
    while failures.is_empty() && logs.logs < args.power_offs.div_ceil(FOR_EACH_LOG) {
        if let Err(what) = logs.another(args.seed) {
            failures.push(what);
        }
        writeln!(stderr, "{logs:?}")?;
    }
    let mut stdout = io::stdout();
    if args.json {
        let line = json!({
            "power_offs": tally.power_offs,
            "lost": failures.len(),
            "while_opening": tally.while_opening,
            "durable_batches": tally.durable_batches,
            "cached_sectors": tally.cached_sectors,
            "lost_sectors": tally.lost_sectors,
            "flushes": tally.flushes,
            "logs": logs.logs,
            "log_entries": logs.entries,
            "log_positions": logs.positions,
            "seed": args.seed,
            "failures": failures,
        });
        writeln!(stdout, "{line}")?;
    } else {
        writeln!(stdout, "{tally:?}\n{logs:?}\n{failures:#?}")?;
    }
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
