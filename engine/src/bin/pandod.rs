//! The daemon: serves a pool's volumes. See `pando_engine::daemon`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use pando_engine::daemon;
use pando_engine::daemon::config::{Config, DEFAULT_FILE};
use pando_engine::error::{Error, Result};
use pando_engine::export::helper;
use rustix::io::Errno;

/// Serves the volumes of a Pando pool.
///
/// With neither --config nor --pool, /etc/pando/pandod.toml is read; the other options override the
/// file. Stops on SIGTERM: exports end, a last checkpoint is written. Exit codes: 0 success, 1
/// failure, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "pandod", version, max_term_width = 100)]
struct Args {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// File or block device of the pool
    #[arg(long, value_name = "PATH")]
    pool: Option<PathBuf>,
    /// Directory of sockets, journal memory and records of devices, if they are not set one by one
    /// [default: /run/pando for root, else $XDG_RUNTIME_DIR/pando]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Socket of the API [default: RUN_DIR/pando.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Directory of the sockets of NBD exports [default: RUN_DIR/nbd]
    #[arg(long, value_name = "DIR")]
    nbd_dir: Option<PathBuf>,
    /// Directory of the records of block devices [default: RUN_DIR/devices]
    #[arg(long, value_name = "DIR")]
    devices_dir: Option<PathBuf>,
    /// Directory in memory of what is not flushed yet [default: RUN_DIR/journal]
    #[arg(long, value_name = "DIR")]
    journal_dir: Option<PathBuf>,
    /// Check the configuration, that the pool exists, and certificates; then exit
    #[arg(long)]
    check_config: bool,
}

impl Args {
    fn configuration(self) -> Result<Config> {
        let mut config = match (self.config, &self.pool) {
            (Some(path), _) => Config::load(&path)?,
            (None, Some(pool)) => Config::for_pool(pool.clone()),
            (None, None) => default_configuration()?,
        };
        if let Some(pool) = self.pool {
            config.pool = pool;
        }
        let overrides = [
            (self.run_dir, &mut config.run_dir),
            (self.socket, &mut config.socket),
            (self.nbd_dir, &mut config.nbd_dir),
            (self.devices_dir, &mut config.devices_dir),
            (self.journal_dir, &mut config.journal_dir),
        ];
        for (given, key) in overrides {
            if given.is_some() {
                *key = given;
            }
        }
        config.validate()?;
        Ok(config)
    }
}

fn default_configuration() -> Result<Config> {
    let missing = Errno::NOENT.raw_os_error();
    Config::load(Path::new(DEFAULT_FILE)).map_err(|error| {
        if error.errno() == missing {
            error.context("name a pool with --pool, or a configuration with --config")
        } else {
            error
        }
    })
}

fn run(args: Args) -> Result<()> {
    let check_only = args.check_config;
    let config = args.configuration()?;
    if check_only {
        daemon::check(&config)?;
        let (pool, socket) = (config.pool.display(), config.paths()?.socket);
        let answer =
            format!("the configuration is valid: pool {pool}, socket {}", socket.display());
        return writeln!(std::io::stdout().lock(), "{answer}")
            .map_err(|error| Error::io("standard output", error));
    }
    daemon::init_log(&config.log)?;
    daemon::run(&config)
}

fn main() -> ExitCode {
    if let Some(code) = helper::run(std::env::args_os()) {
        return code;
    }
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If even stderr is closed there is nobody to tell.
            writeln!(std::io::stderr().lock(), "error: {error}").unwrap_or_default();
            ExitCode::FAILURE
        }
    }
}
