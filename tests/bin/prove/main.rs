//! `pando-prove`: runs the whole campaign for some hours on all cores and writes one report.
//! Started by `scripts/prove`, which builds the programs.
//!
//! ```text
//! parts     the table: what is run, for which share of the time, by how many processes
//! run       processes side by side, their closing lines, added up
//! machine   commit, cores, memory: what the figures belong to
//! report    target/prove/report.md and report.json
//! ```
//!
//! Every figure of the report comes from the closing line of a program. A program that is missing,
//! fails or says nothing is an error of the report and of the exit code.

#![forbid(unsafe_code)]

mod machine;
mod parts;
mod report;
mod run;

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::parts::PARTS;
use crate::run::Setting;

/// Runs all campaigns and writes a report.
#[derive(Debug, Parser)]
#[command(name = "pando-prove", max_term_width = 100)]
struct Args {
    /// How long the timed parts run together
    #[arg(long)]
    hours: f64,
    /// First seed; each process has seeds of its own from here on
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Directory of the report
    #[arg(long, default_value = "target/prove")]
    out: PathBuf,
    /// Directory of the programs
    #[arg(long)]
    programs: PathBuf,
    /// pandod of an older commit, for the kill loop
    #[arg(long)]
    old: Option<PathBuf>,
    /// The commit that it is of
    #[arg(long)]
    old_commit: Option<String>,
    /// Only the parts whose names contain this
    #[arg(long, default_value = "")]
    only: String,
}

fn main() -> io::Result<ExitCode> {
    let args = Args::parse();
    fs::create_dir_all(&args.out)?;
    let setting = Setting {
        seconds: args.hours * 3600.0,
        seed: args.seed,
        cores: std::thread::available_parallelism()?.get(),
        programs: args.programs.clone(),
        old: args.old.clone(),
        out: args.out.clone(),
    };
    let machine = machine::facts(&args.programs);
    let mut results = Vec::new();
    for part in PARTS.iter().filter(|part| part.name.contains(&args.only)) {
        let mut stderr = io::stderr().lock();
        writeln!(stderr, "prove: {}, {} s", part.name, setting.seconds_of(part))?;
        drop(stderr);
        results.push(run::run(part, &setting)?);
        // What there is so far, if the campaign is cut off.
        let whole =
            report::json(args.hours, &setting, args.old_commit.as_deref(), &machine, &results);
        fs::write(args.out.join("report.json"), format!("{whole:#}\n"))?;
        fs::write(args.out.join("report.md"), report::markdown(&whole))?;
    }
    let failed: Vec<_> = results.iter().filter(|result| !result.errors.is_empty()).collect();
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}", args.out.join("report.md").display())?;
    for result in &failed {
        writeln!(stdout, "FAILED {}: {}", result.name, result.errors.join("; "))?;
    }
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
