//! Logs: to stderr, where systemd and containers look for them.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::daemon::config::{Log, LogFormat};
use crate::error::{Error, Result};

/// Crates below the API that tell of every frame: only at the level that is named for them.
const NOISY: [&str; 3] = ["h2", "hyper", "tower"];

/// The filter that `level` asks for.
fn filter(level: &str) -> Result<EnvFilter> {
    let noisy = NOISY.iter().filter(|name| !level.contains(*name));
    let quiet: String = noisy.map(|name| format!(",{name}=warn")).collect();
    let refused = |why: &str| {
        Error::invalid(format!(
            "log.level = {level:?}: {why}; write error, warn, info, debug, trace or off, or a filter \
             such as info,pando_engine=debug"
        ))
    };
    // `EnvFilter` takes a word that is not a level for the name of a module, the only one to log.
    let mut words = level.split(',').filter(|directive| !directive.contains(['=', '[']));
    if let Some(word) = words.find(|word| word.is_empty() || word.parse::<LevelFilter>().is_err()) {
        return Err(refused(&format!("{word:?} is not a level")));
    }
    EnvFilter::try_new(format!("{level}{quiet}")).map_err(|error| refused(&error.to_string()))
}

/// Checks that `level` is a filter.
///
/// # Errors
/// `Invalid`, with what is allowed.
pub(super) fn check_level(level: &str) -> Result<()> {
    filter(level).map(|_| ())
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

    #[test]
    fn a_level_is_a_word_of_its_own() {
        for level in ["info", "WARN", "off", "pando_engine=debug", "info,pando_engine=debug"] {
            assert!(filter(level).is_ok(), "{level}");
        }
        for level in ["", "loud", "info,loud", "info,", "info, debug", "pando_engine=loud"] {
            assert!(filter(level).is_err(), "{level}");
        }
    }
}
