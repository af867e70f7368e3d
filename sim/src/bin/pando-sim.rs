//! Simulated crashes and faults as a program: the engine on a disk that loses, tears and reorders what
//! was not flushed, and fails in every way, for as long as there is time.
//!
//! Prints each failure with what repeats it and the smallest case found, and ends with code 1 if there
//! was one.

use std::fmt::Display;
use std::io::{self, Write as _};
use std::ops::Range;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use pando_sim::campaign::alphabet::{ALPHABET, symbol};
use pando_sim::campaign::exhaustive::{count, sequence};
use pando_sim::campaign::{Exhaustive, Failure, Faults, Random, Tally, quiet, shrink};

/// What takes longer than this hangs.
const SECONDS_MAX: u64 = 180;
/// Failures after which a campaign ends.
const FAILURES_MAX: usize = 5;

/// Runs the engine on a simulated disk and lets the power fail, the process die, the disk err.
#[derive(Debug, Parser)]
#[command(name = "pando-sim", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// All sequences of so many operations, cut at every event
    Exhaustive {
        /// Operations
        #[arg(long, default_value_t = 2)]
        length: usize,
        /// Shorter sequences too, from this length on; by default only those of --length
        #[arg(long)]
        shortest: Option<usize>,
        /// Only part I of N of all sequences, the first is 0
        #[arg(long, value_name = "I/N", value_parser = part, default_value = "0/1")]
        part: (u64, u64),
        /// In which order, if there is no time for all
        #[arg(long, default_value_t = 0)]
        order: u64,
        /// Only this sequence: names with commas between them
        #[arg(long, value_parser = symbols)]
        sequence: Option<Sequence>,
        #[command(flatten)]
        limits: Limits,
    },
    /// Random operations in chains of lives
    Random {
        #[command(flatten)]
        seeds: Seeds,
        #[command(flatten)]
        limits: Limits,
    },
    /// Devices that fail
    Faults {
        #[command(flatten)]
        seeds: Seeds,
        #[command(flatten)]
        limits: Limits,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Seeds {
    /// Seeds from A to before B
    #[arg(long, value_name = "A..B", value_parser = range)]
    seeds: Option<Range<u64>>,
    /// Only this seed
    #[arg(long)]
    seed: Option<u64>,
}

impl Seeds {
    fn all(&self) -> Range<u64> {
        match (&self.seeds, self.seed) {
            (Some(seeds), _) => seeds.clone(),
            (None, Some(seed)) => seed..seed + 1,
            (None, None) => 0..0,
        }
    }
}

#[derive(Clone, Copy, Debug, Args)]
struct Limits {
    /// Stop after so many seconds
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,
    /// Close with one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug)]
struct Sequence(Vec<usize>);

fn part(text: &str) -> Result<(u64, u64), String> {
    let (part, parts) = text.split_once('/').ok_or("not of the form I/N")?;
    let number = |text: &str| text.parse::<u64>().map_err(|error| error.to_string());
    let (part, parts) = (number(part)?, number(parts)?);
    (part < parts).then_some((part, parts)).ok_or_else(|| format!("{part} is not below {parts}"))
}

fn range(text: &str) -> Result<Range<u64>, String> {
    let (first, end) = text.split_once("..").ok_or("not of the form A..B")?;
    let number = |text: &str| text.parse::<u64>().map_err(|error| error.to_string());
    Ok(number(first)?..number(end)?)
}

fn symbols(text: &str) -> Result<Sequence, String> {
    let find = |name: &str| {
        let names: Vec<&str> = ALPHABET.iter().map(|symbol| symbol.name).collect();
        symbol(name).ok_or_else(|| format!("{name} is none of {}", names.join(" ")))
    };
    text.split(',')
        .filter(|name| !name.is_empty())
        .map(find)
        .collect::<Result<_, _>>()
        .map(Sequence)
}

/// What a run has come to.
struct Run {
    limits: Limits,
    started: Instant,
    tally: Tally,
    failures: Vec<String>,
    /// Sequences for which there was no time.
    left: u64,
    /// Grows while there is progress.
    alive: Arc<AtomicU64>,
}

impl Run {
    /// Whether there is time for more.
    fn goes_on(&self) -> bool {
        let seconds = self.limits.seconds;
        self.failures.len() < FAILURES_MAX
            && seconds.is_none_or(|most| self.started.elapsed() < Duration::from_secs(most))
    }

    fn enter(&mut self, result: Result<(), Failure>) {
        self.alive.fetch_add(1, Ordering::Relaxed);
        let Err(Failure { repeat, why, case }) = result else { return };
        say(format_args!("FAILED {repeat}\n{why}"));
        match shrink(&case) {
            Some((small, why)) => {
                let (acts, lives) = (case.acts(), case.lives.len());
                say(format_args!(
                    "of {acts} acts in {lives} lives {} in {} are left:\n{why}\n{small}",
                    small.acts(),
                    small.lives.len()
                ));
            }
            None => say(case),
        }
        self.alive.fetch_add(1, Ordering::Relaxed);
        let first = why.lines().nth(1).unwrap_or(&why);
        self.failures.push(format!("{repeat}: {first}"));
    }

    fn close(self) -> ExitCode {
        let seconds = self.started.elapsed().as_secs_f64();
        if self.limits.json {
            say(self.json(seconds));
        } else {
            say(format_args!("{:#?} in {seconds:.1} s", self.tally));
        }
        if self.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    fn json(&self, seconds: f64) -> impl Display {
        let Tally { seeds, sequences, impossible, counts, faults, rare } = &self.tally;
        let rare: serde_json::Map<_, _> =
            rare.iter().map(|(rare, count)| (rare.name().into(), (*count).into())).collect();
        serde_json::json!({
            "crash_states": counts.total(),
            "by_depth": counts.states,
            "after_kill": counts.kills,
            "distinct": counts.distinct,
            "not_opened_again": counts.repeated,
            "cuts": counts.cuts,
            "went_on": counts.went_on,
            "seeds": seeds,
            "sequences": sequences,
            "impossible_sequences": impossible,
            "sequences_left": self.left,
            "faults": faults,
            "rare": rare,
            "failures": self.failures,
            "seconds": seconds,
        })
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    quiet();
    match cli.what {
        What::Exhaustive { length, shortest, part, order, sequence, limits } => {
            let lengths = shortest.unwrap_or(length)..=length;
            let mut run = run(limits);
            let mut campaign = Exhaustive::default();
            if let Some(Sequence(only)) = sequence {
                run.enter(campaign.explore(&only));
            } else {
                lengths.for_each(|length| explore(&mut campaign, &mut run, length, part, order));
            }
            run.tally.sequences = campaign.sequences;
            run.tally.impossible = campaign.impossible;
            run.tally.add(&campaign.explorer.counts, &campaign.explorer.rares);
            run.close()
        }
        What::Random { seeds, limits } => {
            let mut run = run(limits);
            let mut campaign = Random::default();
            let mut seeds = seeds.all();
            while run.goes_on()
                && let Some(seed) = seeds.next()
            {
                run.enter(campaign.explore(seed));
            }
            run.tally.seeds = campaign.seeds;
            run.tally.add(&campaign.explorer.counts, &campaign.explorer.rares);
            run.close()
        }
        What::Faults { seeds, limits } => {
            let mut run = run(limits);
            let mut campaign = Faults::default();
            let mut seeds = seeds.all();
            while run.goes_on()
                && let Some(seed) = seeds.next()
            {
                run.enter(campaign.explore(seed));
            }
            run.tally.seeds = campaign.seeds;
            run.tally.faults = campaign.struck;
            run.tally.add(&campaign.explorer.counts, &campaign.explorer.rares);
            run.close()
        }
    }
}

fn run(limits: Limits) -> Run {
    let (tally, failures) = (Tally::default(), Vec::new());
    Run { limits, started: Instant::now(), tally, failures, left: 0, alive: watch() }
}

/// Ends the program when nothing goes on: a loop without I/O is seen by nobody else.
fn watch() -> Arc<AtomicU64> {
    let alive = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&alive);
    std::thread::spawn(move || {
        loop {
            let before = seen.load(Ordering::Relaxed);
            std::thread::sleep(Duration::from_secs(SECONDS_MAX));
            if seen.load(Ordering::Relaxed) == before {
                say(format_args!("FAILED: number {before} of what was asked for hangs"));
                std::process::exit(1);
            }
        }
    });
    alive
}

/// Explores a part of the sequences of a length.
fn explore(
    campaign: &mut Exhaustive,
    run: &mut Run,
    length: usize,
    (part, parts): (u64, u64),
    order: u64,
) {
    let mut number = part;
    while number < count(length) && run.goes_on() {
        run.enter(campaign.explore(&sequence(length, number, order)));
        number += parts;
    }
    run.left += count(length).saturating_sub(number).div_ceil(parts);
}

fn say(what: impl Display) {
    // Nobody is left to be told of a failure to write.
    writeln!(io::stdout().lock(), "{what}").unwrap_or_default();
}
