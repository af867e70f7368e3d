//! Runs of killers: without a mutant they pass, with one they fail.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
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

/// A program of the copy.
struct Program {
    path: PathBuf,
    /// The paths of its tests.
    tests: Vec<String>,
}

/// The programs of the copy, by the names of their tests.
pub(crate) struct Programs(BTreeMap<String, Program>);

impl Programs {
    pub(crate) fn of(paths: BTreeMap<String, PathBuf>) -> Self {
        let listed = |path: PathBuf| {
            let output = Command::new(&path).args(["--list", "--format=terse"]).output();
            let all = String::from_utf8(output.expect("a list of tests").stdout).expect("UTF-8");
            let tests = all.lines().filter_map(|line| line.strip_suffix(": test"));
            Program { path, tests: tests.map(str::to_owned).collect() }
        };
        Self(paths.into_iter().map(|(name, path)| (name, listed(path))).collect())
    }

    /// The program of a killer, and the whole path of the test.
    fn find(&self, killer: &Killer) -> (&Path, &str) {
        let Killer { binary, test } = killer;
        let program = self.0.get(binary).unwrap_or_else(|| panic!("no tests named {binary}"));
        let is_it = |path: &&String| {
            path.strip_suffix(test.as_str()).is_some_and(|p| p.is_empty() || p.ends_with("::"))
        };
        let found: Vec<&String> = program.tests.iter().filter(is_it).collect();
        let [test] = found[..] else { panic!("one test is to be {binary} {test}: {found:?}") };
        (&program.path, test)
    }

    fn run(&self, killer: &Killer, mutant: Option<&str>, seconds: f64) -> (Outcome, String) {
        let (program, test) = self.find(killer);
        let mut command = Command::new("timeout");
        command.args(["--signal=KILL", &format!("{seconds:.1}")]).arg(program);
        command.args(["--exact", test, "--nocapture"]).env_remove("PANDO_MUTANT");
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
