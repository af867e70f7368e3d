//! The suites, and how their cases are run.

use std::panic::catch_unwind;
use std::time::Instant;

use crate::{auto, kills, volumes};

/// A case: its name on the console, and what it does with devices of a kind. It panics when
/// something is wrong, and that is the end of the machine.
pub(crate) type Case = (&'static str, fn(&str));

/// The cases of a suite, and the kind of devices that they are about.
pub(crate) fn cases(suite: &str) -> Option<(&'static str, Vec<Case>)> {
    match suite {
        "auto" => Some(("auto", vec![("order", auto::order)])),
        "ublk" => Some(("ublk", [volumes::CASES, kills::CASES].concat())),
        "nbd" => Some(("nbd", [volumes::CASES, kills::CASES].concat())),
        _ => None,
    }
}

/// Runs the cases in order; whether all were passed. `tests/vm.rs` looks for the lines that this
/// prints. A case that fails leaves the machine in disorder, but those that follow may tell more.
pub(crate) fn run(kind: &str, cases: &[Case]) -> bool {
    let mut all = true;
    for (name, case) in cases {
        eprintln!("CASE {name}");
        let since = Instant::now();
        let passed = catch_unwind(|| case(kind)).is_ok();
        eprintln!("{} {name}", if passed { "PASS" } else { "FAIL" });
        eprintln!("     in {:.1} s", since.elapsed().as_secs_f64());
        all &= passed;
    }
    all
}
