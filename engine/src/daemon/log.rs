//! Logs: to stderr, where systemd and containers look for them.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::daemon::config::{Log, LogFormat};
use crate::error::{Error, Result};

/// Starts logging for the life of the process.
///
/// # Errors
/// `Invalid` when the level is not a filter, or logging was started before.
pub fn init(log: &Log) -> Result<()> {
    let filter = EnvFilter::try_new(&log.level)
        .map_err(|error| Error::invalid(format!("log.level = {:?}: {error}", log.level)))?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let started = match log.format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| Error::invalid(format!("logging: {error}")))
}
