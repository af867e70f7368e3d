//! The command line of Pando.
//!
//! ```text
//! args      what can be typed            table, view   what is printed: tables, JSON, progress
//! pool      pool commands                client        the connection to pandod
//! volume    volume commands              offline       create, check, dump without pandod
//! import    a volume from a file         image         files that contain a disk
//! export    a volume into a file         order         names with numbers
//!                                        error         what went wrong and what to do next
//! ```
//!
//! Answers go to stdout, everything else to stderr. Exit codes: 0 success, 1 failure, 2 usage.

#![forbid(unsafe_code)]

mod args;
mod client;
mod error;
mod export;
mod image;
mod import;
mod offline;
mod order;
mod pool;
mod table;
mod view;
mod volume;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command, Output, PoolCommand};
use error::{Error, Result};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = cli.output;
    let Err(error) = execute(cli) else { return ExitCode::SUCCESS };
    for error in error.each() {
        let text = match output {
            Output::Table => error.to_string(),
            Output::Json => serde_json::to_string(error).unwrap_or_else(|_| error.to_string()),
        };
        // If even stderr is closed there is nobody to tell.
        writeln!(std::io::stderr().lock(), "{text}").unwrap_or_default();
    }
    ExitCode::FAILURE
}

fn execute(cli: Cli) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("cannot start", &error))?;
    let done = runtime.block_on(run(cli));
    // A thread that reads from a terminal or pipe may never come back.
    runtime.shutdown_background();
    done
}

async fn run(cli: Cli) -> Result<()> {
    let output = cli.output;
    let connect = || client::connect(&cli.daemon);
    match cli.command {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "pando", &mut script);
            table::print_text(&String::from_utf8_lossy(&script))
        }
        Command::Clone(args) => volume::clone(connect().await?, output, args).await,
        Command::Snapshot(args) => volume::snapshot(connect().await?, output, args).await,
        Command::Volume(command) => volume::run(connect().await?, output, command).await,
        Command::Pool(PoolCommand::Status) => pool::status(connect().await?, output).await,
        Command::Pool(PoolCommand::Grow { size }) => {
            pool::grow(connect().await?, output, size).await
        }
        Command::Pool(PoolCommand::Check { offline: None }) => {
            pool::check(connect().await?, output).await
        }
        Command::Pool(PoolCommand::Scrub { rate }) => {
            pool::scrub(connect().await?, output, rate).await
        }
        Command::Pool(PoolCommand::Dump { offline: None }) => {
            pool::dump(connect().await?, output).await
        }
        Command::Pool(PoolCommand::Create(args)) => offline::create(output, args).await,
        Command::Pool(PoolCommand::Check { offline: Some(path) }) => {
            offline::check(&path, output).await
        }
        Command::Pool(PoolCommand::Dump { offline: Some(path) }) => {
            offline::dump(&path, output).await
        }
    }
}
