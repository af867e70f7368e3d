//! `pando-hammer`: the clients and the judge of kill campaigns, in a process of their own that is
//! never killed. It starts the real daemon, loads it, kills it, starts it again and compares what
//! is there with what was acknowledged. `docs/TESTING.md` says how to run it.
//!
//! ```text
//! campaign   rounds of load, kill, restart, comparison
//! writer     our own NBD connections            log      what they were told, and the comparison
//! clients    fio, nbdcopy, qemu-io
//! control    snapshots, clones, growth, deletion, checks under load
//! tally      the result
//! mounted    the same with a file system on a loop device
//! ```

#![forbid(unsafe_code)]

mod campaign;
mod clients;
mod control;
mod log;
mod mounted;
mod tally;
mod writer;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use pando_tests::devices::possible;
use pando_tests::tools::present;

/// Kills the daemon under load, again and again, and looks for what is lost.
#[derive(Debug, Parser)]
#[command(name = "pando-hammer", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// NBD clients on volumes; ends after so many kills or seconds, or at the first failure
    Campaign(Campaign),
    /// A mounted file system on a loop device; ends after so many kills or seconds, or at the
    /// first failure
    Mounted(MountedCampaign),
}

#[derive(Debug, Args)]
struct Campaign {
    /// Kills after which it ends
    #[arg(long, default_value_t = 1000)]
    kills: u64,
    /// Seconds after which it ends
    #[arg(long, default_value_t = 3600)]
    seconds: u64,
    /// Seed of all that is random but the time that things take
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Longest life of a daemon in milliseconds; most are much shorter
    #[arg(long, default_value_t = 3000)]
    life_ms_max: u64,
    /// Another pandod, of the same format, that opens the pool in every second round
    #[arg(long, value_name = "PATH")]
    old: Option<PathBuf>,
    /// One closing line for programs
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct MountedCampaign {
    /// The file system
    #[arg(long, value_enum)]
    fs: mounted::Fs,
    /// Kills after which it ends
    #[arg(long, default_value_t = 100)]
    kills: u64,
    /// Seconds after which it ends
    #[arg(long, default_value_t = 3600)]
    seconds: u64,
    /// Seed of all that is random but the time that things take
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The closing line is for programs either way
    #[arg(long)]
    json: bool,
}

fn main() -> io::Result<ExitCode> {
    let (said, failed) = match Cli::parse().command {
        Command::Campaign(wish) => volumes(wish),
        Command::Mounted(wish) => file_system(&wish),
    };
    io::stdout().lock().write_all(said.as_bytes())?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// What a campaign has to say, and whether it has failed.
fn volumes(wish: Campaign) -> (String, bool) {
    if !present(&clients::PROGRAMS) {
        return (String::new(), true);
    }
    let options = campaign::Options {
        kills: wish.kills,
        seconds: wish.seconds,
        seed: wish.seed,
        life_ms_max: wish.life_ms_max,
        old: wish.old,
    };
    let tally = campaign::campaign(&options);
    let said = if wish.json { format!("{}\n", tally.json()) } else { tally.text() };
    (said, !tally.failures.is_empty())
}

fn file_system(wish: &MountedCampaign) -> (String, bool) {
    if !possible() || !present(&wish.fs.programs()) {
        return (String::new(), true);
    }
    let options =
        mounted::Options { fs: wish.fs, kills: wish.kills, seconds: wish.seconds, seed: wish.seed };
    let done = mounted::campaign(&options);
    (format!("{}\n", done.json(&options)), !done.failures.is_empty())
}
