//! What is printed: a line for each case.

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result};

/// The cases that were passed.
pub(crate) struct Report {
    passed: usize,
}

impl Report {
    pub(crate) const fn new() -> Self {
        Self { passed: 0 }
    }

    /// Runs a case, which says what it has seen.
    pub(crate) fn case(&mut self, name: &str, work: impl FnOnce() -> Result<String>) -> Result<()> {
        let since = Instant::now();
        let seen = work().with_context(|| format!("FAIL {name}"))?;
        let seconds = since.elapsed().as_secs_f64();
        self.passed += 1;
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "PASS {name} ({seconds:.1} s): {seen}")?;
        Ok(stdout.flush()?)
    }

    /// The closing lines. Whether something failed.
    pub(crate) fn close(&self, outcome: Result<()>) -> Result<bool> {
        let failed = usize::from(outcome.is_err());
        let mut stdout = std::io::stdout().lock();
        if let Err(error) = outcome {
            writeln!(stdout, "{error:#}")?;
        }
        writeln!(stdout, "{} passed, {failed} failed", self.passed)?;
        Ok(failed > 0)
    }
}
