//! The suites, and how their cases are run.

use std::time::Instant;

use pando_tests::tools;

/// A case: its name on the console, and what it does. It panics when something is wrong, and that
/// is the end of the machine.
pub(crate) type Case = (&'static str, fn());

/// The cases of a suite.
pub(crate) fn cases(suite: &str) -> Option<Vec<Case>> {
    match suite {
        "boot" => Some(vec![("modules", modules)]),
        _ => None,
    }
}

/// Runs the cases in order. `tests/vm.rs` looks for the lines that this prints.
pub(crate) fn run(cases: &[Case]) {
    for (name, case) in cases {
        eprintln!("CASE {name}");
        let since = Instant::now();
        case();
        eprintln!("PASS {name}");
        eprintln!("     in {:.1} s", since.elapsed().as_secs_f64());
    }
}

/// Loads a module of the kernel with what it depends on.
pub(crate) fn load(module: &str) {
    tools::run("modprobe", &[module]);
}

/// What the other suites stand on: the kernel has the drivers.
fn modules() {
    for module in ["ublk_drv", "nbd"] {
        load(module);
    }
    for path in ["/dev/ublk-control", "/dev/nbd0"] {
        assert!(std::fs::exists(path).is_ok_and(|there| there), "no {path}");
    }
}
