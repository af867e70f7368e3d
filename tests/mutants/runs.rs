//! Runs of killers: without a mutant they pass, with one they fail.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use super::list::{Killer, Mutant};

/// Seconds that a run may take beyond three times what it takes without a mutant.
const PATIENCE: f64 = 20.0;
/// What `timeout --signal=KILL` makes of a run that it has ended.
const TIMED_OUT: i32 = 137;

/// How a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    Survived,
    Failed,
    TimedOut,
}

/// A run of one mutant.
pub(crate) struct Outcome {
    pub(crate) end: End,
    pub(crate) took: Duration,
    /// What the test said when it failed.
    pub(crate) why: String,
}

/// The programs of the copy.
pub(crate) struct Programs(pub(crate) BTreeMap<String, PathBuf>);

impl Programs {
    fn run(&self, killer: &Killer, mutant: Option<&str>, seconds: f64) -> (Outcome, String) {
        let program = self.0.get(&killer.binary);
        let program = program.unwrap_or_else(|| panic!("no tests named {}", killer.binary));
        let mut command = Command::new("timeout");
        command.args(["--signal=KILL", &format!("{seconds:.1}")]).arg(program);
        command.args(["--exact", &killer.test, "--nocapture"]).env_remove("PANDO_MUTANT");
        if let Some(name) = mutant {
            command.env("PANDO_MUTANT", name);
        }
        let begin = Instant::now();
        let output = command.output().expect("timeout, of coreutils");
        let took = begin.elapsed();
        let end = match output.status.code() {
            Some(0) => End::Survived,
            Some(TIMED_OUT) if took.as_secs_f64() >= seconds => End::TimedOut,
            _ => End::Failed,
        };
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let panicked = said.lines().skip_while(|line| !line.contains("panicked at")).take(2);
        let why = panicked.collect::<Vec<_>>().join(" ").chars().take(300).collect();
        let all = String::from_utf8_lossy(&output.stdout).into_owned() + &said;
        (Outcome { end, took, why }, all)
    }

    /// Runs a killer without a mutant. Says how long it took.
    ///
    /// # Panics
    /// When it fails: then it says nothing about mutants.
    pub(crate) fn prove(&self, killer: &Killer) -> Duration {
        let (outcome, said) = self.run(killer, None, 240.0);
        let passed = outcome.end == End::Survived && said.contains("1 passed");
        assert!(passed, "{} {} fails without a mutant:\n{said}", killer.binary, killer.test);
        outcome.took
    }

    /// Runs the killer of a mutant, which takes `usual` without it.
    pub(crate) fn attack(&self, mutant: &Mutant, usual: Duration) -> Outcome {
        // In full tenths, as `timeout` is told.
        let seconds = (30.0 * usual.as_secs_f64()).ceil() / 10.0 + PATIENCE;
        self.run(&mutant.killer, Some(&mutant.name), seconds).0
    }
}
