//! Logs: to stderr, where systemd and containers look for them.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::daemon::config::{Log, LogFormat};
use crate::error::{Error, Result};

/// Crates below the API that tell of every frame: only at the level that is named for them.
const NOISY: [&str; 3] = ["h2", "hyper", "tower"];

/// The filter that `level` asks for.
fn filter(level: &str) -> Result<EnvFilter> {
    let noisy = NOISY.iter().filter(|name| !level.contains(*name));
    let quiet: String = noisy.map(|name| format!(",{name}=warn")).collect();
    EnvFilter::try_new(format!("{level}{quiet}"))
        .map_err(|error| Error::invalid(format!("log.level = {level:?}: {error}")))
}

/// Starts logging for the life of the process.
///
/// # Errors
/// `Invalid` when the level is not a filter, or logging was started before.
pub fn init(log: &Log) -> Result<()> {
    let filter = filter(&log.level)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_told_only_when_asked_for() {
        assert!(filter("debug").unwrap().to_string().contains("h2=warn"));
        assert!(!filter("info,h2=trace").unwrap().to_string().contains("h2=warn"));
        assert!(filter("info,=").is_err());
    }
}
