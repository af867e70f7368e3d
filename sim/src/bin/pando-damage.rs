//! Damage at rest as a program: every bit, block and field of a pool, each damaged alone, as many of
//! them as there is time for, or a part of them.
//!
//! Prints each failure with what repeats it, and ends with code 1 if there was one.

use std::fmt::Display;
use std::io::{self, Write as _};
use std::panic::catch_unwind;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use pando_sim::damage::subject::Past;
use pando_sim::damage::{Campaign, Choice, Sort, Tally};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What one image may take, with the campaign around it.
const PEAK_BYTES_MAX: usize = 512 << 20;
/// An image that takes longer hangs.
const SECONDS_MAX: u64 = 60;

/// Damages the metadata and data of small pools in every way and judges what comes of it.
#[derive(Debug, Parser)]
#[command(name = "pando-damage", version, max_term_width = 100)]
struct Cli {
    /// Which damage; all by default
    #[arg(long, value_enum)]
    sort: Option<SortArg>,
    /// Seed of the pools
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Pools: this many seeds from the first on
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Only part I of N of all cases, as 1/4
    #[arg(long, value_name = "I/N", value_parser = part, default_value = "1/1")]
    part: (u64, u64),
    /// Of the cases of metadata, one in so many
    #[arg(long, default_value_t = 1)]
    metadata: u64,
    /// Of the cases of data and unused blocks, one in so many; 0: none
    #[arg(long, default_value_t = 64)]
    data: u64,
    /// Of the cases of inverted bits, one in so many of those: a pool has millions
    #[arg(long, default_value_t = 1)]
    bits: u64,
    /// Stop after so many seconds
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,
    /// Close with one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SortArg {
    /// Inverted bits
    Bits,
    /// Blocks that hold what they held before, what others hold, or nothing
    Blocks,
    /// Fields changed with their checksums made right
    Fields,
}

fn part(text: &str) -> Result<(u64, u64), String> {
    let (part, parts) = text.split_once('/').ok_or("not of the form I/N")?;
    let number = |text: &str| text.parse::<u64>().map_err(|error| error.to_string());
    let (part, parts) = (number(part)?, number(parts)?);
    let good = part >= 1 && part <= parts;
    good.then_some((part, parts)).ok_or_else(|| format!("{part} is not between 1 and {parts}"))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Panics are caught and told with what repeats them.
    std::panic::set_hook(Box::new(|_| ()));
    let started = Instant::now();
    let mut tally = Tally::default();
    run(&cli, started, &mut tally);
    for failure in &tally.failures {
        say(format_args!("FAILED {failure}"));
    }
    let seconds = started.elapsed().as_secs_f64();
    if cli.json {
        say(json(&tally, seconds));
    } else {
        say(format_args!("{tally:#?} in {seconds:.1} s"));
    }
    if tally.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(cli: &Cli, started: Instant, tally: &mut Tally) {
    let sorts = match cli.sort {
        None => Sort::ALL.to_vec(),
        Some(SortArg::Bits) => vec![Sort::Bits],
        Some(SortArg::Blocks) => vec![Sort::Blocks],
        Some(SortArg::Fields) => vec![Sort::Fields],
    };
    let choice = |sort| {
        let bits = if sort == Sort::Bits { cli.bits } else { 1 };
        let [metadata, data] = [cli.metadata, cli.data].map(|stride| stride.saturating_mul(bits));
        Choice { metadata, data, part: cli.part.0 - 1, parts: cli.part.1 }
    };
    let alive = watch();
    let mut grew = None;
    let mut before = |images| {
        alive.store(images + 1, Ordering::Relaxed);
        if MEMORY.peak_usage() > PEAK_BYTES_MAX {
            grew.get_or_insert(MEMORY.peak_usage());
            return false;
        }
        cli.seconds.is_none_or(|most| started.elapsed() < Duration::from_secs(most))
    };
    let pools =
        (cli.seed..cli.seed + cli.seeds).flat_map(|seed| Past::ALL.map(|past| (past, seed)));
    for (past, seed) in pools {
        if !before(tally.images) {
            break;
        }
        let Ok(campaign) = catch_unwind(|| Campaign::new(past, seed)) else {
            tally.failures.push(format!("{} pool of seed {seed}: it cannot be made", past.name()));
            continue;
        };
        for sort in &sorts {
            campaign.run(*sort, &choice(*sort), tally, &mut before);
        }
    }
    alive.store(u64::MAX, Ordering::Relaxed);
    if let Some(bytes) = grew {
        tally.failures.push(format!("image {}: {bytes} bytes of memory", tally.images));
    }
}

/// Ends the program when an image takes too long: a loop without I/O is seen by nobody else.
fn watch() -> Arc<AtomicU64> {
    let alive = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&alive);
    std::thread::spawn(move || {
        loop {
            let before = seen.load(Ordering::Relaxed);
            std::thread::sleep(Duration::from_secs(SECONDS_MAX));
            if before != u64::MAX && before != 0 && seen.load(Ordering::Relaxed) == before {
                say(format_args!("FAILED image {before} hangs"));
                std::process::exit(1);
            }
        }
    });
    alive
}

fn json(tally: &Tally, seconds: f64) -> impl Display {
    serde_json::json!({
        "images": tally.images,
        "correct": tally.correct,
        "refused": tally.refused,
        "noticed_by_structure": tally.noticed,
        "errors_by_structure": tally.errors,
        "believed": tally.believed,
        "failures": tally.failures,
        "seconds": seconds,
    })
}

fn say(what: impl Display) {
    // Nobody is left to be told of a failure to write.
    writeln!(io::stdout().lock(), "{what}").unwrap_or_default();
}
