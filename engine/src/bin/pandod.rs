//! The daemon: serves a pool's volumes. See `pando_engine::daemon`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pando_engine::daemon::{self, config::Config};
use pando_engine::error::Result;
use pando_engine::export::apart;

/// Serves the volumes of a Pando pool.
///
/// Needs a configuration file or --pool; the other options override the file. Stops on SIGTERM:
/// exports end, a last checkpoint is written. Exit codes: 0 success, 1 failure, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "pandod", version, max_term_width = 100)]
struct Args {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE", required_unless_present = "pool")]
    config: Option<PathBuf>,
    /// File or block device of the pool
    #[arg(long, value_name = "PATH")]
    pool: Option<PathBuf>,
    /// Socket of the API
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Directory of the sockets of NBD exports
    #[arg(long, value_name = "DIR")]
    nbd_dir: Option<PathBuf>,
    /// Directory in memory of what is not flushed yet
    #[arg(long, value_name = "DIR")]
    journal_dir: Option<PathBuf>,
    /// Check the configuration and exit
    #[arg(long)]
    check_config: bool,
}

impl Args {
    fn configuration(&self) -> Result<Config> {
        let mut config = match &self.config {
            Some(path) => Config::load(path)?,
            None => Config::for_pool(self.pool.clone().unwrap_or_default()),
        };
        let overrides = [
            (&self.pool, &mut config.pool),
            (&self.socket, &mut config.socket),
            (&self.nbd_dir, &mut config.nbd_dir),
            (&self.journal_dir, &mut config.journal_dir),
        ];
        for (given, key) in overrides {
            if let Some(given) = given {
                key.clone_from(given);
            }
        }
        config.validate()?;
        Ok(config)
    }
}

fn main() -> ExitCode {
    if let Some(code) = apart::run(std::env::args_os()) {
        return code;
    }
    let args = Args::parse();
    let done = args.configuration().and_then(|config| {
        if args.check_config {
            return Ok(());
        }
        daemon::init_log(&config.log)?;
        daemon::run(&config)
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If even stderr is closed there is nobody to tell.
            writeln!(std::io::stderr().lock(), "error: {error}").unwrap_or_default();
            ExitCode::FAILURE
        }
    }
}
